"""Sums over many rows: right, and the same bits whatever the blocks, the threads and the place of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalloy_adapters.bank import blocks
from fedalloy_adapters.bank.blocks import Difference, MemoryRow, Part, combine, products, squared_distances
from fedalloy_adapters.bank.store import Storage
from tests.fedalloy_adapters.samples import examples

SIZES = (1, 7, blocks.TILE - 1, blocks.TILE, blocks.TILE + 1, 2 * blocks.TILE + 5, blocks.WIDEST + 1)


def drawn(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def memory_rows(matrix: Tensor) -> list[MemoryRow]:
    return [MemoryRow(row) for row in matrix]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("d", "count"), [(1, 1), (3, 5), (1, blocks.GROUP + 1), (2, 2 * blocks.GROUP + 3), (20, 70), (130, 3)]
)
def test_a_combination_is_the_product_of_matrices(d: int, count: int, size: int) -> None:
    matrix, weights = drawn(count, size), drawn(d, count, seed=1)
    found = combine(memory_rows(matrix), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weights.double() @ matrix.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 16, 256])
@pytest.mark.parametrize("d", [1, 8, 16, 17, 100, 1000])
def test_products_are_small_or_as_wide_as_a_tile(d: int, count: int) -> None:
    """Small ones are not rearranged; and none is much wider than the numbers that there are."""
    for size in SIZES:
        rows, columns = blocks.product_of(d, count, size)
        assert blocks.WIDEST % columns == 0
        assert columns <= max(blocks.TILE, 2 * size)
        assert rows == min(count, blocks.WIDE_GROUP if d > blocks.WIDE else blocks.GROUP)
        assert columns >= blocks.NARROWEST
        assert d * rows * columns <= blocks.SMALL or d * rows * blocks.NARROWEST > blocks.SMALL


def test_doubles_stay_doubles() -> None:
    matrix, weights = drawn(3, 50).double(), drawn(2, 3, seed=1).double()
    torch.testing.assert_close(combine(memory_rows(matrix), weights), weights @ matrix, rtol=1e-14, atol=1e-14)


def test_a_result_goes_where_it_is_told() -> None:
    matrix, weights = drawn(4, 100), drawn(2, 4, seed=1)
    out = torch.full((2, 100), 7.0)
    assert combine(memory_rows(matrix), weights, out) is out
    assert torch.equal(out, combine(memory_rows(matrix), weights))


@examples(10)
@given(
    count=st.integers(1, 70), size=st.integers(1, 200_000), buffered=st.sampled_from([1, 10**5, 10**6, 10**7]),
    seed=st.integers(0, 99), d=st.sampled_from([1, 2, 16, 20]),
)  # fmt: skip
def test_no_bit_depends_on_how_much_is_read_at_once(count: int, size: int, buffered: int, seed: int, d: int) -> None:
    matrix, weights = drawn(count, size, seed), drawn(d, count, seed + 1)
    once = combine(memory_rows(matrix), weights)

    class Slow(MemoryRow):
        in_memory = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BUFFERED", buffered)
        patch.setattr(blocks, "_STRIPES_EACH", 1)
        for kind in (MemoryRow, Slow):
            assert torch.equal(combine([kind(row) for row in matrix], weights), once)


def test_no_bit_depends_on_the_number_of_threads(two_threads: None) -> None:
    matrix, weights = drawn(40, 5 * blocks.TILE + 3), drawn(3, 40, seed=1)
    many = combine(memory_rows(matrix), weights), products(memory_rows(matrix))
    torch.set_num_threads(1)
    assert torch.equal(many[0], combine(memory_rows(matrix), weights))
    assert torch.equal(many[1], products(memory_rows(matrix)))


def test_no_bit_depends_on_where_a_row_is_and_how_it_is_aligned(tmp_path: Path) -> None:
    matrix, weights = drawn(35, blocks.TILE + 100), drawn(2, 35, seed=1)
    storage = Storage()
    storage.spill_to(tmp_path / "bank", 0)
    shifted = torch.empty(35, blocks.TILE + 103)[:, 3:]
    shifted[:] = matrix
    expected = combine(memory_rows(matrix), weights)
    assert torch.equal(combine([storage.keep(row) for row in matrix], weights), expected)
    assert torch.equal(combine(memory_rows(shifted), weights), expected)


def test_a_column_does_not_see_the_others() -> None:
    """So numbers of an adapter do not depend on which module comes before them."""
    matrix, weights = drawn(20, blocks.TILE), drawn(1, 20, seed=1)
    changed = matrix.clone()
    changed[:, ::2] = torch.inf
    found, other = combine(memory_rows(matrix), weights)[0], combine(memory_rows(changed), weights)[0]
    assert torch.equal(found[1::2], other[1::2])


@pytest.mark.parametrize("size", [5, 5000])
def test_inner_products_are_taken_in_double(size: int) -> None:
    first, second = drawn(3, size), drawn(4, size, seed=1)
    expected = first.double() @ second.double().T
    torch.testing.assert_close(products(memory_rows(first), memory_rows(second)), expected, rtol=1e-12, atol=1e-11)
    own = products(memory_rows(first))
    assert torch.equal(own, own.T)
    torch.testing.assert_close(own, first.double() @ first.double().T, rtol=1e-12, atol=1e-11)


def test_neighbours_far_from_zero_have_their_distance() -> None:
    """|x|^2 + |y|^2 - 2 <x, y> would be rounding alone."""
    rows = 1e4 + 1e-2 * drawn(5, 3000)
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(squared_distances(memory_rows(rows)), exact, rtol=1e-9, atol=0)


def test_equal_rows_have_no_distance() -> None:
    row = drawn(1, 3000)[0]
    found = squared_distances(memory_rows(torch.stack([row, 2 * row, row, row])))
    assert found[0, 2] == found[2, 3] == found[3, 0] == 0
    assert (found[1, [0, 2, 3]] > 0).all()


def test_a_difference_is_made_where_it_is_read() -> None:
    first, second = drawn(2, 30_000)
    found = combine([Difference(MemoryRow(first), MemoryRow(second))], torch.ones(1, 1))[0]
    assert torch.equal(found, first - second)


@examples(25)
@given(cuts=st.lists(st.integers(0, 40_000), min_size=2, max_size=12, unique=True))
def test_a_part_is_its_columns(cuts: list[int]) -> None:
    row = drawn(1, 40_000)[0]
    edges = sorted(cuts)[: len(cuts) // 2 * 2]
    ranges = list(zip(edges[::2], edges[1::2], strict=True))
    part = Part(MemoryRow(row), ranges)
    expected = torch.cat([row[start:stop] for start, stop in ranges])
    assert part.size == len(expected)
    assert torch.equal(combine([part], torch.ones(1, 1))[0], expected)


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        ([], torch.ones(1, 0), "no rows"),
        ([torch.ones(3), torch.ones(4)], torch.ones(1, 2), "rows of 4 torch.float32 and 3"),
        ([torch.ones(3)], torch.ones(1, 2), r"got weights.shape=\(1, 2\), expected \(\*, 1\)"),
        ([torch.ones(3).half()], torch.ones(1, 1), "expected float32 or float64"),
    ],
)
def test_what_does_not_fit_is_named(rows: list[Tensor], weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine([MemoryRow(row) for row in rows], weights)


def test_an_out_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got out \(1, 4\) torch.float32, expected \(1, 3\)"):
        combine([MemoryRow(torch.ones(3))], torch.ones(1, 1), torch.empty(1, 4))
