"""How fast linear merges are, as shares of what the machine can do in the same minute.

    python -m tests.benchmarks.merge_speed [--quick] [--json FILE]

``W [d, N] @ Theta [N, P]`` over the rows of a bank (:mod:`fedalloy_adapters.bank`), into memory that is there:

    copy      bytes of Theta that are read in a second, over the bytes that copying a large tensor reads and writes
    matmul    arithmetic in a second, over that of the best plain product of two square matrices (float32)
    plain     time of ``torch.mm`` on a matrix ``[N, P]`` that is ready, over this time: above 1 is faster
    before    time of what merges did (stack the adapters, ``weights @ matrix``), over this time

A case is bound by memory where reading Theta and writing the result at the copy's speed takes longer than its
arithmetic at the best product's, and is judged by ``copy``; else by ``matmul``. Copy and product are measured around
every case, because the machine may be somebody else's, too; the best of several tries counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedalloy_adapters.bank.blocks import MemoryRow, combine

CASES = ((1, 16), (1, 256), (16, 16), (8, 256))
SIZES = (4_000_000, 20_000_000)
MOST_BYTES = 6 * 2**30
"""Of Theta: 256 adapters of 20 million numbers are 20 GB, more than the smallest machine that this runs on has."""
COPIED = 2**25


@dataclass(frozen=True)
class Measured:
    """One case; shares as in the module's docstring."""

    d: int
    n: int
    p: int
    seconds: float
    memory_bound: bool
    copy: float
    matmul: float
    plain: float
    before: float


def best(work: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest try, after one that does not count."""
    work()
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def copy_speed(tries: int) -> float:
    """Bytes read plus written in a second."""
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    return 2 * 4 * COPIED / best(lambda: target.copy_(source), tries)


def product_speed(tries: int) -> float:
    """Multiplications and additions in a second, of the best square product."""
    found = []
    for size in (1024, 2048):
        first, second, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        found.append(2 * size**3 / best(lambda a=first, b=second, o=out: torch.mm(a, b, out=o), tries))  # type: ignore[misc]
    return max(found)


def measure(d: int, n: int, p: int, tries: int) -> Measured:
    """One case, between two looks at the machine."""
    bandwidth, arithmetic = copy_speed(tries), product_speed(tries)
    matrix, weights, out = torch.randn(n, p), torch.randn(d, n), torch.empty(d, p)
    rows = [MemoryRow(row) for row in matrix]
    seconds = best(lambda: combine(rows, weights, out), tries)
    torch.testing.assert_close(out[:, :1000], weights @ matrix[:, :1000], rtol=1e-4, atol=1e-3)
    plain = best(lambda: torch.mm(weights, matrix, out=out), tries)
    before = best(lambda: weights @ torch.stack(list(matrix)), 2) if 8 * n * p <= MOST_BYTES else float("nan")
    bandwidth, arithmetic = max(bandwidth, copy_speed(tries)), max(arithmetic, product_speed(tries))
    flops, moved = 2 * d * n * p, 4 * (n + d) * p
    return Measured(
        d, n, p, seconds, moved / bandwidth > flops / arithmetic, 4 * n * p / seconds / bandwidth,
        flops / seconds / arithmetic, plain / seconds, before / seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the smaller size, fewer tries: under two minutes")
    parser.add_argument("--json", type=Path, help="where the shares go")
    chosen = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'d':>4}{'N':>6}{'P':>12}{'seconds':>10}{'bound by':>10}{'copy':>8}{'matmul':>8}{'plain':>8}{'before':>8}")
    found = []
    for p in SIZES[:1] if chosen.quick else SIZES:
        for d, n in CASES:
            if 4 * n * p > MOST_BYTES:
                print(f"{d:4}{n:6}{p:12}   left out: Theta would take {4 * n * p / 2**30:.0f} GiB")
                continue
            case = measure(d, n, p, tries=4 if chosen.quick else 8)
            found.append(case)
            bound = "memory" if case.memory_bound else "cores"
            shares = "".join(f"{share:8.2f}" for share in (case.copy, case.matmul, case.plain, case.before))
            print(f"{d:4}{n:6}{p:12}{case.seconds:10.4f}{bound:>10}{shares}", flush=True)
    by_memory = [case.copy for case in found if case.memory_bound]
    by_cores = [case.matmul for case in found if not case.memory_bound]
    result = {
        "memory_bound_over_copy": min(by_memory, default=None),
        "compute_bound_over_matmul": min(by_cores, default=None),
    }
    print(json.dumps(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result | {"cases": [asdict(case) for case in found]}, indent=2))


if __name__ == "__main__":
    main()
