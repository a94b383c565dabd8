from __future__ import annotations

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.adapter import Adapter, require_same_layout, scalings_from, stack_vectors
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from tests.fedalloy_adapters.samples import adapters, bits, examples, layout_of, random_adapter, tensor_of

LAYOUT = layout_of(ranks={"q_proj": 2, "v_proj": 3})


def test_named_tensors_are_views_of_the_vector() -> None:
    adapter = random_adapter(LAYOUT, 0)
    for entry in LAYOUT.entries:
        assert torch.equal(adapter[entry.module, entry.factor].double(), tensor_of(adapter, entry.module, entry.factor))
    adapter["v_proj", Factor.B][1, 2] = 42
    assert tensor_of(adapter, "v_proj", Factor.B)[1, 2] == 42
    adapter.vector.fill_(7)
    assert all(bool((tensor == 7).all()) for _, tensor in adapter.items())
    assert [entry.name for entry, _ in adapter.items()] == [entry.name for entry in LAYOUT.entries]


def test_a_row_of_a_matrix_is_an_adapter_without_a_copy() -> None:
    matrix = torch.zeros(3, LAYOUT.size)
    Adapter(LAYOUT, matrix[1])["q_proj", Factor.A].fill_(1)
    assert matrix.sum() == 8
    assert matrix[1].sum() == 8


def test_a_strided_vector_is_made_contiguous() -> None:
    matrix = torch.arange(2.0 * LAYOUT.size).reshape(LAYOUT.size, 2)
    adapter = Adapter(LAYOUT, matrix[:, 1])
    assert adapter.vector.is_contiguous()
    assert torch.equal(adapter.vector, matrix[:, 1])


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        (torch.zeros(LAYOUT.size + 1), f"expected \\({LAYOUT.size},\\)"),
        (torch.zeros(1, LAYOUT.size), "got vector.shape="),
        (torch.zeros(LAYOUT.size, dtype=torch.int64), "torch.int64"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vector: torch.Tensor, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        Adapter(LAYOUT, vector)


def test_copies_share_no_memory() -> None:
    adapter = random_adapter(LAYOUT, 0)
    before = bits(adapter.vector)
    for copy in (
        adapter.clone(),
        adapter.part(LAYOUT),
        adapter.select(),
        adapter.with_part(adapter.select([Factor.A])),
    ):
        assert bits(copy.vector) == before
        copy.vector.fill_(0)
    assert bits(adapter.vector) == before


@examples(50)
@given(adapters(), st.data())
def test_part_and_with_part_are_inverse(adapter: Adapter, data: st.DataObject) -> None:
    entries = data.draw(st.sets(st.sampled_from(adapter.layout.entries), min_size=1))
    layout = adapter.layout.select({entry.factor for entry in entries}, {entry.module for entry in entries})
    part = adapter.part(layout)
    assert bits(adapter.with_part(part).vector) == bits(adapter.vector)
    blank = Adapter.zeros(adapter.layout).with_part(part)
    assert bits(blank.part(layout).vector) == bits(part.vector)
    kept = {entry.name for entry in layout.entries}
    for entry, tensor in blank.items():
        expected = adapter[entry.module, entry.factor] if entry.name in kept else torch.zeros(entry.shape)
        assert bits(tensor) == bits(expected)


MISFITS = {
    "base model other": Layout(LAYOUT.entries[:1], {"q_proj": 2.0}, "other"),
    "rank 5 for 'v_proj', expected 3": Layout((Entry("v_proj", Factor.A, (5, 6)),), {"v_proj": 2.0}, "base"),
    "scaling 1.0 for 'v_proj', expected 2.0": Layout((LAYOUT.entries[3],), {"v_proj": 1.0}, "base"),
    r"shape \(3, 7\) for 'v_proj.A', expected \(3, 6\)": Layout(
        (Entry("v_proj", Factor.A, (3, 7)),), {"v_proj": 2.0}, "base"
    ),
    "unknown tensor 'q_proj.bias'": Layout(
        (LAYOUT.entries[0], Entry("q_proj", Factor.BIAS, (5,))), {"q_proj": 2.0}, "base"
    ),
}


@pytest.mark.parametrize("text", MISFITS)
def test_a_part_that_does_not_fit_is_refused_and_the_reason_is_about_the_part(text: str) -> None:
    adapter = Adapter.zeros(LAYOUT)
    with pytest.raises(LayoutError, match=text):
        adapter.part(MISFITS[text])
    with pytest.raises(LayoutError, match=text):
        adapter.with_part(Adapter.zeros(MISFITS[text]))


def test_to_and_finiteness() -> None:
    adapter = random_adapter(LAYOUT, 0)
    assert adapter.to(torch.float64).vector.dtype == torch.float64
    assert adapter.is_finite
    for bad in (math.nan, math.inf, -math.inf):
        adapter.vector[-1] = bad
        assert not adapter.is_finite


@examples(50)
@given(adapters())
def test_digest_is_the_hash_that_the_specification_gives(adapter: Adapter) -> None:
    numbers = struct.pack(f"<{adapter.layout.size}f", *adapter.vector.tolist())
    expected = hashlib.sha256(b"fedalloy.content.v1" + adapter.layout.digest + numbers).digest()
    assert adapter.digest == expected
    assert adapter.to(torch.float64).digest == expected


@examples(50)
@given(adapters(), st.data())
def test_digest_changes_with_any_bit(adapter: Adapter, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, adapter.layout.size - 1))
    changed = adapter.clone()
    words = changed.vector.view(torch.int32)
    words[position] ^= 1 << data.draw(st.integers(0, 30))
    assert changed.digest != adapter.digest
    negated = adapter.clone()
    negated.vector[position] *= -1
    assert negated.digest != adapter.digest


