"""Bytes at the sockets of an experiment's strategies: a run of one seed again, on a cluster of real Flower processes.

    python -m tests.benchmarks.claims.wire fedmosaic --base minilm --dial pairs --data DATA    # runs what is missing
    python -m tests.benchmarks.claims.wire fedmosaic --base minilm --dial pairs --table        # runs nothing

The settings are those that the experiment's search has chosen, so that has to be over; scores in the table are the
experiment's, over all of its seeds. ``MB`` is what the kernel counted as TCP payload at the SuperLink, for all clients
together: TLS, gRPC, polls, heartbeats, the app bundle and registration are in it, and unlike in the experiment's own
tables, so is everything else that Flower sends. ``seconds`` are those of the whole run, on the machine that ran it. A
finished run is a line in ``found/claims-wire.jsonl``.

On two cores twelve SuperNodes that poll leave little for anything else: ``--clients 4`` runs four of an experiment's
clients, spread over its list. Where all take part in each round, what a client sends and is sent does not depend on how
many others there are; where a share of them does, all have to be there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.accuracy import resumable
from tests.benchmarks.claims import found
from tests.benchmarks.claims.experiments import EXPERIMENTS
from tests.benchmarks.claims.jobs import Job, Wanted
from tests.benchmarks.claims.tables import interval_of, mean_of, of_dial, scores

FOUND = Path(__file__).parents[1] / "found" / "claims-wire.jsonl"
SEED = 0


def jobs_of(asked: Wanted, lines: Sequence[found.Line]) -> list[Job]:
    """One run for each arm that is a strategy which users can run, with the setting that the search has chosen.

    Raises:
        SystemExit: a search is not over.
    """
    chosen = []
    for arm in asked.chosen_arms:
        if arm.oracle or arm.apart:
            continue
        chosen.append(asked.job(arm, asked.chosen_dials[0], SEED, "test", asked.found_setting(arm, lines)))
    return chosen


def spread(clients: Sequence[int], wanted: int) -> tuple[int, ...]:
    """As many of the clients as are wanted (all, if there are fewer), spread evenly over the list; the first is one.

    Raises:
        SystemExit: fewer than one is wanted.
    """
    if wanted < 1:
        raise SystemExit(f"--clients = {wanted}, expected at least 1")
    few = min(wanted, len(clients))
    return tuple(clients[number * len(clients) // few] for number in range(few))


def best_lines() -> dict[tuple[str, int], Mapping[str, Any]]:
    """Finished runs by digest and seed; of two, the one with more clients."""
    lines = sorted(resumable.read(FOUND), key=lambda line: int(line["clients"]))
    return {(line["digest"], line["seed"]): line for line in lines}


def run_missing(asked: Wanted, jobs: Sequence[Job], data: Path | None, wanted: int) -> None:
    """Run what is missing, one after the other, on one cluster with a SuperNode for each of the wanted clients."""
    from server_app.tools.cluster.local import LocalCluster, Settings
    from server_app.tools.compare.command import on_cluster
    from server_app.tools.compare.records import read_run
    from server_app.tools.demo import terminate_as_interrupt
    from tests.benchmarks.claims.runs import config_of

    if not jobs:
        return
    place = jobs[0].place
    members = spread(place.clients, wanted)
    if len(members) < len(place.clients) and any("fraction-clients" in dict(job.config) for job in jobs):
        raise SystemExit("--clients: a share of the clients takes part in each round here, so all of them are needed")
    there = {key for key, line in best_lines().items() if line["clients"] >= len(members)}
    waiting = list({job.key: job for job in jobs if job.key not in there}.values())
    if not waiting:
        return
    nodes = {f"client-{number}": {"partition-id": number, "num-partitions": place.of} for number in members}
    with terminate_as_interrupt(), tempfile.TemporaryDirectory(prefix="fedalloy-claims-") as name:
        runs = Path(name) / "runs"
        runs.mkdir()
        with LocalCluster(Path(name) / "cluster", Settings(tuple(nodes), runs, node_config=nodes)) as cluster:
            for job in waiting:
                config = config_of(job, data, asked.model, members) | {"run-name": job.folder}
                began = time.monotonic()
                on_cluster(cluster, config, len(nodes), runs, lambda: None)
                seconds = time.monotonic() - began
                rows = read_run(job.arm.strategy, job.seed, runs / job.folder).rows
                line: dict[str, Any] = {
                    way: sum(row.bytes.get(f"{way}_wire") or 0 for row in rows) for way in ("up", "down")
                }
                about = {"experiment": job.experiment, "base": job.base, "dial": job.dial, "arm": job.arm.name}
                run = {"clients": len(members), "digest": job.digest, "seed": job.seed, "seconds": round(seconds, 1)}
                resumable.append(FOUND, [about | line | run])
                print(f"{job.name}: {line}, {seconds:.0f} s", flush=True)


def table(asked: Wanted, jobs: Sequence[Job], lines: Sequence[found.Line]) -> str:
    """Markdown, the best loss first: scores from the experiment, costs from the cluster."""
    sent = best_lines()
    by_arm = of_dial(asked, lines, asked.chosen_dials[0])
    rows = ["| strategy | loss | accuracy | clients | MB up | MB down | seconds |", "|" + "---|" * 7]
    for job in sorted(jobs, key=lambda job: mean_of(scores(by_arm, job.arm.name, "loss"))):
        role = f" ({job.arm.role})" if job.arm.role else ""
        measured = [interval_of(scores(by_arm, job.arm.name, metric)) for metric in ("loss", "accuracy")]
        line = sent.get(job.key)
        costs = [""] * 4
        if line is not None:
            sent_mb = [f"{line[way] / 1e6:.2f}" for way in ("up", "down")]
            costs = [str(line["clients"]), *sent_mb, f"{line['seconds']:.0f}"]
        rows.append(f"| {' | '.join([f'`{job.arm.name}`{role}', *measured, *costs])} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--base", required=True, help="A design's name.")
    parser.add_argument("--dial", required=True)
    parser.add_argument("--arms", nargs="+", default=[])
    parser.add_argument("--data", type=Path, help="Folder of the scenarios on real data.")
    parser.add_argument("--clients", type=int, default=sys.maxsize, help="Only as many, instead of all.")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    given = parser.parse_args(arguments)
    asked = Wanted(EXPERIMENTS[given.experiment], given.base, dials=(given.dial,), arms=tuple(given.arms))
    lines = found.read(found.FOLDER / f"{given.experiment}.jsonl")
    jobs = jobs_of(asked, lines)
    if not given.table:
        run_missing(asked, jobs, given.data.resolve() if given.data else None, given.clients)
    print(table(asked, jobs, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
