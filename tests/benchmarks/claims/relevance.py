"""Whom FedMosaic takes for alike in its experiment: the weights of peers in the last round of one run.

    python -m tests.benchmarks.claims.relevance --base minilm --dial pairs --data DATA    # a minute for a temperature

The setting is the one that the search has chosen, but for the temperature. An oracle would give a client's whole weight
to the clients of its group.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from client_app.plan.training import set_up_torch
from server_app.run.run_directory import RunDirectory
from strategies.framework import round_record
from tests.benchmarks.claims import found
from tests.benchmarks.claims.experiments import EXPERIMENTS
from tests.benchmarks.claims.jobs import Job, Wanted
from tests.benchmarks.claims.runs import config_of, run_of

SEED = 0
TEMPERATURES = (0.5, 0.1)


def job_of(asked: Wanted, temperature: float) -> Job:
    """The experiment's first test run with another temperature.

    Raises:
        SystemExit: the search is not over.
    """
    arm = asked.experiment.arm(asked.method)
    setting = asked.found_setting(arm, found.read(found.FOLDER / f"{asked.experiment.name}.jsonl"))
    return asked.job(arm, asked.chosen_dials[0], SEED, "test", {**setting, f"{arm.strategy}.temperature": temperature})


def settled(directory: RunDirectory) -> dict[str, Any]:
    """What the strategy recorded in its last round of training."""
    last = [record for record in directory.rounds() if record["phase"] == "train"][-1]
    return dict(last["settled"])


def main() -> None:
    """Run, and print a row for each client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="minilm", help="A design's name.")
    parser.add_argument("--dial", default="pairs")
    parser.add_argument("--data", type=Path, required=True, help="Folder of the scenarios on real data.")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedalloy-base-cache")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    asked = Wanted(EXPERIMENTS["fedmosaic"], given.base, dials=(given.dial,))
    for temperature in given.temperatures:
        job = job_of(asked, temperature)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / ".cache").symlink_to(given.cache.resolve())
            config = config_of(job, given.data.resolve(), "", job.place.clients)
            config |= {"run-name": "run", "runs-dir": name}
            record = settled(run_of(job, folder, config, job.place.clients))
        print(f"temperature {temperature}, relative entropy {record[round_record.ENTROPY]}")
        for group, (client, row) in zip(job.place.groups, record[round_record.RELEVANCE].items(), strict=True):
            print(f"  {client:10} {group:10} " + " ".join(f"{weight:6.3f}" for weight in row), flush=True)


if __name__ == "__main__":
    main()
