"""``fedalloy compare``: strategies over the same clients, data, base model, local work and seeds; a folder of results.

    OUT/runs/<strategy>-seed0-<digest>/   the folder of each run; a finished one is not run again
    OUT/comparison.json                   what all runs have in common; another comparison needs another folder
    OUT/results.csv                       client x seed x strategy x round
    OUT/table.md, OUT/report.html         the results

The digest names the run's configuration, so a changed setting is another run. The controls of
:mod:`strategies.algorithms.controls`, ``local`` and ``fedavg`` are always among the strategies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from client_app.scenarios import FROM_FILES, NAMES
from client_app.scenarios.files import SCENARIOS
from fedalloy_adapters.files.atomic_files import locked, write_durably
from fedalloy_adapters.wire.codec import Encoding
from server_app.run.federation import ALL_FOR_ONE, NoClientError
from server_app.run.options import read_run_options
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.local import LocalCluster, Settings
from server_app.tools.cluster.superlink import ClusterError, SuperLink
from server_app.tools.compare.html import ReportError, as_html
from server_app.tools.compare.processes import (
    Engine,
    Nodes,
    errors_once,
    in_process,
    one_by_one,
    require_worth,
    side_by_side,
)
from server_app.tools.compare.progress import HopelessError, Progress
from server_app.tools.compare.records import as_csv, read_run, remarks
from server_app.tools.compare.statistics import Comparison, as_markdown, comparison_of
from server_app.tools.demo import terminate_as_interrupt
from strategies import CONTROLS, STRATEGIES, strategy_from_run_config
from strategies.framework.options import OptionError, require_choice

REFERENCES = ("local", "fedavg")
EVERY = "all"
"""Means every strategy."""
OWN = {
    "strategy": "--strategies",
    "scenario": "the argument SCENARIO",
    "seed": "--seeds and --first-seed",
    "num-server-rounds": "--rounds",
    "min-clients": "--clients",
    "run-name": "--out",
    "runs-dir": "--out",
    "resume": "the same command again, which goes on where it stopped",
}
"""Run-config that a comparison sets, and the option or command that decides it."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison; ``place`` is where it is carried out, which decides which bytes are measured.

    ``nodes``: the user's own clients, by client id.
    """

    strategy: str
    seed: int
    config: Mapping[str, Any]
    place: str = "process"
    nodes: Nodes = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run's folder: strategy, seed, and a digest of all its settings."""
        told = [self.place, dict(self.config), *([self.nodes] if self.nodes else [])]
        text = json.dumps(told, sort_keys=True)
        return f"{self.strategy}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def compare(
    scenario: str,
    strategies: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    console: Console,
    *,
    clients: int = 4,
    rounds: int = 4,
    options: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    place: str = "process",
    workers: int = 1,
    nodes: Nodes | None = None,
    encodings: Sequence[str] = (),
    superlink: SuperLink | None = None,
) -> tuple[Comparison, dict[str, str]]:
    """Carry out the missing runs, and write the folder; returns the comparison, and by run name why runs failed.

    Finished runs of other strategies or seeds in the folder are compared, too.

    Options of one strategy (``fedmerge.models``) go to that strategy only; the others' runs do not change with them.
    ``place`` is ``"process"``, or ``"cluster"``: a SuperLink and SuperNodes that are started for this and stopped
    afterwards. ``workers`` is the number of runs side by side, each in its own process. ``nodes`` has each client's
    node-config by its id, with the place of its data; without it, ``clients`` share the scenario's data. The
    ``strategies`` also run with each of the ``encodings`` in both directions, as lines of their own (``fedavg-int4``).
    If a ``superlink`` is given, which already runs on this machine, it carries out the runs with its connected clients.

    Raises:
        OptionError: a strategy, scenario or key is unknown, a value is not valid, ``out`` cannot be written or has
            another comparison in it. Nothing has been run then.
    """
    nodes, options = nodes or {}, options or {}
    _check_place(seeds, place, workers, nodes, superlink)
    chosen, encoded = _chosen(strategies, encodings)
    clients = len(nodes) or clients
    _check_data(scenario, clients, options, nodes)
    jobs = list(jobs_of(chosen, seeds, scenario, clients, rounds, options, place, nodes, encoded))
    for config in (options, *(job.config for job in jobs)):  # checks options of strategies that do not run, too
        read_run_options(config)
    learns = {job.strategy: _learns_from(job.config) for job in jobs}
    runs = _folder(out, jobs[0])
    missing = [job for job in jobs if not is_finished(runs / job.name)]
    where = place if missing and engine is None and superlink is None else "process"
    with (
        _alone(out),
        _quiet(),
        _started(where, clients, nodes, runs, console) as started,
        Progress(console, jobs, missing, runs, clients * (rounds + 2 + (place != "process")), workers) as progress,
        suppress(HopelessError),
    ):
        if superlink is not None:
            engine = partial(on_cluster, superlink)
        configs = [{**job.config, "run-name": job.name} | _begun(runs / job.name) for job in missing]
        if engine is None and place == "process" and (count := min(workers, len(missing))) > 1:
            side_by_side(configs, clients, runs, progress, count, nodes)
        else:
            one_by_one(configs, clients, runs, progress, engine or started)
    title = f"{_data(scenario, options, nodes, superlink)}: {clients} clients, {rounds} rounds"
    return _write(out, jobs, chosen, learns, title, progress.failed, console), progress.failed


