"""How often a comparison's 95 % intervals cover the true mean, compared with a bootstrap that takes all scores as
independent.

    python -m tests.benchmarks.accuracy.interval_coverage          # half a minute

Scores are drawn as seed + client + rest, each normal, so that the true mean is 0.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from server_app.tools.compare.statistics import Scores, interval

Shares = tuple[float, float, float]
"""Variances between seeds, between clients, and of the rest."""
CASES: dict[str, Shares] = {
    "all independent": (0.0, 0.0, 1.0),
    "clients differ": (0.0, 1.0, 1.0),
    "clients differ, seeds a little": (0.1, 1.0, 1.0),
    "seeds differ a little": (0.3, 0.0, 1.0),
    "seeds differ": (1.0, 0.0, 1.0),
    "clients and seeds differ": (1.0, 1.0, 1.0),
}


def coverage(seeds: int, clients: int, shares: Shares, times: int) -> dict[str, float]:
    """The share of ``times`` draws whose interval has the true mean in it, for both ways to resample."""
    generator, found = np.random.default_rng(1), {"two ways": 0, "as if independent": 0}
    between_seeds, between_clients, rest = np.sqrt(shares)
    with mock.patch("server_app.tools.compare.statistics.RESAMPLES", 1000):
        for _ in range(times):
            drawn = between_seeds * generator.normal(size=(seeds, 1)) + between_clients * generator.normal(
                size=(1, clients)
            )
            drawn = drawn + rest * generator.normal(size=(seeds, clients))
            both: Scores = {(s, f"{c:03}"): drawn[s, c] for s in range(seeds) for c in range(clients)}
            alone: Scores = {(0, f"{index:03}"): value for index, value in enumerate(both.values())}
            for name, scores in (("two ways", both), ("as if independent", alone)):
                got = interval(scores)
                found[name] += got.low <= 0 <= got.high
    return {name: count / times for name, count in found.items()}


def main() -> None:
    """Print the table."""
    table = Table("scores", "seeds x clients", "two ways", "as if independent")
    for clients in (4, 8, 20):
        for name, shares in CASES.items():
            got = coverage(3, clients, shares, 600)
            table.add_row(name, f"3 x {clients}", *(f"{100 * value:.0f} %" for value in got.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
