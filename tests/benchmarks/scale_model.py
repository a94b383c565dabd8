"""Time, memory and bytes of a round with more clients than one machine can simulate: a model made of measurements.

    python -m tests.benchmarks.scale_model [--clients 10000 100000] [--fraction 0.01 0.1] [--bytes 1048576]

Its assumptions are in :class:`Measured`, with the source of each number; the rest is arithmetic. A SuperLink is one
Python process: it has one core's worth of processor time, whatever the machine has. A sampled client costs it a fixed
number of calls, every client that is online one call each time it looks for messages, whether it is sampled or not.
A tree has SuperLinks below, each with a ServerApp that averages its own clients and is a client of the one above:
exact for weighted means, but no substitute if every client has its own merge.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """Seconds on one core of the machine that docs/results/scale.md names; ``thin_nodes`` measures them."""

    call_cpu: float = 0.006
    """Seconds of the SuperLink for one call: all that it used with 100 thin nodes (103 s), over its calls (17,000)."""
    app_cpu: float = 0.032
    """Seconds of the ServerApp for one message and its answer, 64 KiB each."""
    app_cpu_byte: float = 3e-9
    """Seconds of the ServerApp per further byte: digest, decoding, one pass of a merge at a third of memory speed."""
    pieces: int = 3
    """Flower's objects in a message whose adapters lie beside it; 6 where they are arrays (above 4 MiB)."""
    together: int = 4
    """Messages that are announced in one call where they are small, of 256 KiB and less; fewer up to 1 MiB."""
    poll: float = 3.0
    """Seconds between a stock SuperNode's looks for messages."""
    heartbeat: float = 21.0
    """Seconds between its heartbeats: 0.7 of Flower's 30."""
    app_memory: float = 356 * MIB
    """Memory of the ServerApp with 100 nodes; rows of the bank are in files beyond ``bank-memory-mb``."""
    client_memory: float = 55 * 1024.0
    """ServerApp's memory per client: registration, layout, records. ``server_memory``, fedavg, from 8 to 1,000."""
    network: float = 1.25e8
    """Bytes a second: 1 Gbit/s."""


@dataclass(frozen=True)
class Round:
    """One round: seconds of each part if it were the only one, and what it takes."""

    seconds: dict[str, float]
    memory: float
    disk: float
    bytes: float

    @property
    def bottleneck(self) -> str:
        """The slowest part."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def calls_of_a_client(size: int, measured: Measured) -> float:
    """Calls for a message and its answer: each is announced, pushed, found, pulled and confirmed."""
    together = max(1, min(measured.together, math.ceil(MIB / max(size, 1))))
    return 2 * (measured.pieces + 1 + measured.pieces + 1) + 1 + 1 / together


def load_of_looks(clients: int, measured: Measured) -> float:
    """Share of the SuperLink's one core that goes into looks and heartbeats of all that are online."""
    return clients * measured.call_cpu * (1 / measured.poll + 1 / measured.heartbeat)


def most_clients(measured: Measured) -> int:
    """The most clients that can be online at one SuperLink before their looks take all its time."""
    return math.floor(1 / load_of_looks(1, measured))


def round_of(clients: int, fraction: float, size: int, measured: Measured, rows_kept: bool) -> Round:
    """One SuperLink; ``rows_kept``: the strategy keeps every client's last upload."""
    asked = math.ceil(fraction * clients)
    left = 1 - load_of_looks(clients, measured)
    work = asked * calls_of_a_client(size, measured) * measured.call_cpu
    seconds = {
        "SuperLink": work / left if left > 0 else math.inf,
        "ServerApp": asked * (measured.app_cpu + 2 * size * measured.app_cpu_byte),
        "network": 2 * asked * size / measured.network,
    }
    memory = measured.app_memory + clients * measured.client_memory
    return Round(seconds, memory, (clients if rows_kept else asked) * float(size), 2.0 * asked * size)


def tree_of(clients: int, measured: Measured) -> list[int]:
    """SuperLinks at each level, from below to the one on top; none has more than half of what it could have."""
    most = most_clients(measured) / 2
    levels = [math.ceil(clients / most)]
    while levels[-1] > 1:
        levels.append(math.ceil(levels[-1] / most))
    return levels


def seconds_of_tree(clients: int, fraction: float, size: int, measured: Measured) -> float:
    """A round: each level waits for the one below; above the lowest everybody is asked."""
    total, below = 0.0, clients
    for level, links in enumerate(tree_of(clients, measured)):
        each = round_of(math.ceil(below / links), fraction if level == 0 else 1.0, size, measured, rows_kept=False)
        total, below = total + max(each.seconds.values()), links
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--bytes", type=int, default=MIB)
    parser.add_argument("--poll", type=float, default=Measured.poll, help="seconds between a client's looks")
    chosen = parser.parse_args()
    measured = Measured(poll=chosen.poll)
    print(f"looks of {most_clients(measured)} clients, every {measured.poll:g} s, take all of one SuperLink's time")
    print(f"{'clients':>8}{'asked':>8}{'looks':>7}{'SuperLink s':>12}{'ServerApp s':>12}{'network s':>10}{'app MiB':>9}"
          f"{'disk GiB':>9}  first{'':7}{'tree':>8}{'s':>6}")  # fmt: skip
    for clients in chosen.clients:
        for fraction in chosen.fraction:
            found = round_of(clients, fraction, chosen.bytes, measured, rows_kept=False)
            levels = tree_of(clients, measured)
            links = "+".join(map(str, levels))
            tree = seconds_of_tree(clients, fraction, chosen.bytes, measured)
            by_part = "".join(
                f"{found.seconds[name]:{width}.1f}"
                for name, width in (("SuperLink", 12), ("ServerApp", 12), ("network", 10))
            )
            print(
                f"{clients:8}{math.ceil(fraction * clients):8}{load_of_looks(clients, measured):7.2f}{by_part}"
                f"{found.memory / MIB:9.0f}{found.disk / 2**30:9.2f}  {found.bottleneck:12}{links:>8}{tree:6.1f}"
            )


if __name__ == "__main__":
    main()
