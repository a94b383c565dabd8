"""The benchmark of claims: the order of its searches, which runs count as finished, and what a verdict needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from client_app.scenarios import FROM_FILES, NAMES, digits_multimodal, digits_tasks
from server_app.run.options import read_run_options
from strategies import strategy_from_run_config
from tests.benchmarks.accuracy import resumable
from tests.benchmarks.claims import found, merges, wire
from tests.benchmarks.claims.designs import Arm, Base, Claim, Experiment, Place
from tests.benchmarks.claims.experiments import EXPERIMENTS
from tests.benchmarks.claims.jobs import Job, Wanted
from tests.benchmarks.claims.pictures import picture
from tests.benchmarks.claims.tables import OPEN, SEEN, of_dial, page, verdict

TOY = Experiment(
    name="toy",
    title="Toy",
    bases={
        "tiny": Base(
            {"here": Place("digits", (0, 1), 4, "two clients", each=("few", "many"))},
            {"num-server-rounds": 2},
            (1e-3, 4e-3),
        )
    },
    arms=(Arm("m", "potara", other={"potara.damping": 0.5}), Arm("c", "local"), Arm("all", "local-all", like="c")),
    claims=(Claim("better", "m", ("c",)), Claim("as good", "m", ("m/searched",), within=0.1)),
    search_dial="here",
    shrunk="all of it",
)


def lines_of(job: Job, losses: Sequence[float]) -> list[dict[str, Any]]:
    """The lines that a run of this job would leave."""
    about = {key: getattr(job, key) for key in ("experiment", "base", "dial", "seed", "split", "digest")}
    numbers = {"train_steps": 2, "looks": 4, "bytes": {"up": 1000, "down": 2000}, "clients": len(losses)}
    return [
        {
            **about, **numbers, "arm": job.arm.name, "client": f"client-{number}", "setting": dict(job.setting),
            "metrics": {"loss": loss, "accuracy": 1 - loss}, "models": {"searched": {"loss": loss + 0.01}},
        }
        for number, loss in enumerate(losses)
    ]  # fmt: skip


def played(asked: Wanted, losses: dict[str, float]) -> tuple[list[dict[str, Any]], list[Job]]:
    """All runs in the benchmark's order; a higher learning rate has a lower loss."""
    lines: list[dict[str, Any]] = []
    order: list[Job] = []
    while waiting := asked.next_jobs(lines):
        job = waiting[0]
        loss = losses[job.arm.name] - float(dict(job.setting)["learning-rate"])
        lines += lines_of(job, [loss, loss + 0.001 * job.seed])
        order.append(job)
    return lines, order


def test_every_arm_has_five_tries_on_validation_and_what_wins_is_tested() -> None:
    asked = Wanted(TOY, "tiny")
    lines, order = played(asked, {"m": 0.5, "c": 0.6, "all": 0.7})
    tries = {name: [dict(job.setting) for job in order if job.split == "validation" and job.arm.name == name]
             for name in ("m", "c", "all")}  # fmt: skip
    assert tries["m"] == [
        {"learning-rate": 1e-3}, {"learning-rate": 4e-3}, {"learning-rate": 4e-3, "potara.damping": 0.5},
        {"learning-rate": 0.016}, {"learning-rate": 0.064},
    ]  # fmt: skip
    assert [one["learning-rate"] for one in tries["c"]] == [1e-3, 4e-3, 0.016, 0.064, 0.256]
    assert tries["all"] == []
    assert all(job.seed >= 100 for job in order if job.split == "validation")
    tested = [job for job in order if job.split == "test"]
    assert {(job.arm.name, job.seed) for job in tested} == {(n, s) for n in ("m", "c", "all") for s in (0, 1, 2)}
    assert {dict(job.setting)["learning-rate"] for job in tested if job.arm.name in ("c", "all")} == {0.256}
    assert asked.at_edge(TOY.arms[1], lines)


def test_a_search_ends_where_there_are_worse_rates_on_both_sides() -> None:
    asked, losses = Wanted(TOY, "tiny", arms=("c",)), {2.5e-4: 0.7, 1e-3: 0.5, 4e-3: 0.6}
    lines: list[dict[str, Any]] = []
    while (job := asked.next_jobs(lines)[0]).split == "validation":
        lines += lines_of(job, [losses[dict(job.setting)["learning-rate"]]] * 2)
    assert dict(job.setting) == {"learning-rate": 1e-3}
    assert not asked.at_edge(TOY.arms[1], lines)
    assert len(lines) == 2 * len(losses)


