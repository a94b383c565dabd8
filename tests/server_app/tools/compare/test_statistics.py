"""What a comparison says of given numbers: intervals, worst clients, paired differences, table and page."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from server_app.tools.compare.html import as_html, at_a_glance, verdict
from server_app.tools.compare.merges import matrix_of
from server_app.tools.compare.scores import PLACES, _places, by_encoding, means
from server_app.tools.compare.statistics import (
    METRICS,
    Observation,
    Scores,
    as_markdown,
    comparison_of,
    interval,
    paired,
    terminal_table,
    with_score,
    worst_decile,
)
from tests.benchmarks.accuracy.interval_coverage import coverage
from tests.server_app.tools.compare.samples import SCORES, compared, rows_of, runs_of


def test_final_models_are_compared_client_by_client() -> None:
    found = compared()
    assert (found.metric, found.level) == ("accuracy", "wire")
    local, fedavg, rival, head, twice = found.lines
    assert local.mean.value == pytest.approx(0.7)
    assert rival.mean.value == pytest.approx(0.75)
    against = rival.against["local"]
    assert against.mean.value == pytest.approx((0.1 + 0.1 - 0.05) / 3)
    assert (against.better, against.worse) == (4, 2)
    assert rival.against["fedavg"].mean.value == pytest.approx(0.15)
    assert fedavg.mean.low == pytest.approx(fedavg.mean.high) == pytest.approx(0.6)
    assert [line.role for line in found.lines] == ["reference", "reference", "", "control", "control"]
    assert found.controlled
    assert rival.rival == "local-twice"
    assert rival.beyond is not None
    assert rival.beyond.mean.value == pytest.approx((0.05 + 0.08 - 0.05) / 3)
    assert local.beyond is head.beyond is twice.beyond is None
    assert [line.strategy for line in found.ranked()] == ["rival", "local-twice", "local", "fedavg-head", "fedavg"]
    assert local.worst.value == pytest.approx(0.5)
    assert local.megabytes == {"up": 27.0, "down": 27.0}  # 3 clients x 3 rounds, mean over seeds
    assert local.seconds == pytest.approx(9.0)  # the slowest takes 3 s in each of 3 rounds


def test_a_strategy_is_judged_by_the_best_control_that_sees_no_other_examples() -> None:
    alone, more = ("train",), ("train", "validation")
    known = dict.fromkeys(SCORES, alone) | {"local-twice": more}  # the control with the best mean
    assert compared(learns_from=known).lines[2].rival == "fedavg-head"
    assert compared(learns_from={**known, "rival": more}).lines[2].rival == "local-twice"
    assert compared(learns_from=dict.fromkeys(SCORES, more) | {"rival": alone}).lines[2].rival == ""
    assert not compared(learns_from=dict.fromkeys(SCORES, more) | {"rival": alone}).controlled


def test_bytes_fall_back_to_what_was_measured() -> None:
    found = compared(rows_of(wire=None))
    assert found.level == "message"
    assert found.lines[0].megabytes == {"up": 9.0, "down": 18.0}
    assert "the wire was not measured" in as_markdown(found, "title")


def test_a_client_that_failed_at_the_end_is_left_out_of_its_pair() -> None:
    rows = [
        row
        if (row.strategy, row.client, row.phase) != ("rival", "client-2", "deliver")
        else Observation("rival", row.seed, row.client, 3, "deliver", "late", {}, 9.0, 0.0)
        for row in rows_of()
    ]
    rival = compared(rows).lines[2]
    assert len(rival.scores) == 4
    assert rival.label == "rival"
    assert rival.against["local"].mean.value == pytest.approx(0.1)


def test_a_strategy_without_all_seeds_says_so() -> None:
    rows = [row for row in rows_of() if (row.strategy, row.seed) not in (("rival", 1), ("local-twice", 0))]
    found = compared(rows)
    assert [line.label for line in found.lines if line.unserved] == [
        "rival (1 of 2 seeds)",
        "local-twice (control; 1 of 2 seeds)",
    ]
    assert "| rival (1 of 2 seeds) |" in as_markdown(found, "title")
    assert as_markdown(found, "title", ["Failed: rival-seed1: why"]).endswith("* Failed: rival-seed1: why\n")


def test_seconds_are_those_of_the_median_seed() -> None:
    rows = [
        replace(row, seed=seed, seconds=1000.0 if seed == 2 else row.seconds)
        for row in rows_of()
        if row.seed == 0
        for seed in (0, 1, 2)
    ]
    assert compared(rows).lines[0].seconds == pytest.approx(9.0)


def test_where_less_is_better_so_are_differences() -> None:
    rows = [
        Observation(r.strategy, r.seed, r.client, r.round, r.phase, r.status, {"loss": r.metrics["accuracy"]}, 1, 1)
        for r in rows_of()
    ]
    found = compared(rows)
    assert found.metric == "loss"
    assert METRICS["loss"] == -1
    assert found.lines[0].worst.value == pytest.approx(0.9)
    assert found.lines[2].against["local"].mean.value == pytest.approx(-0.05)


def of_clients(values: Sequence[float]) -> Scores:
    """One seed, a client for each value."""
    return {(0, f"client-{index:03}"): value for index, value in enumerate(values)}


def test_clients_with_several_tasks_are_compared_by_their_mean_score() -> None:
    """A client that only writes texts has no accuracy."""
    several = {"accuracy": 0.75, "answer/exact_match": 0.25, "answer/loss": 2.0, "topic/accuracy": 0.75, "loss": 1.0}
    assert with_score(several) == several | {"score": 0.5}
    assert with_score({"caption/exact_match": 0.25, "loss": 1.0})["score"] == 0.25
    assert with_score({"caption/loss": 1.0, "accuracy": 0.5}) == {"caption/loss": 1.0, "accuracy": 0.5}
    rows = rows_of(metric="score")
    found = compared(rows)
    assert (found.metric, found.sign) == ("score", 1)
    assert "score (mean over a client's tasks of accuracy" in as_markdown(found, "title")
    pytest.importorskip("plotly", reason="the extra 'report' is not installed")
    assert "both its ends" not in as_html(found, runs_of(rows), "")  # whose clients have no tasks there


def test_intervals_cover_the_mean_and_shrink() -> None:
    few, many = interval(of_clients([0.0, 1.0] * 4)), interval(of_clients([0.0, 1.0] * 100))
    for found in (few, many):
        assert found.low < found.value == 0.5 < found.high
    assert many.high - many.low < 0.4 * (few.high - few.low)
    # the mean's standard error is 0.5 / sqrt(200)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.1)
    assert interval(of_clients([0.0, 1.0] * 4)) == few  # drawn from a fixed seed
    assert math.isnan(interval({}).value)


def test_what_a_client_has_in_common_in_all_seeds_is_no_more_evidence_than_one_seed() -> None:
    once = of_clients([0.0, 1.0] * 10)
    thrice = {(seed, client): value for (_, client), value in once.items() for seed in range(3)}
    swapped = {(int(client[-3:]), f"client-{seed}"): value for (seed, client), value in thrice.items()}
    narrow = interval(of_clients(list(thrice.values())))  # as if they were 60 clients
    for found in (interval(thrice), interval(swapped)):
        assert found.high - found.low == pytest.approx(interval(once).high - interval(once).low, rel=0.05)
        assert found.high - found.low > 1.4 * (narrow.high - narrow.low)


def test_intervals_of_few_seeds_and_clients_cover_what_they_say() -> None:
    """Eight clients, three seeds, as much variance between clients as within them, as in ``interval_coverage.py``."""
    assert 0.88 < coverage(3, 8, (0.0, 1.0, 1.0), times=300)["two ways"] <= 1


def test_an_interval_bears_missing_scores() -> None:
    found = interval({(0, "a"): 0.0, (1, "b"): 1.0})
    assert (found.low, found.value, found.high) == (0.0, 0.5, 1.0)


def test_the_worst_tenth() -> None:
    scores = {(0, f"client-{index}"): float(index) for index in range(20)}
    assert worst_decile(scores).value == 0.5
    assert worst_decile(scores, -1).value == 18.5
    assert worst_decile({(0, "a"): 0.3}).value == 0.3
    assert math.isnan(worst_decile(scores).low)  # of two
    lowest = worst_decile(scores | {(1, client): value for (_, client), value in scores.items()})
    assert lowest.low < lowest.value < lowest.high
    assert paired({(0, "a"): 1.0, (1, "a"): 2.0}, {(1, "a"): 1.5}).mean.value == 0.5


def test_the_table_has_every_strategy_and_says_what_its_numbers_are() -> None:
    found = compared()
    text = as_markdown(found, "digits")
    lines = text.splitlines()
    assert lines[0] == "# digits"
    rival = next(line for line in lines if line.startswith("| rival"))
    cells = [cell.strip() for cell in rival.strip("|").split("|")]
    assert cells[1].startswith("0.750 [")
    assert cells[3].startswith("+0.050 [")
    assert cells[3].endswith("(4/2)")
    assert cells[5].startswith("+0.027 [")  # the control
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "beyond the best control that learns from no other examples" in text
    learns = {"rival": ("train", "validation"), "local": ("train",)}
    seen = comparison_of(rows_of(), list(SCORES), ("local", "fedavg"), (), learns)
    said = {line.split(" | ")[0].strip("| "): line for line in as_markdown(seen, "digits").splitlines()}
    assert said["rival"].endswith("| train + validation |")
    assert said["local (reference)"].endswith("| train |")
    shown = io.StringIO()
    Console(file=shown, width=80).print(terminal_table(found))
    assert all(name in shown.getvalue() for name in SCORES)
    assert "…" not in shown.getvalue()


def test_the_front_has_who_is_not_beaten_for_less() -> None:
    found = compared()
    prices = {"local": 1.0, "fedavg": 2.0, "rival": 5.0, "fedavg-head": 1.0, "local-twice": 6.0}
    front = found.cheapest(lambda line: prices[line.strategy])
    assert [line.strategy for line in front] == ["local", "rival"]
    free = found.cheapest(lambda line: 0.0 if line.strategy == "local-twice" else 1.0)
    assert [line.strategy for line in free] == ["rival"], "a control hides nobody"


def test_at_a_glance_says_who_is_beyond_the_controls() -> None:
    rows = rows_of()
    said = " ".join(at_a_glance(compared(rows), runs_of(rows), {"ties-seed0-0": "out of luck"}))
    assert "Best mean accuracy: rival, 0.750." in said
    assert (
        "Beyond the best control that learns from no other examples than they do, with a 95 % interval above 0: none"
        in said
    )
    assert "at most 0.22 % of a run's bytes in one direction (local, seed 1)" in said
    assert "ties-seed0-0: out of luck" in said
    better = [
        replace(row, metrics={"accuracy": row.metrics["accuracy"] + 0.2}) if row.strategy == "rival" else row
        for row in rows
    ]
    assert "above 0: rival (against local-twice) (1 of 1)" in " ".join(
        at_a_glance(compared(better), runs_of(better), {})
    )


def test_a_verdict_of_few_scores_says_so_and_recommends_nothing_worse_than_local() -> None:
    rows = rows_of()
    said = " ".join(verdict(compared(rows)))
    assert "Only 6 scores of 2 seeds: too few to choose by." in said
    assert "4 of 6 pairs of client and seed gain, 2 lose" in said
    many = [replace(row, seed=seed) for row in rows if row.seed == 0 for seed in range(4)]
    assert "too few" not in " ".join(verdict(compared(many)))
    cheap = [replace(row, seconds=0.1) if row.strategy == "fedavg" else row for row in rows]
    (front,) = (line for line in verdict(compared(cheap)) if "at most as many seconds" in line)
    assert front.endswith("cheapest first: rival.")  # not fedavg, which is the cheapest and below local


def test_an_interval_that_is_left_out_is_a_dash_in_the_report() -> None:
    pytest.importorskip("plotly", reason="charts need the extra report")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", means(compared()))
    assert "-" in cells
    assert "nan" not in cells


def test_only_rows_of_numbers_are_a_matrix() -> None:
    assert matrix_of({"a": [1, 0.5], "b": {"weight": 0.25, "q": 3}, "c": "text", "d": {}, "e": []}) == {
        "a": [1.0, 0.5],
        "b": [0.25, 0.75],
    }
    assert matrix_of(None) == matrix_of([1.0]) == {}


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.labels: list[str] = []
        self.cells: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attributes)
        self.links += [str(found[key]) for key in ("src", "href") if key in found]
        if found.get("role") == "group":
            self.labels.append(found.get("aria-label") or "")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_stands_alone_and_every_chart_has_a_text_and_its_numbers() -> None:
    pytest.importorskip("plotly", reason="the extra 'report' is not installed")
    rows = rows_of()
    text = as_html(compared(rows), runs_of(rows), "<digits> & more", {"ties-seed0": "a <b> c"})
    page = Page()
    page.feed(text)
    assert page.links == ["data:,"]  # nothing is fetched
    assert "<title>&lt;digits&gt; &amp; more</title>" in text
    captions = ("relevance, client by client", "weights, client by model", "entropy", "both its ends", "along the line")
    captions += ("replacements by round", "bytes went, up", "bytes went, down", "slowest client", "Pareto front")
    assert [caption for caption in captions if caption not in text] == []
    assert page.tags.count("figure") == page.tags.count("details") == len(page.labels) == 17
    assert all(len(label) > 30 for label in page.labels)
    for number in ("+0.050", "0.125", "27.00", "3.6000", "0.22 %", "0.438"):
        assert any(number in cell for cell in page.cells), number
    drawn = re.findall(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{', text, re.DOTALL)
    heat = [json.loads(chart) for chart in drawn if '"sliders"' not in chart and '"heatmap"' in chart]
    assert [trace["visible"] for chart in heat if len(chart) == 2 for trace in chart] == [False, True]
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    unwired = rows_of(wire=None)
    assert "The wire was not measured" in as_html(compared(unwired), runs_of(unwired, wired=False), "")


def test_encodings_have_a_line_for_each_strategy() -> None:
    pytest.importorskip("plotly", reason="the extra 'report' is not installed")
    assert by_encoding(compared()) == []
    own = [row for row in rows_of() if row.strategy == "rival"]
    rows = [
        replace(row, strategy=f"rival-{name}", bytes={key: count // size for key, count in row.bytes.items() if count})
        for row in own
        for name, size in (("fp32", 1), ("int4", 8))
    ]
    (text,) = by_encoding(comparison_of([*own, *rows], ["rival", "rival-fp32", "rival-int4"], ()))
    page = Page()
    page.feed(text)
    found = [cell.strip() for cell in page.cells]
    assert found.count("rival") == 2  # and none of what ran with other encodings
    assert found[found.index("int4") + 1] == "6.750"  # 3 clients, 3 rounds, 6 MB, an eighth of it
    assert found[found.index("fp32") + 1] == "54.000"


def test_labels_of_points_that_are_close_go_to_different_sides() -> None:
    found = _places([("a", 10.0, 0.5), ("b", 10.1, 0.5), ("c", 9.9, 0.5), ("far", 100.0, 0.5), ("free", 0.0, 0.1)])
    assert len({found[name] for name in "abc"}) == 3
    assert found["far"] == found["free"] == found["a"] == PLACES[0]
    assert _places([]) == {}
