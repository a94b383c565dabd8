"""One round over many real SuperNodes on one machine.

    python -m tests.benchmarks.many_supernodes [COUNT] [STRATEGY]

A SuperLink and COUNT (16) SuperNodes as processes, TLS and a registered key each, the bundled digits and their base
model; no resident trainers. Prints each one's answer, and peak resident memory (proportional set size if the kernel
reports it) of the SuperLink, of the ServerApp, and of everything together: unlike in real life, SuperNodes and their
ClientApps are on this machine, too.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.local import LocalCluster, Settings
from server_app.tools.demo import terminate_as_interrupt
from tests.in_process import EXACT

MIB = 2**20


def memory(process: psutil.Process) -> int:
    """Proportional set size in bytes; 0 for a process that has ended meanwhile."""
    with contextlib.suppress(psutil.Error, AttributeError):
        return int(process.memory_full_info().pss)
    return 0


class Peaks:
    """The most that was seen, by kind of process."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.peaks: Counter[str] = Counter()
        self.looked = 0.0

    def look(self) -> None:
        if time.monotonic() - self.looked < 2:
            return
        seen: Counter[str] = Counter()
        for process in self.cluster.processes:
            root = process.find()
            if root is None:
                continue
            family = [root]
            with contextlib.suppress(psutil.Error):
                family += root.children(recursive=True)
            for member in family:
                used = memory(member)
                seen["everything"] += used
                if process.name == "superlink":
                    words = ""
                    with contextlib.suppress(psutil.Error):
                        words = " ".join(member.cmdline())
                    seen["ServerApp" if "flwr-serverapp" in words else "SuperLink"] += used
        self.peaks |= seen
        self.looked = time.monotonic()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    strategy = sys.argv[2] if len(sys.argv) > 2 else "fedavg"
    names = tuple(f"client-{number:02d}" for number in range(count))
    with terminate_as_interrupt(), tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        settings = Settings(names, runs, startup_timeout=600.0)
        with LocalCluster(Path(folder) / "cluster", settings, print) as cluster:
            peaks = Peaks(cluster)
            started = time.monotonic()
            outcome = cluster.run(
                {
                    **EXACT,
                    "strategy": strategy, "num-server-rounds": 1, "local-steps": 2, "batch-size": 4,
                    "min-clients": count, "run-name": "many", "runs-dir": str(runs), "trainer.resident": False,
                    "startup-timeout": 900.0, "round-timeout": 900.0,
                },
                peaks.look,
            )  # fmt: skip
            seconds = time.monotonic() - started
        for record in RunDirectory(runs / "many").rounds():
            found = Counter(client["status"] for client in record["clients"].values())
            print(f"{record['phase']:10}{record['seconds']:8.1f} s  {dict(found)}")
        answered = {name: round(size / MIB) for name, size in peaks.peaks.items()}
        print(json.dumps({"clients": count, "status": outcome.status, "seconds": round(seconds), "peak_mib": answered}))


if __name__ == "__main__":
    main()