def test_with_two_search_seeds_the_better_mean_wins_not_the_better_first_seed() -> None:
    design = replace(TOY.bases["tiny"], search_seeds=(100, 101))
    asked = Wanted(replace(TOY, bases={"tiny": design}), "tiny", arms=("c",))
    losses = {100: {1e-3: 0.5, 4e-3: 0.4, 0.016: 0.9}, 101: {1e-3: 0.5, 4e-3: 0.7, 0.016: 0.9}}
    lines: list[dict[str, Any]] = []
    while (job := asked.next_jobs(lines)[0]).split == "validation":
        lines += lines_of(job, [losses[job.seed].get(dict(job.setting)["learning-rate"], 1.0)] * 2)
    assert {line["seed"] for line in lines} == {100, 101}
    assert dict(job.setting) == {"learning-rate": 1e-3}  # by seed 100 alone it is 4e-3


def test_a_verdict_needs_three_seeds_and_an_interval_above_zero() -> None:
    asked = Wanted(TOY, "tiny")
    lines, _ = played(asked, {"m": 0.5, "c": 0.9, "all": 0.7})
    better, as_good = TOY.claims
    whole = of_dial(asked, lines, "here")
    found_better, found_as_good = (verdict(asked, claim, whole, "here") for claim in (better, as_good))
    assert found_better is not None
    assert found_better.word == SEEN
    assert found_better.gain.low > 0
    assert found_as_good is not None
    assert found_as_good.word == SEEN
    two = [line for line in lines if line["seed"] != 2]
    few = verdict(asked, better, of_dial(asked, two, "here"), "here")
    assert few is not None
    assert few.word == OPEN
    worse = verdict(asked, Claim("worse", "c", ("m",)), whole, "here")
    assert worse is not None
    assert worse.word == "not seen"
    missing = {**whole, "c": [line for line in whole["c"] if line["seed"] != 2]}
    broken = {**whole, "c": [{**line, "metrics": {}} if line["client"] == "client-0" else line for line in whole["c"]]}
    for some in (missing, broken):
        unknown = verdict(asked, better, some, "here")
        assert unknown is not None
        assert unknown.word == OPEN, "a control with two seeds, or with a model that broke down"
    assert "| better | **seen**" in page(asked, lines)
    assert "| many | 0.437 | 0.445 | 0.645 |" in page(asked, lines), "a client's mean over seeds, by arm"
    shown = ElementTree.fromstring(picture(asked, lines))
    assert len(shown.findall("{http://www.w3.org/2000/svg}circle")) == 2


def test_a_line_that_was_cut_off_is_no_run_and_goes_with_the_next(tmp_path: Path) -> None:
    job = Wanted(TOY, "tiny").next_jobs([])[0]
    lines, path = lines_of(job, [0.1, 0.2]), tmp_path / "toy.jsonl"
    resumable.append(path, lines)
    assert found.read(path) == lines
    path.write_text(path.read_text()[:-20])
    assert found.read(path) == [], "one of two clients is no run"
    resumable.append(path, lines)
    assert found.read(path)[-2:] == lines
    assert [json.loads(line)["client"] for line in path.read_text().splitlines()][-2:] == ["client-0", "client-1"]


def test_the_wire_is_measured_with_the_settings_that_the_search_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Wanted(TOY, "tiny", dials=("here",))
    with pytest.raises(SystemExit, match="the search for 'm' is not over"):
        wire.jobs_of(asked, [])
    lines, _ = played(asked, {"m": 0.5, "c": 0.9, "all": 0.7})
    jobs = wire.jobs_of(asked, lines)
    assert [(job.arm.name, job.seed, job.split) for job in jobs] == [(n, 0, "test") for n in ("m", "c", "all")]
    assert dict(jobs[0].setting) == {"learning-rate": 0.064}
    monkeypatch.setattr(wire, "FOUND", tmp_path / "wire.jsonl")
    sent = {"digest": jobs[0].digest, "seed": 0, "up": 2_000_000, "down": 3_500_000, "seconds": 61.2, "clients": 2}
    resumable.append(wire.FOUND, [sent, sent | {"digest": jobs[1].digest, "clients": 1}])
    text = wire.table(asked, jobs, lines)
    assert "| 2 | 2.00 | 3.50 | 61 |" in text
    assert "| 1 | 2.00 | 3.50 | 61 |" in text
    assert text.count("|  |  |  |  |") == 1, "the third has not been measured"


def test_all_clients_take_the_place_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "FOUND", tmp_path / "wire.jsonl")
    few, every = ({"digest": "d", "seed": 0, "clients": clients} for clients in (4, 12))
    resumable.append(wire.FOUND, [every, few])
    assert wire.best_lines() == {("d", 0): every}


