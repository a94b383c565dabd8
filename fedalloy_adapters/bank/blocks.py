"""Sums and products over many rows of numbers, a block of columns at a time.

A server's work on N adapters of P numbers is limited by memory: every number is read once, and a matrix ``[N, P]`` made
for one product costs more than the product. Here a block of columns of a few rows is copied to a buffer that stays in
the cache, and multiplied there.

Results depend on nothing but the numbers, bit for bit. Every product has the shape ``[d, rows] @ [rows, columns]`` on
one thread, :func:`product_of` decides how many of both, and the last one is filled up. So neither the number of
threads, nor how much is read at once, nor where a row lies (memory or file) decides how a sum is rounded. The order of
the rows does: callers sort them.

NumPy computes the products: its BLAS multiplies a small matrix where it lies, at up to three times the speed of a large
one with as few rows, which is rearranged first (``tests/benchmarks/merge_speed.py``).
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

TILE = 15360
"""Columns that are taken together where nothing else decides: 15 * 1024."""
WIDEST = 4 * TILE
"""Columns of a product; its halves come close to the most that a small product may have."""
GROUP, WIDE_GROUP, WIDE = 32, 64, 16
"""Rows of one product; the second where more than so many sums are made of them."""
SMALL = 10**6
"""Multiplications up to which OpenBLAS leaves the matrix as it is; and the narrowest product that is worth it."""
NARROWEST = 240
BUFFERED = 2 * 2**20
"""Numbers in a thread's buffers, 8 MiB, or one product if that has more. Short stretches are slow to read, above all
from a file, and all that is read should stay in a cache."""
_STRIPES_EACH = 4
"""Stripes for each thread, at least, if there are as many products: so that all end at about the same time."""
_PADDING = 16
"""Columns between the rows of a buffer, or all would start at the same place of a cache."""
_PRODUCT_COLUMNS, _PRODUCT_NUMBERS = 2048, 2**20
"""Columns of a block of inner products, and its most numbers."""
_ONE_AT_A_TIME = threading.Lock()
Numbers = NDArray[Any]


class Row(Protocol):
    """P numbers that can be read starting at any column."""

    @property
    def size(self) -> int:
        """P."""

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""

    @property
    def in_memory(self) -> bool:
        """Whether the numbers are in memory, so that reading only copies."""

    def read(self, start: int, out: Numbers) -> None:
        """Fill ``out`` with the numbers from column ``start`` on; a row may be read by several threads at once."""


class MemoryRow:
    """A tensor ``[P]`` that no longer changes."""

    in_memory = True

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector.detach().to("cpu").contiguous()
        self.size = len(vector)
        self.dtype = vector.dtype
        self._numbers: Numbers = self.vector.numpy()

    def read(self, start: int, out: Numbers) -> None:
        """Copy."""
        out[:] = self._numbers[start : start + len(out)]


def rows_of(matrix: Tensor | Sequence[Row]) -> Sequence[Row]:
    """The rows of a matrix ``[N, P]``; a sequence of rows is returned as it is."""
    return [MemoryRow(row) for row in matrix] if isinstance(matrix, Tensor) else matrix


class Difference:
    """``first - second``, computed when it is read."""

    def __init__(self, first: Row, second: Row) -> None:
        self.first, self.second = first, second
        self.size, self.dtype = first.size, first.dtype
        self.in_memory = first.in_memory and second.in_memory

    def read(self, start: int, out: Numbers) -> None:
        """Read both and subtract."""
        self.first.read(start, out)
        taken = np.empty_like(out)
        self.second.read(start, taken)
        out -= taken


class Part:
    """Some columns of a row, as ranges ``(start, stop)`` one after the other."""

    def __init__(self, row: Row, ranges: Sequence[tuple[int, int]]) -> None:
        self.row = row
        self.dtype, self.in_memory = row.dtype, row.in_memory
        self._starts = [start for start, _ in ranges]
        self._ends = list(itertools.accumulate(stop - start for start, stop in ranges))
        self.size = self._ends[-1] if self._ends else 0

    def read(self, start: int, out: Numbers) -> None:
        """Range by range."""
        done = 0
        index = int(np.searchsorted(self._ends, start, side="right"))
        while done < len(out):
            begin = self._ends[index - 1] if index else 0
            count = min(len(out) - done, self._ends[index] - start - done)
            self.row.read(self._starts[index] + start + done - begin, out[done : done + count])
            done, index = done + count, index + 1


def combine(rows: Sequence[Row], weights: Tensor, out: Tensor | None = None) -> Tensor:
    """``weights [d, N] @ rows [N, P]`` as ``[d, P]``, in the rows' dtype.

    Args:
        rows: rows of one size and dtype, in a reproducible order.
        weights: rounded to the rows' dtype.
        out: memory for the result; allocating it anew costs as much as the product.

    Raises:
        ValueError: sizes or counts do not match.
    """
    size = _common_size(rows)
    if weights.ndim != 2 or weights.shape[1] != len(rows):
        raise ValueError(f"got weights.shape={tuple(weights.shape)}, expected (*, {len(rows)})")
    dtype = rows[0].dtype
    result = torch.empty(len(weights), size, dtype=dtype) if out is None else out
    if result.shape != (len(weights), size) or result.dtype != dtype:
        raise ValueError(f"got out {tuple(result.shape)} {result.dtype}, expected ({len(weights)}, {size}) {dtype}")
    factors, target = weights.detach().to("cpu", dtype).numpy(), result.numpy()
    group, width = product_of(len(factors), len(rows), size)
    threads = torch.get_num_threads()
    buffered = BUFFERED if all(row.in_memory for row in rows) else 2 * BUFFERED
    fair = size // (_STRIPES_EACH * threads)
    stripe = width * max(1, min(buffered // (group + len(factors)), fair) // width)
    counter = itertools.count()  # an idle thread takes the next stripe; which thread takes it changes no number

    def work() -> None:
        numbers = np.zeros((group, stripe + _PADDING), target.dtype)
        total = np.zeros((len(factors), stripe + _PADDING), target.dtype)
        more = np.zeros((len(factors), width), target.dtype)
        with np.errstate(all="ignore"):
            while (start := next(counter) * stripe) < size:
                _combine_stripe(rows, factors, target, start, (numbers, total, more))

    threads = min(threads, -(-size // stripe))
    with _ONE_AT_A_TIME, _libraries().limit(limits=1, user_api="blas"):
        if threads < 2:
            work()
        else:
            with ThreadPoolExecutor(threads) as pool:
                for done in [pool.submit(work) for _ in range(threads)]:
                    done.result()
    return result


def product_of(d: int, count: int, size: int) -> tuple[int, int]:
    """Rows and columns of a product, where ``d`` sums are made of ``count`` rows of ``size`` numbers."""
    rows, columns = min(count, WIDE_GROUP if d > WIDE else GROUP), WIDEST
    while columns > TILE and columns >= 2 * size:  # nothing is won by products that are mostly filled up
        columns //= 2
    while d * rows * columns > SMALL and columns > NARROWEST:
        columns //= 2
    return rows, columns if d * rows * columns <= SMALL else TILE


def _combine_stripe(
    rows: Sequence[Row], factors: Numbers, target: Numbers, start: int, buffers: tuple[Numbers, Numbers, Numbers]
) -> None:
    """The columns from ``start`` on, as many as the first buffer is wide."""
    numbers, total, more = buffers
    width = min(numbers.shape[1] - _PADDING, target.shape[1] - start)
    rows_at_once, at_once = len(numbers), more.shape[1]
    whole = -(-width // at_once) * at_once  # the last product is as wide; what is beyond the row is not used
    straight = len(rows) == rows_at_once and width == whole
    for first in range(0, len(rows), rows_at_once):
        group = rows[first : first + rows_at_once]
        weights = factors[:, first : first + len(group)]
        for place, row in enumerate(group):
            row.read(start, numbers[place, :width])
        for begin in range(0, whole, at_once):
            columns = slice(begin, begin + at_once)
            block = numbers[: len(group), columns]
            if straight:
                np.matmul(weights, block, out=target[:, start + begin : start + begin + at_once])
            elif not first:
                np.matmul(weights, block, out=total[:, columns])
            else:
                np.matmul(weights, block, out=more)
                total[:, columns] += more
    if not straight:
        target[:, start : start + width] = total[:, :width]


def products(first: Sequence[Row], second: Sequence[Row] | None = None) -> Tensor:
    """Inner products ``<first_i, second_j>``, ``[M, N]`` float64. Without ``second``: of all pairs in ``first``.

    Raises:
        ValueError: sizes do not match.
    """
    every = [*first, *(second or ())]
    size = _common_size(every)
    counts = (len(first), len(second) if second is not None else len(first))
    columns = max(1, min(_PRODUCT_COLUMNS, _PRODUCT_NUMBERS // len(every)))
    total: NDArray[np.float64] = np.zeros(counts)
    for found in _in_order(_product_of_block(every, len(first), columns), range(0, size, columns)):
        total += found
    result = torch.from_numpy(total)
    return result.add_(result.T.clone()).div_(2) if second is None else result


def _product_of_block(rows: Sequence[Row], split: int, columns: int) -> Callable[[int], NDArray[np.float64]]:
    dtype = torch.empty(0, dtype=rows[0].dtype).numpy().dtype

    def of_block(start: int) -> NDArray[np.float64]:
        numbers = np.empty((len(rows), min(columns, rows[0].size - start)), dtype)
        for index, row in enumerate(rows):
            row.read(start, numbers[index])
        exact = numbers.astype(np.float64)
        with np.errstate(all="ignore"):
            found: NDArray[np.float64] = exact[:split] @ (exact[split:] if split < len(rows) else exact).T
        return found

    return of_block


def squared_norms(rows: Sequence[Row]) -> Tensor:
    """``|row|^2``, ``[N]`` in float64.

    Raises:
        ValueError: sizes do not match.
    """
    size = _common_size(rows)
    dtype = torch.empty(0, dtype=rows[0].dtype).numpy().dtype

    def of_block(start: int) -> NDArray[np.float64]:
        numbers = np.empty(min(TILE, size - start), dtype)
        found = np.empty(len(rows))
        for index, row in enumerate(rows):
            row.read(start, numbers)
            exact = numbers.astype(np.float64)
            found[index] = exact @ exact
        return found

    total: NDArray[np.float64] = np.zeros(len(rows))
    for found in _in_order(of_block, range(0, size, TILE)):
        total += found
    return torch.from_numpy(total)


def squared_distances(rows: Sequence[Row]) -> Tensor:
    """Squared distances of all pairs ``[N, N]`` float64, symmetric, zero on the diagonal.

    Computed from differences to the first row, so that a large common part costs no digits. Rows count as equal if
    float32 cannot tell them apart (1e-14 of the squares).

    Raises:
        ValueError: sizes do not match.
    """
    inner = products([Difference(row, rows[0]) for row in rows])
    squares = inner.diagonal()
    sums = squares[:, None] + squares[None, :]
    found = sums - 2 * inner
    return torch.where(found <= 1e-14 * sums, 0.0, found)


def _in_order(work: Callable[[int], NDArray[np.float64]], items: Sequence[int]) -> Iterator[NDArray[np.float64]]:
    """Results in the order of the items. All threads compute them, and only a few results wait at any time."""
    threads = min(torch.get_num_threads(), len(items))
    with _ONE_AT_A_TIME, _libraries().limit(limits=1, user_api="blas"):
        if threads < 2:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[NDArray[np.float64]]] = deque()
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def _common_size(rows: Sequence[Row]) -> int:
    if not rows:
        raise ValueError("got no rows, expected at least one")
    for row in rows:
        if (row.size, row.dtype) != (rows[0].size, rows[0].dtype):
            raise ValueError(f"rows of {row.size} {row.dtype} and {rows[0].size} {rows[0].dtype} numbers")
    if rows[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"rows of {rows[0].dtype}, expected float32 or float64")
    return rows[0].size


@functools.cache
def _libraries() -> ThreadpoolController:
    """The BLAS libraries of this process."""
    return ThreadpoolController()