def _data(scenario: str, options: Mapping[str, Any], nodes: Nodes, superlink: SuperLink | None) -> str:
    """The name of the clients' data; connected clients have data of their own if a base model is set."""
    own = nodes or "data-path" in options or (superlink is not None and "base-model" in options)
    return "own data" if own else scenario


def _check_place(seeds: Sequence[int], place: str, workers: int, nodes: Nodes, superlink: SuperLink | None) -> None:
    if not seeds:
        raise OptionError("--seeds: no seed is left, expected at least one")
    if superlink is not None and nodes:
        raise OptionError("--connection with --clients-file: connected clients have their own node-config")
    if place != "process" and workers > 1:
        where = "--cluster" if place == "cluster" else "--connection"
        raise OptionError(f"--jobs = {workers} with {where}: a cluster has one SuperNode per client, expected 1")


def _chosen(strategies: Sequence[str], encodings: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """All strategies that run, each once, and the requested ones with each of the encodings."""
    if EVERY in strategies:
        strategies = [*strategies, *STRATEGIES]
    chosen = [name for name in dict.fromkeys([*REFERENCES, *strategies, *CONTROLS]) if name != EVERY]
    for name in chosen:
        require_choice("--strategies", name, STRATEGIES)
    for encoding in encodings:
        require_choice("--encodings", encoding, list(Encoding))
    asked = [name for name in dict.fromkeys(strategies) if name != EVERY]
    return chosen, [(name, encoding) for name in asked for encoding in encodings]


def _write(
    out: Path,
    jobs: Sequence[Job],
    chosen: Sequence[str],
    learns: Mapping[str, Sequence[str]],
    title: str,
    failed: Mapping[str, str],
    console: Console,
) -> Comparison:
    """Compare the folder's finished runs; write table, report and results, if there are any."""
    runs = out / "runs"
    finished = [read_run(job.strategy, job.seed, runs / job.name) for job in jobs if is_finished(runs / job.name)]
    earlier = _earlier(runs, jobs)
    finished += [read_run(strategy, seed, run) for (strategy, seed), run in earlier.items()]
    configs = {strategy: RunDirectory(run).config() for (strategy, _), run in earlier.items()}
    learns = {strategy: _learns_from(config) for strategy, config in configs.items()} | dict(learns)
    rows = [row for run in finished for row in run.rows]
    there = dict.fromkeys(row.strategy for row in rows)
    names = [name for name in dict.fromkeys((*chosen, *there)) if name in there]
    found = comparison_of(rows, names, REFERENCES, CONTROLS, learns)
    if not finished:
        return found
    title += f", seeds {', '.join(map(str, sorted({run.seed for run in finished})))}"
    write_durably(out / "results.csv", as_csv(rows).encode())
    write_durably(out / "table.md", as_markdown(found, title, remarks(finished, failed)).encode())
    try:
        write_durably(out / "report.html", as_html(found, finished, title, failed).encode())
    except ReportError as error:
        console.print(str(error), highlight=False, markup=False)
    return found


def jobs_of(
    strategies: Sequence[str],
    seeds: Sequence[int],
    scenario: str,
    clients: int,
    rounds: int,
    options: Mapping[str, Any],
    place: str = "process",
    nodes: Nodes | None = None,
    encoded: Sequence[tuple[str, str]] = (),
) -> Iterator[Job]:
    """Every run, seed by seed: an interrupted comparison has all strategies of the first seeds.

    ``encoded`` has pairs of strategy and encoding; each adds a run.
    """
    for seed in seeds:
        for strategy, encoding in (*((name, "") for name in strategies), *encoded):
            others = tuple(f"{name}." for name in STRATEGIES if name != strategy)
            config: dict[str, Any] = {key: value for key, value in options.items() if not key.startswith(others)}
            config |= {"strategy": strategy, "scenario": scenario, "seed": seed}
            config |= {"num-server-rounds": rounds, "min-clients": clients}
            config |= dict.fromkeys(("uplink-encoding", "downlink-encoding"), encoding) if encoding else {}
            yield Job(f"{strategy}-{encoding}" if encoding else strategy, seed, config, place, nodes or {})


def _check_data(scenario: str, clients: int, options: Mapping[str, Any], nodes: Nodes) -> None:
    """Check for faults that would otherwise show only when every client has failed, or not at all.

    Raises:
        OptionError: the comparison sets a key itself; there are no data, too few for the clients, or the same for all.
    """
    require_choice("SCENARIO", scenario, (*NAMES, *FROM_FILES))
    for key, instead in OWN.items():
        if key in options:
            raise OptionError(f"--set {key}: a comparison sets it; expected {instead}")
    root = options.get("data-root")
    if nodes or "data-path" in options:
        if not nodes and not options.get("partitioner"):
            raise OptionError(
                "--set data-path: every client would have the same examples; expected a partitioner, too "
                "(partitioner='dirichlet'), or --clients-file with a data-path for each client"
            )
    elif scenario in FROM_FILES:
        if not root or not Path(root).is_dir():
            raise OptionError(
                f"scenario {scenario!r} reads its data from a folder: --data = {root}, expected that folder"
            )
        if clients > (most := SCENARIOS[scenario].clients):
            raise OptionError(f"--clients = {clients}: scenario {scenario!r} has data for at most {most}")
    elif root is not None:
        raise OptionError(
            f"--data = {root}: scenario {scenario!r} reads no folder, expected one of {', '.join(FROM_FILES)}; "
            "your own data are read by --clients-file"
        )


def _learns_from(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that decide a client's model; validation is one if clients get the model that is best for them."""
    found = strategy_from_run_config(config).learns_from
    chooses = config.get("deliver-choice") == "validation"
    return (*found, "validation") if chooses and "validation" not in found else found


def _earlier(runs: Path, jobs: Sequence[Job]) -> dict[tuple[str, int], Path]:
    """Finished runs of strategies and seeds that are not among the jobs; the newest of several."""
    asked, found = {(job.strategy, job.seed) for job in jobs}, {}
    for summary in sorted(runs.glob("*/summary.json"), key=lambda path: path.stat().st_mtime):
        named = re.fullmatch(r"(.+)-seed(\d+)-[0-9a-f]{8}", summary.parent.name)
        if named and (key := (named[1], int(named[2]))) not in asked:
            found[key] = summary.parent
    return found


def is_finished(run: Path) -> bool:
    """Whether a run has its summary, which is written last."""
    return (run / "summary.json").exists()


def on_cluster(
    cluster: SuperLink, config: Mapping[str, Any], clients: int, runs: Path, answered: Callable[[], None]
) -> None:
    """The engine with real Flower processes, which measures every byte on the wire.

    Raises:
        ClusterError: the run did not end well; its last records are in its folder.
        NoClientError: all clients failed for the same reason, for which other runs would fail, too.
    """
    require_worth(config, runs)
    directory, seen = RunDirectory(runs / str(config["run-name"])), [0]

    def look() -> None:
        answers = sum(len(record["clients"]) for record in directory.rounds())
        for _ in range(answers - seen[0]):
            answered()
        seen[0] = max(seen[0], answers)

    outcome = cluster.run({**config, "runs-dir": str(runs.resolve())}, look)
    if not outcome.completed or not is_finished(directory.path):
        said = outcome.why(directory.path)
        raise (NoClientError if ALL_FOR_ONE in said else ClusterError)(said)


def _begun(run: Path) -> dict[str, Any]:
    """Run-config that continues an interrupted run after its last complete round; empty if there is none."""
    if RunDirectory(run).newest_checkpoint() is not None:
        return {"resume": str(run.resolve())}
    shutil.rmtree(run, ignore_errors=True)
    return {}


def _folder(out: Path, job: Job) -> Path:
    """Make ``out/runs``, and note what all runs have in common; a folder of other runs is refused."""
    own = tuple(f"{name}." for name in STRATEGIES)
    common = {key: value for key, value in job.config.items() if not key.startswith(own)}
    common = {key: common[key] for key in sorted(common) if key not in ("strategy", "seed")} | {"place": job.place}
    common |= {"clients": job.nodes} if job.nodes else {}
    remembered = out / "comparison.json"
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        if not remembered.exists():
            write_durably(remembered, (json.dumps(common, indent=2) + "\n").encode())
        before = json.loads(remembered.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"--out {out} cannot be used: {error}") from None
    for key in sorted({*before, *common}):
        if before.get(key) != common.get(key):
            raise OptionError(
                f"--out {out} has a comparison with {_said(key, before)}, this one has {_said(key, common)}; "
                "expected the same, or another folder"
            )
    return out / "runs"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lock the folder until this process ends: two comparisons would remove each other's unfinished runs."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(out / ".lock", wait=False))
        except BlockingIOError:
            raise OptionError(f"--out {out}: another comparison is running there, expected none") from None
        yield


def _said(key: str, config: Mapping[str, Any]) -> str:
    return f"{key} = {config[key]!r}" if key in config else f"the default of {key}"


@contextmanager
def _started(place: str, clients: int, nodes: Nodes, runs: Path, console: Console) -> Iterator[Engine]:
    if place == "process":
        yield partial(in_process, nodes=nodes)
        return
    names = tuple(nodes) or tuple(f"client-{index}" for index in range(clients))
    console.print(f"Starting a SuperLink and {clients} SuperNodes (TLS, one registered key each)...")
    with (
        terminate_as_interrupt(),
        tempfile.TemporaryDirectory(prefix="fedalloy-compare-") as folder,
        LocalCluster(Path(folder) / "cluster", Settings(names, runs.resolve(), node_config=nodes)) as cluster,
    ):
        yield partial(on_cluster, cluster)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Flower's log, which would break the progress bars; each run's rounds.jsonl has what clients did."""
    logger = logging.getLogger("flwr")
    before, once = logger.level, errors_once(logger)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeFilter(once)