def test_some_clients_cannot_stand_for_all_where_a_share_takes_part() -> None:
    asked = Wanted(EXPERIMENTS["tap"], "digits-multimodal", dials=("a quarter",))
    jobs = [asked.job(arm, "a quarter", 0, "test", {"learning-rate": 1e-3}) for arm in asked.chosen_arms]
    with pytest.raises(SystemExit, match="a share of the clients takes part in each round here"):
        wire.run_missing(asked, jobs, None, 4)


def test_two_arms_whose_searches_chose_the_same_share_a_run() -> None:
    twins = replace(TOY, arms=(*TOY.arms, replace(TOY.arms[1], name="twin")))
    asked = Wanted(twins, "tiny")
    lines, _ = played(asked, {"m": 0.5, "c": 0.9, "all": 0.7, "twin": 0.9})
    by_arm = of_dial(asked, lines, "here")
    assert by_arm["twin"] == by_arm["c"]
    assert len(by_arm["c"]) == 6, "three seeds of two clients"


def test_some_of_the_clients_are_spread_over_all() -> None:
    assert wire.spread((3, 5, 7, 9, 11, 13), 3) == (3, 7, 11)
    assert wire.spread((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), 5) == (0, 2, 4, 7, 9)
    assert wire.spread((0, 4), 9) == (0, 4)
    with pytest.raises(SystemExit, match="--clients = 0, expected at least 1"):
        wire.spread((0, 4), 0)


def test_what_a_merge_was_made_of_has_a_row_for_each_client_that_took_part() -> None:
    place = Place("s", (0, 10, 2), 12, "three", ("a", "b", "a"))
    head, *found = merges.rows({"relevance": {"client-10": [0.25, 0.75]}, "entropy": 0.5}, place)
    assert "0.5" in head
    assert [row.split() for row in found] == [["client-10", "b", "0.250", "0.750"]]
    shown = {"weight": 0.44, "a": 8.5e6, "b": 6.9e6}
    head, *found = merges.rows({"weights": {"client-2": shown}}, replace(place, groups=()))
    assert head.split() == ["weight", "searched", "federated", "local"]
    assert [row.split() for row in found] == [["client-2", "client-2", "0.44", "-", "8.5e+06", "6.9e+06"]]


def test_alike_clients_of_tap_are_of_one_site() -> None:
    place = EXPERIMENTS["tap"].bases["digits-tasks"].places["alike"]
    sites = {digits_multimodal.client_of(client, digits_tasks.CLIENTS)[1].language for client in place.clients}
    assert len(sites) == 1


def test_a_changed_setting_is_another_run() -> None:
    asked, changed = Wanted(TOY, "tiny"), Wanted(TOY, "tiny", more=(("batch-size", 3),))
    arm = TOY.arms[0]
    jobs = [one.job(arm, "here", 0, "test", {"learning-rate": 1e-3}) for one in (asked, changed)]
    assert jobs[0].digest != jobs[1].digest
    assert jobs[0].digest == asked.job(arm, "here", 1, "test", {"learning-rate": 1e-3}).digest


@pytest.mark.parametrize(
    "asked", [Wanted(e, base) for e in EXPERIMENTS.values() for base in e.bases], ids=lambda a: f"{a.method}-{a.base}"
)
def test_designs_have_scenarios_clients_and_run_config_that_there_are(asked: Wanted) -> None:
    names = {arm.name for arm in asked.chosen_arms}
    for dial, place in asked.design.places.items():
        assert place.scenario in (*NAMES, *FROM_FILES)
        assert max(place.clients) < place.of
        assert not place.groups or len(place.groups) == len(place.clients)
        assert not place.each or len(place.each) == len(place.clients)
        for arm in asked.chosen_arms:
            for setting in ({"learning-rate": 1e-3}, {"learning-rate": 1e-3, **arm.other}):
                job = asked.job(arm, dial, 0, "test", setting)
                config = dict(job.config) | {"run-name": f"{job.folder}-0"}
                read_run_options(config)
                strategy_from_run_config(config)
    for claim in asked.claims:
        assert {name.partition("/")[0] for name in (claim.arm, *claim.against)} <= names, claim.text


def test_committed_lines_are_whole_runs_of_experiments_that_there_are() -> None:
    for path in found.FOLDER.glob("*.jsonl"):
        text = [line for line in path.read_text().splitlines() if line]
        assert path.stem in EXPERIMENTS
        assert len(found.read(path)) == len(text)
        assert all(json.loads(line)["seed"] >= 100 for line in text if json.loads(line)["split"] == "validation")
