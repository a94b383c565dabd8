"""The same work for many items on all cores; the results do not depend on the number of cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST_BYTES = 2**30
"""Bytes that all workers together may use at a time."""
_SET = threading.Lock()

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(work: Callable[[T], R], items: Sequence[T], bytes_each: int = 0) -> list[R]:
    """``[work(item) for item in items]``, a few at a time.

    Each item has one thread, and linear algebra inside it starts no others: the way LAPACK divides a matrix among
    threads would change the last bits.

    Args:
        work: a function that computes with PyTorch, which lets other threads run meanwhile.
        items: its arguments.
        bytes_each: memory that one item needs during the work.
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
