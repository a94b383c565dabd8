"""What a comparison says of given numbers: intervals, worst clients, paired differences, table and page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from server_app.comparison import (
    METRICS,
    Comparison,
    Row,
    as_markdown,
    comparison_of,
    interval,
    paired,
    worst_decile,
)
from server_app.comparison_report import as_html

SCORES = {"local": (0.5, 0.7, 0.9), "fedavg": (0.6, 0.6, 0.6), "rival": (0.6, 0.8, 0.85)}


def rows_of(wire: int | None = 3_000_000, metric: str = "accuracy", sign: int = 1) -> list[Row]:
    rows = []
    for strategy, scores in SCORES.items():
        for seed in (0, 1):
            for index, score in enumerate(scores):
                for round_, phase, share in ((1, "train", 0.5), (2, "train", 0.8), (3, "deliver", 1.0)):
                    rows.append(
                        Row(
                            strategy,
                            seed,
                            f"client-{index}",
                            round_,
                            phase,
                            "ok",
                            {metric: sign * share * score, "loss": 1.0},
                            seconds=1.0 + index,
                            train_seconds=0.5,
                            bytes={
                                "up_message": 1_000_000,
                                "down_message": 2_000_000,
                                "up_wire": wire,
                                "down_wire": wire,
                            },
                        )
                    )
    return rows


def compared(rows: list[Row] | None = None) -> Comparison:
    return comparison_of(rows_of() if rows is None else rows, list(SCORES), ("local", "fedavg"))


def test_final_models_are_compared_client_by_client() -> None:
    found = compared()
    assert (found.metric, found.level) == ("accuracy", "wire")
    local, fedavg, rival = found.lines
    assert local.mean.value == pytest.approx(0.7)
    assert rival.mean.value == pytest.approx(0.75)
    against = rival.against["local"]
    assert against.mean.value == pytest.approx((0.1 + 0.1 - 0.05) / 3)
    assert (against.better, against.worse) == (4, 2)
    assert rival.against["fedavg"].mean.value == pytest.approx(0.15)
    assert fedavg.mean.low == pytest.approx(fedavg.mean.high) == pytest.approx(0.6)
    assert local.worst.value == pytest.approx(0.5)
    assert local.megabytes == {"up": 27.0, "down": 27.0}  # 3 clients x 3 rounds, mean over seeds
    assert local.seconds == pytest.approx(9.0)  # the slowest takes 3 s in each of 3 rounds


def test_bytes_fall_back_to_what_was_measured() -> None:
    found = compared(rows_of(wire=None))
    assert found.level == "message"
    assert found.lines[0].megabytes == {"up": 9.0, "down": 18.0}
    assert "the wire was not measured" in as_markdown(found, "title")


def test_a_client_that_failed_at_the_end_is_left_out_of_its_pair() -> None:
    rows = [
        row
        if (row.strategy, row.client, row.phase) != ("rival", "client-2", "deliver")
        else Row("rival", row.seed, row.client, 3, "deliver", "late", {}, 9.0, 0.0)
        for row in rows_of()
    ]
    rival = compared(rows).lines[2]
    assert len(rival.scores) == 4
    assert rival.against["local"].mean.value == pytest.approx(0.1)


def test_where_less_is_better_so_are_differences() -> None:
    rows = [
        Row(r.strategy, r.seed, r.client, r.round, r.phase, r.status, {"loss": r.metrics["accuracy"]}, 1, 1)
        for r in rows_of()
    ]
    found = compared(rows)
    assert found.metric == "loss"
    assert METRICS["loss"] == -1
    assert found.lines[0].worst.value == pytest.approx(0.9)
    assert found.lines[2].against["local"].mean.value == pytest.approx(-0.05)


def test_intervals_cover_the_mean_and_shrink() -> None:
    few, many = interval([0.0, 1.0] * 4), interval([0.0, 1.0] * 100)
    for found in (few, many):
        assert found.low < found.value == 0.5 < found.high
    assert many.high - many.low < 0.4 * (few.high - few.low)
    # the mean's standard error is 0.5 / sqrt(200)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.1)
    assert interval([0.0, 1.0] * 4) == few  # drawn from a fixed seed
    assert math.isnan(interval([]).value)


def test_the_worst_tenth() -> None:
    scores = {(0, f"client-{index}"): float(index) for index in range(20)}
    assert worst_decile(scores).value == 0.5
    assert worst_decile(scores, -1).value == 18.5
    assert worst_decile({(0, "a"): 0.3}).value == 0.3
    assert paired({(0, "a"): 1.0, (1, "a"): 2.0}, {(1, "a"): 1.5}).mean.value == 0.5


def test_the_table_has_every_strategy_and_says_what_its_numbers_are() -> None:
    text = as_markdown(compared(), "digits")
    lines = text.splitlines()
    assert lines[0] == "# digits"
    rival = next(line for line in lines if line.startswith("| `rival`"))
    cells = [cell.strip() for cell in rival.strip("|").split("|")]
    assert cells[1].startswith("0.750 [")
    assert cells[3].startswith("+0.050 [")
    assert cells[3].endswith("(4/2)")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "controls" in text


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
        if found.get("role") == "img":
            self.labels.append(found.get("aria-label") or "")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_stands_alone_and_every_chart_has_a_text_and_its_numbers() -> None:
    pytest.importorskip("plotly", reason="the extra 'report' is not installed")
    matrices = {
        "rival": [
            {"round": 1, "rows": {"client-0": [0.25, 0.75], "client-1": [1.0, 0.0]}},
            {"round": 2, "rows": {"client-0": [0.5, 0.5], "client-1": [0.125, 0.875]}},
        ]
    }
    text = as_html(compared(), rows_of(), "<digits> & more", matrices)
    page = Page()
    page.feed(text)
    assert page.links == ["data:,"]  # nothing is fetched
    assert "<title>&lt;digits&gt; &amp; more</title>" in text
    assert page.tags.count("figure") == page.tags.count("details") == len(page.labels) == 7
    assert all(len(label) > 30 for label in page.labels)
    for number in ("+0.050", "0.125", "27.00"):
        assert any(number in cell for cell in page.cells), number
    drawn = re.findall(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{', text, re.DOTALL)
    assert len(drawn) >= 7
    heat = [json.loads(chart) for chart in drawn if '"heatmap"' in chart]
    assert [[trace["visible"] for trace in chart] for chart in heat] == [[False, True]]
    assert '"sliders"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
