"""What a client's model was merged of, in one run of an experiment: as the round's record has it.

    python -m tests.benchmarks.claims.merges fedmosaic --dial pairs --data DATA
    python -m tests.benchmarks.claims.merges fedmosaic --dial pairs --data DATA --set fedmosaic.temperature=0.1
    python -m tests.benchmarks.claims.merges potara --dial longer --data DATA    # one or two minutes each

FedMosaic: the weights of peers in the last round; an oracle would give a client's whole weight to the clients of its
group. Potara: the federated end's weight, the weight that a search on labels finds, and both ends' variances, which are
sums of inverse information: the closed form trusts the end with the smaller one. The setting is the one that the
experiment's search has chosen, the seed the first one that is tested.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client_app.plan.training import set_up_torch
from server_app.run.run_directory import RunDirectory
from server_app.tools.commands.arguments import parse_run_config
from strategies.framework import round_record
from tests.benchmarks.claims import found
from tests.benchmarks.claims.designs import Place
from tests.benchmarks.claims.experiments import EXPERIMENTS
from tests.benchmarks.claims.jobs import Job, Wanted
from tests.benchmarks.claims.runs import config_of, run_of

SEED = 0
METHODS = ("fedmosaic", "potara")
POTARA = {"weight": "weight", "searched": "searched", "federated": "a", "local": "b"}
"""Columns, and where they are in the record: the last two are the ends' variances."""


def job_of(asked: Wanted, more: Mapping[str, Any]) -> Job:
    """The experiment's first test run, with some settings replaced.

    Raises:
        SystemExit: the search is not over.
    """
    arm = asked.experiment.arm(asked.method)
    setting = asked.found_setting(arm, found.read(found.FOLDER / f"{asked.experiment.name}.jsonl"))
    return asked.job(arm, asked.chosen_dials[0], SEED, "test", {**setting, **more})


def settled(directory: RunDirectory) -> dict[str, Any]:
    """What the strategy recorded in its last round of training."""
    last = [record for record in directory.rounds() if record["phase"] == "train"][-1]
    return dict(last["settled"])


def rows(record: Mapping[str, Any], place: Place) -> Iterator[str]:
    """A heading and a row for each client."""
    names = [f"client-{number}" for number in place.clients]
    groups = dict(zip(names, place.groups or names, strict=True))
    if round_record.RELEVANCE in record:
        yield f"relative entropy {record[round_record.ENTROPY]}"
        for client, weights in record[round_record.RELEVANCE].items():
            yield f"  {client:10} {groups[client]:10} " + " ".join(f"{weight:6.3f}" for weight in weights)
        return
    yield f"  {'':10} {'':10} " + " ".join(f"{name:>10}" for name in POTARA)
    for client, shown in record[round_record.WEIGHTS].items():
        numbers = " ".join(f"{shown[key]:10.4g}" if key in shown else f"{'-':>10}" for key in POTARA.values())
        yield f"  {client:10} {groups[client]:10} {numbers}"


def main() -> None:
    """Run, and print a row for each client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=METHODS)
    parser.add_argument("--base", default="minilm", help="A design's name.")
    parser.add_argument("--dial", required=True)
    parser.add_argument("--data", type=Path, required=True, help="Folder of the scenarios on real data.")
    parser.add_argument("--set", default="", help="Run-config that replaces the chosen setting, as for flwr run.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    asked = Wanted(EXPERIMENTS[given.experiment], given.base, dials=(given.dial,))
    job = job_of(asked, parse_run_config(given.set))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".cache").symlink_to(given.cache.resolve())
        config = config_of(job, given.data.resolve(), "", job.place.clients)
        config |= {"run-name": "run", "runs-dir": name}
        record = settled(run_of(job, folder, config, job.place.clients))
    print(dict(job.setting))
    for row in rows(record, job.place):
        print(row, flush=True)


if __name__ == "__main__":
    main()