def test_digest_is_bound_to_the_layout() -> None:
    vector = torch.zeros(LAYOUT.size)
    others = [layout_of(ranks={"q_proj": 2, "v_proj": 3}, base="other"), layout_of(ranks=LAYOUT.ranks, scalings=1.0)]
    assert len({Adapter(layout, vector).digest for layout in (LAYOUT, *others)}) == 3


def test_initial_depends_on_seed_and_module_only() -> None:
    torch.manual_seed(1)
    first = Adapter.initial(LAYOUT, 5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert bits(Adapter.initial(LAYOUT, 5).vector) == bits(first.vector)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"

    reordered = Layout(LAYOUT.entries[::-1], LAYOUT.scalings, "another base")
    other = layout_of(
        ranks={"k_proj": 4, "v_proj": 3}, sizes={"k_proj": (9, 9), "v_proj": (6, 8)}, scalings=0.5, head=None
    )
    for layout in (reordered, other):
        assert bits(Adapter.initial(layout, 5)["v_proj", Factor.A]) == bits(first["v_proj", Factor.A])
    assert bits(Adapter.initial(LAYOUT, 6)["v_proj", Factor.A]) != bits(first["v_proj", Factor.A])


def test_initial_modules_differ_and_the_delta_is_zero() -> None:
    layout = layout_of(ranks=3, sizes={"a": (50, 4), "b": (50, 4)})
    adapter = Adapter.initial(layout, 0)
    assert not torch.equal(adapter["a", Factor.A], adapter["b", Factor.A])
    for entry, tensor in adapter.items():
        if entry.factor is Factor.A:
            assert float(tensor.abs().max()) <= 1 / math.sqrt(50)
            assert float(tensor.abs().max()) > 0.9 / math.sqrt(50)
            assert float(tensor.std()) == pytest.approx(1 / math.sqrt(3 * 50), rel=0.2)
        else:
            assert not tensor.any()


def test_initial_numbers_never_change() -> None:
    # All clients of a run draw these themselves, perhaps with another release of PyTorch: frozen, as the format is.
    layout = Layout((Entry("q_proj", Factor.A, (1, 4)),), {"q_proj": 1.0}, "base")
    drawn = [number.hex() for number in Adapter.initial(layout, 7).vector.tolist()]
    assert drawn == ["-0x1.45a2000000000p-8", "-0x1.f0de500000000p-2", "0x1.1760180000000p-2", "0x1.a8dad00000000p-4"]
    seed = int.from_bytes(hashlib.sha256(b"7:q_proj").digest()[:8], "little", signed=True)  # as proto/README.md says
    again = torch.empty(1, 4).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    assert drawn == [number.hex() for number in again[0].tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_initial_takes_every_seed_of_the_wire(seed: int) -> None:
    assert Adapter.initial(LAYOUT, seed).is_finite


def test_matrix_of_adapters() -> None:
    found = [random_adapter(LAYOUT, seed) for seed in range(3)]
    matrix = stack_vectors(iter(found))
    assert matrix.shape == (3, LAYOUT.size)
    assert bits(matrix[2]) == bits(found[2].vector)
    with pytest.raises(LayoutError, match="rank 2 for 'v_proj', expected 3"):
        stack_vectors([*found, Adapter.zeros(layout_of())])
    with pytest.raises(LayoutError, match="no adapters"):
        stack_vectors([])


def test_require_same_layout() -> None:
    require_same_layout(LAYOUT, layout_of(ranks={"q_proj": 2, "v_proj": 3}))
    with pytest.raises(LayoutError, match="found base model other, expected base"):
        require_same_layout(LAYOUT, layout_of(ranks=LAYOUT.ranks, base="other"))


def test_scalings_are_alpha_over_rank() -> None:
    assert scalings_from({"a": 8, "b": 5}, 12.5) == {"a": 1.5625, "b": 2.5}
