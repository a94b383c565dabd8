"""The same work for many items, on all cores, with results that do not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_BYTES = 2**30
"""That all workers together may need at a time."""
_SET = threading.Lock()

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(work: Callable[[T], R], items: Sequence[T], bytes_each: int = 0) -> list[R]:
    """``[work(item) for item in items]``, a few at a time.

    Each item has one thread, whose linear algebra has no others: how LAPACK divides a matrix among threads would show
    in the last bits.

    Args:
        work: of PyTorch, which lets other threads run meanwhile.
        items: what is worked on.
        bytes_each: that one item needs while it is worked on.
    """
    with _SET:
        threads = torch.get_num_threads()
        workers = max(1, min(threads, len(items), MOST_BYTES // max(bytes_each, 1)))
        torch.set_num_threads(1)
        try:
            if workers == 1:
                return [work(item) for item in items]
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(work, items))
        finally:
            torch.set_num_threads(threads)
