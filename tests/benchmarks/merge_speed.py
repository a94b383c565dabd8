"""How fast linear merges are, as shares of what the machine can do in the same minute.

    python -m tests.benchmarks.merge_speed [--quick] [--processor-time] [--json FILE]

``W [d, N] @ Theta [N, P]`` over the rows of a bank (:mod:`fedalloy_adapters.bank`), into allocated memory:

    copy      bytes of Theta that are read in a second, over the bytes that copying a large tensor reads and writes
    matmul    arithmetic in a second, over that of the best plain product of two square matrices (float32)
    plain     time of the best plain product of the same shape (PyTorch's, NumPy's) on a matrix ``[N, P]`` that is
              ready, over this time: 1 is as fast, although the rows lie apart and the order of the sums is fixed
    in turn   time of the copy's reading and writing plus that of the square product's arithmetic, over this time: what
              there is to win for one that reads first and multiplies then
    before    time of what merges did (stack the adapters, ``weights @ matrix``), over this time

A case is bound by memory where reading Theta and writing the result at the copy's speed takes longer than its
arithmetic at the best product's, and is judged by ``copy``; else by ``matmul``, and by ``plain``: a product with few
rows of weights is far slower than a square one in any library. All are measured in turn, because others may use the
machine, too; the best of several tries counts. ``--processor-time`` measures one thread by its processor time, for a
busy machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from fedalloy_adapters.bank.blocks import MemoryRow, combine

CASES = ((1, 16), (1, 256), (16, 16), (8, 256))
SIZES = (4_000_000, 20_000_000)
MOST_BYTES = 6 * 2**30
"""Bytes of Theta: 256 adapters of 20 million numbers are 20 GB, more memory than the smallest machine has."""
COPIED = 2**25
SQUARES = (1024, 2048)
CLOCK = time.perf_counter


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
    in_turn: float
    before: float


def seconds_of(work: Callable[[], object]) -> float:
    started = CLOCK()
    work()
    return CLOCK() - started


def measure(d: int, n: int, p: int, tries: int) -> Measured:
    """One case: everything that is compared, one after the other, again and again."""
    matrix, weights, out = torch.randn(n, p), torch.randn(d, n), torch.empty(d, p)
    rows = [MemoryRow(row) for row in matrix]
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    squares = [(torch.randn(size, size), torch.empty(size, size)) for size in SQUARES]
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: combine(rows, weights, out),
        "copy": lambda: target.copy_(source),
        "torch": lambda: torch.mm(weights, matrix, out=out),
        "numpy": lambda: np.matmul(weights.numpy(), matrix.numpy(), out=out.numpy()),
    }
    for square, made in squares:
        works[f"square {len(square)}"] = lambda a=square, o=made: torch.mm(a, a, out=o)  # type: ignore[misc]
    found = {name: float("inf") for name in works}
    for attempt in range(tries + 1):
        for name, work in works.items():
            taken = seconds_of(work)
            if attempt:  # the first does not count
                found[name] = min(found[name], taken)
    combine(rows, weights, out)
    torch.testing.assert_close(out[:, :1000], weights @ matrix[:, :1000], rtol=1e-4, atol=1e-3)
    fits = 8 * n * p <= MOST_BYTES
    before = min(seconds_of(lambda: weights @ torch.stack(list(matrix))) for _ in range(2)) if fits else float("nan")
    bandwidth = 2 * 4 * COPIED / found["copy"]
    arithmetic = max(2 * size**3 / found[f"square {size}"] for size in SQUARES)
    seconds, flops, moved = found["ours"], 2 * d * n * p, 4 * (n + d) * p
    return Measured(
        d, n, p, seconds, moved / bandwidth > flops / arithmetic, 4 * n * p / seconds / bandwidth,
        flops / seconds / arithmetic, min(found["torch"], found["numpy"]) / seconds,
        (moved / bandwidth + flops / arithmetic) / seconds, before / seconds,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="the smaller size, fewer tries: under two minutes")
    parser.add_argument("--json", type=Path, help="where the shares go")
    parser.add_argument("--processor-time", action="store_true", help="of one thread, whatever else the machine does")
    chosen = parser.parse_args()
    if chosen.processor_time:
        global CLOCK
        CLOCK = time.thread_time
        torch.set_num_threads(1)
        ThreadpoolController().limit(limits=1, user_api="blas")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'d':>4}{'N':>6}{'P':>12}{'seconds':>10}{'bound by':>10}{'copy':>8}{'matmul':>8}{'plain':>8}{'in turn':>8}"
          f"{'before':>8}")  # fmt: skip
    found = []
    for p in SIZES[:1] if chosen.quick else SIZES:
        for d, n in CASES:
            if 4 * n * p > MOST_BYTES:
                print(f"{d:4}{n:6}{p:12}   left out: Theta would take {4 * n * p / 2**30:.0f} GiB")
                continue
            case = measure(d, n, p, tries=6 if chosen.quick else 10)
            found.append(case)
            bound = "memory" if case.memory_bound else "cores"
            shares = "".join(
                f"{share:8.2f}" for share in (case.copy, case.matmul, case.plain, case.in_turn, case.before)
            )
            print(f"{d:4}{n:6}{p:12}{case.seconds:10.4f}{bound:>10}{shares}", flush=True)
    by_memory = [case.copy for case in found if case.memory_bound]
    by_cores = [case for case in found if not case.memory_bound]
    result = {
        "memory_bound_over_copy": min(by_memory, default=None),
        "compute_bound_over_matmul": min((case.matmul for case in by_cores), default=None),
        "compute_bound_over_same_shape": min((case.plain for case in by_cores), default=None),
    }
    print(json.dumps(result))
    if chosen.json:
        chosen.json.write_text(json.dumps(result | {"cases": [asdict(case) for case in found]}, indent=2))


if __name__ == "__main__":
    main()
