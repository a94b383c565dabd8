"""``fedalloy compare``: which runs are made, kept and repeated, and what its folder holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from proto.fedalloy.v1 import report_pb2
from server_app.run.federation import NoClientError
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.superlink import ClusterError, RunOutcome, SuperLink
from server_app.tools.compare import command as module
from server_app.tools.compare.command import compare, in_process, jobs_of, on_cluster
from server_app.tools.compare.processes import NotWorthError, require_worth
from server_app.tools.compare.records import FinishedRun
from server_app.tools.compare.statistics import Observation
from strategies import STRATEGIES
from strategies.framework.options import OptionError
from tests.strategies.conftest import layout_of


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without controls: they are runs like any other, and cost as much."""
    monkeypatch.setattr(module, "CONTROLS", ())


class Refusing:
    """An engine that runs nothing; ``asked`` lists the strategies that it should have run."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
        self.asked.append(str(config["strategy"]))
        raise RuntimeError("not now")


def console(path: Path) -> Console:
    return Console(file=path.open("a"), width=200)


def test_runs_are_named_by_what_they_are_told() -> None:
    options = {"fedmerge.models": 2, "local-steps": 3}
    first = {job.name for job in jobs_of(["local", "fedmerge"], [0, 1], "digits", 3, 2, options)}
    assert len(first) == 4
    changed = options | {"fedmerge.models": 3}
    more_models = {job.name for job in jobs_of(["local", "fedmerge"], [0, 1], "digits", 3, 2, changed)}
    assert {name.split("-")[0] for name in first & more_models} == {"local"}
    assert not first & {job.name for job in jobs_of(["local", "fedmerge"], [0, 1], "digits", 3, 3, options)}
    on_wire = {job.name for job in jobs_of(["local", "fedmerge"], [0, 1], "digits", 3, 2, options, "cluster")}
    assert not first & on_wire  # what was measured differs
    (job,) = jobs_of(["local"], [7], "digits", 3, 2, options)
    assert job.config == {
        "strategy": "local",
        "scenario": "digits",
        "seed": 7,
        "num-server-rounds": 2,
        "min-clients": 3,
        "local-steps": 3,
    }


def test_encodings_are_runs_of_their_own() -> None:
    plain, encoded = jobs_of(["fedmerge"], [7], "digits", 3, 2, {"fedmerge.models": 2}, encoded=[("fedmerge", "int4")])
    assert (plain.strategy, encoded.strategy) == ("fedmerge", "fedmerge-int4")
    assert encoded.name.startswith("fedmerge-int4-seed7-")
    assert dict(encoded.config) == {**plain.config, "uplink-encoding": "int4", "downlink-encoding": "int4"}


@pytest.mark.long
def test_a_comparison_end_to_end_and_once_more(tmp_path: Path, base_cache: Path, alone: None) -> None:
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / ".cache").symlink_to(base_cache)
    made: list[str] = []

    def engine(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
        made.append(str(config["run-name"]))
        in_process(config, clients, runs, answered)

    def again(strategies: list[str], **options: Any) -> tuple[Any, dict[str, str]]:
        small = {"local-steps": 1, **options}
        return compare(
            "digits",
            strategies,
            [5],
            out,
            console(tmp_path / "said"),
            clients=2,
            rounds=2,
            options=small,
            engine=engine,
        )

    found, failed = again([])
    assert not failed
    assert [name.split("-")[0] for name in made] == ["local", "fedavg"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 4  # strategies, clients; registration, two rounds and the delivery
    final = {(row["strategy"], row["client"]): row for row in rows if row["phase"] == "deliver"}
    for run in made:
        summary = json.loads((out / "runs" / run / "summary.json").read_text())
        for direction, levels in summary["bytes"].items():  # every byte of the run is in some row
            own = [int(row[f"{direction}_message_bytes"]) for row in rows if row["strategy"] == summary["strategy"]]
            assert sum(own) == levels["message"]
        for client, metrics in summary["clients"].items():
            assert float(final[summary["strategy"], client]["accuracy"]) == metrics["accuracy"]
    assert int(final["fedavg", "client-0"]["down_tensor_bytes"]) > 0
    assert final["fedavg", "client-0"]["down_wire_bytes"] == ""  # there is no wire
    assert "| fedavg (reference) |" in (out / "table.md").read_text()
    line = next(line for line in found.lines if line.strategy == "fedavg")
    assert line.scores == {(5, c): float(final["fedavg", c]["accuracy"]) for c in ("client-0", "client-1")}

    side = tmp_path / "side"
    (side / "runs").mkdir(parents=True)
    (side / "runs" / ".cache").symlink_to(base_cache)
    said = console(tmp_path / "said")
    same, failed = compare("digits", [], [5], side, said, clients=2, rounds=2, options={"local-steps": 1}, workers=2)
    assert not failed
    assert [line.scores for line in same.lines] == [line.scores for line in found.lines]

    before, table = list(made), (out / "table.md").read_bytes()
    again([])
    assert made == before  # nothing was run twice
    assert (out / "table.md").read_bytes() == table
    (out / "runs" / made[0] / "summary.json").unlink()  # as a kill leaves it
    rounds = [record["phase"] for record in RunDirectory(out / "runs" / made[0]).rounds()]
    again([])
    assert made == [*before, before[0]]
    continued = RunDirectory(out / "runs" / made[0]).rounds()
    assert [record["phase"] for record in continued].count("train") == rounds.count("train") == 2
    assert "resumed" in [record["phase"] for record in continued]  # and only what was missing was done again
    assert (
        "Interrupted and resumed, so that some bytes were sent twice: local (seed 5)" in (out / "table.md").read_text()
    )
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len({(r["strategy"], r["client"], r["round"], r["phase"]) for r in rows}) == len(rows)
    written = json.loads((out / "runs" / made[0] / "summary.json").read_text())["bytes"]
    own = [int(row["down_message_bytes"]) for row in rows if row["strategy"] == "local"]
    assert sum(own) == written["down"]["message"]
    assert "local, seed 5: kept" in (tmp_path / "said").read_text()


def test_schedules_patience_and_choice_work_in_a_comparison(tmp_path: Path, base_cache: Path, alone: None) -> None:
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "runs" / ".cache").symlink_to(base_cache)
    options = {"local-steps": 1, "learning-rate": 1e-9, "schedule": "cosine", "schedule-over": "run"}
    options |= {"deliver-choice": "validation", "patience": 1}
    said = console(tmp_path / "said")
    found, failed = compare("digits", [], [5], tmp_path / "out", said, clients=2, rounds=4, options=options)
    assert not failed
    assert all(line.learns_from == ("train", "validation") for line in found.lines)
    for path in (tmp_path / "out" / "runs").glob("*/summary.json"):
        run = RunDirectory(path.parent)
        assert set(json.loads(path.read_text())["given"]) == {"client-0", "client-1"}
        assert sum(record["phase"] == "train" for record in run.rounds()) < 4  # nobody improves at this rate


def finished(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
    """An engine whose runs end well at once."""
    folder = RunDirectory.create(runs, str(config["run-name"]), "")
    good = {"status": "ok", "seconds": 1.0, "metrics": {"personal": {"accuracy": 0.5, "loss": 1.0}}}
    folder.append_round({"phase": "deliver", "round": 3, "clients": {"ada": good}})
    folder.write_summary({})


def test_a_run_that_fails_is_named_and_the_others_are_compared(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
        if config["strategy"] == "ties":
            raise RuntimeError("out of luck")
        finished(config, clients, runs, answered)

    monkeypatch.setattr(module, "read_run", without_ledger)
    found, failed = compare("digits", ["ties"], [0], tmp_path, console(tmp_path / "said"), engine=engine)
    assert [line.strategy for line in found.lines] == ["local", "fedavg"]
    ((name, why),) = failed.items()
    assert name.startswith("ties-seed0-")
    assert why == "RuntimeError: out of luck"
    assert f"{name}: RuntimeError: out of luck" in (tmp_path / "report.html").read_text()
    assert f"* Failed: {name}: RuntimeError: out of luck" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize("first", [True, False])
def test_where_every_client_fails_for_one_reason_the_first_run_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    asked: list[str] = []

    def engine(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
        asked.append(str(config["strategy"]))
        if first or len(asked) > 1:  # not a common cause, because it succeeded once
            raise NoClientError("none of 4 clients can take part, all for one reason: no such model")
        finished(config, clients, runs, answered)

    monkeypatch.setattr(module, "read_run", without_ledger)
    _, failed = compare("digits", [], [0, 1], tmp_path, console(tmp_path / "said"), engine=engine)
    said = (tmp_path / "said").read_text()
    assert said.startswith("12 runs: 6 strategies, 2 seeds\n")
    assert len(asked) == (1 if first else 12)
    assert ("The other 11 runs are not tried" in said) == first
    assert said.count("no such model") == 1
    assert set(failed.values()) == {"none of 4 clients can take part, all for one reason: no such model"}


def test_a_head_that_is_not_there_is_not_fitted_again(tmp_path: Path) -> None:
    config = {"strategy": "fedavg-head"}
    require_worth(config, tmp_path)
    for name, head in (("with", 3), ("without", 0)):
        folder = tmp_path / name / "registrations"
        folder.mkdir(parents=True)
        said = report_pb2.Registration(client_id="ada", layout=layout_of(head=head).to_proto())
        (folder / "ada.pb").write_bytes(said.SerializeToString())
        if head:
            require_worth(config, tmp_path)
    require_worth({"strategy": "fedavg"}, tmp_path)
    with pytest.raises(NotWorthError, match="it would equal fedavg"):
        require_worth(config, tmp_path)


def without_ledger(strategy: str, seed: int, run: Path) -> FinishedRun:
    (record,) = rounds = RunDirectory(run).rounds()
    rows = [
        Observation(strategy, seed, client, 3, "deliver", "ok", answer["metrics"]["personal"], 1.0, 0.0)
        for client, answer in record["clients"].items()
    ]
    return FinishedRun(strategy, seed, rows, rounds, {"up": {}, "down": {}}, None)


def test_an_unknown_strategy_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'dito' \(did you mean 'ditto'\?\)"):
        compare("digits", ["dito"], [0], tmp_path / "out", console(tmp_path / "said"))
    for options, finding in (({"local-step": 3}, "did you mean 'local-steps'"), ({"ditto.pull": -1.0}, "pull = -1.0")):
        with pytest.raises(OptionError, match=finding):
            compare("digits", ["ditto"], [0], tmp_path / "out", console(tmp_path / "said"), options=options)
    with pytest.raises(OptionError, match="--encodings = 'int5'"):
        compare("digits", ["ditto"], [0], tmp_path / "out", console(tmp_path / "said"), encodings=["int5"])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = console(tmp_path / "said")
    with pytest.raises(OptionError, match=r"--out .*/file/out cannot be used: .*Not a directory"):
        compare("digits", [], [0], tmp_path / "file" / "out", said)
    with pytest.raises(OptionError, match=r"SCENARIO = 'digit' \(did you mean 'digits'\?\)"):
        compare("digit", [], [0], tmp_path / "out", said)
    with pytest.raises(OptionError, match="--seeds"):
        compare("digits", [], [], tmp_path / "out", said)
    with pytest.raises(OptionError, match="--jobs = 2 with --cluster"):
        compare("digits", [], [0], tmp_path / "out", said, place="cluster", workers=2)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path, alone: None) -> None:
    engine = Refusing()

    def again(strategies: list[str], rounds: int, **options: Any) -> None:
        compare(
            "digits",
            strategies,
            [0],
            tmp_path,
            console(tmp_path / "said"),
            rounds=rounds,
            engine=engine,
            options=options,
        )

    again([], 2)
    again(["ditto"], 2, **{"ditto.pull": 0.5})  # more strategies, and their options, are the same comparison
    with pytest.raises(OptionError, match="num-server-rounds = 2, this one has num-server-rounds = 3"):
        again([], 3)
    with pytest.raises(OptionError, match="the default of local-steps, this one has local-steps = 5"):
        again([], 2, **{"local-steps": 5})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scenario": "text-8"}, "scenario 'text-8' reads its data from a folder: --data = None"),
        ({"scenario": "text-8", "options": {"data-root": "/nowhere"}}, "--data = /nowhere, expected that folder"),
        ({"scenario": "text-8", "options": {"data-root": "."}, "clients": 9}, "--clients = 9: .* data for at most 8"),
        ({"options": {"data-root": "."}}, "--data = .: scenario 'digits' reads no folder"),
        ({"options": {"data-path": "a.jsonl"}}, "every client would have the same examples; expected a partitioner"),
        ({"options": {"seed": 3}}, "--set seed: a comparison sets it; expected --seeds and --first-seed"),
    ],
)
def test_what_no_client_could_train_on_is_refused_before_anything_runs(
    arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=said):
        compare(**{"scenario": "digits"} | arguments, strategies=[], seeds=[0], out=tmp_path / "out", console=Console())
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_folder_already_stays_in_the_comparison(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_run", without_ledger)
    said = console(tmp_path / "said")
    compare("digits", ["ditto"], [0, 1], tmp_path, said, engine=finished, options={"ditto.pull": 0.1})
    found, _ = compare("digits", ["fedrep"], [0], tmp_path, said, engine=finished)
    scored = {line.strategy: {seed for seed, _ in line.scores} for line in found.lines}
    assert scored == {"local": {0, 1}, "fedavg": {0, 1}, "fedrep": {0}, "ditto": {0, 1}}
    assert (tmp_path / "table.md").read_text().startswith("# digits: 4 clients, 4 rounds, seeds 0, 1\n")
    assert "fedrep (1 of 2 seeds)" in (tmp_path / "table.md").read_text()


def test_clients_of_ones_own_are_compared(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Any]] = []

    def carried_out(config: Any, clients: int, runs: Path, answered: Callable[[], None], nodes: Any = None) -> None:
        asked.append((clients, nodes))
        raise RuntimeError("out of luck")

    monkeypatch.setattr(module, "in_process", carried_out)
    nodes = {"rome": {"data-path": "rome.jsonl"}, "oslo": {"data-path": "oslo.jsonl"}, "bern": {"data-path": "b.jsonl"}}
    found, failed = compare("digits", [], [0], tmp_path, console(tmp_path / "said"), nodes=nodes)
    assert asked == [(3, nodes)] * 2
    assert set(failed.values()) == {"RuntimeError: out of luck"}
    assert not found.lines
    assert not (tmp_path / "table.md").exists()  # of nothing
    with pytest.raises(OptionError, match="has a comparison with clients = "):
        compare("digits", [], [0], tmp_path, console(tmp_path / "said"), clients=3)


def test_two_comparisons_do_not_work_in_one_folder(tmp_path: Path, alone: None) -> None:
    def engine(config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]) -> None:
        with pytest.raises(OptionError, match="another comparison is running there"):
            compare("digits", [], [0], tmp_path, console(tmp_path / "said"), engine=engine)
        raise RuntimeError("refused, as expected")

    _, failed = compare("digits", [], [0], tmp_path, console(tmp_path / "said"), engine=engine)
    assert set(failed.values()) == {"RuntimeError: refused, as expected"}


def test_all_is_every_strategy(tmp_path: Path) -> None:
    engine = Refusing()
    compare("digits", ["all"], [0], tmp_path, console(tmp_path / "said"), engine=engine)
    assert sorted(engine.asked) == sorted(STRATEGIES)


def test_controls_are_always_there(tmp_path: Path) -> None:
    engine = Refusing()
    found, failed = compare("digits", ["ditto", "local"], [0], tmp_path, console(tmp_path / "said"), engine=engine)
    assert engine.asked == ["local", "fedavg", "ditto", "fedavg-head", "fedavg-tuned", "local-all", "local-twice"]
    assert len(failed) == 7
    assert not found.lines


@pytest.mark.parametrize("all_fail", [False, True])
def test_a_run_that_fails_on_a_federation_says_its_own_reason(all_fail: bool, tmp_path: Path) -> None:
    """Its log is Flower's: a traceback, and the words of the error in it."""
    words = "none of 2 clients can take part, all for one reason: x" if all_fail else "seed = -1"
    log = tmp_path / "run.log"
    log.write_text(f"ServerApp raised an exception\nTraceback (most recent call last):\nserver_app.x.Y: {words}\n")

    class Failed(SuperLink):
        def run(self, *_: object, **__: object) -> RunOutcome:
            return RunOutcome("1", "finished:failed", log)

    with pytest.raises(NoClientError if all_fail else ClusterError, match=f"^{words}$"):
        on_cluster(Failed("x", tmp_path), {"run-name": "r", "strategy": "fedavg"}, 2, tmp_path, lambda: None)
