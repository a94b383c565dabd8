"""Tensors of slots: what was written is read to the bit, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from client_app.plan.slot_tensors import from_tensors, require_no_more_than, to_tensors, with_digest, without_digest
from tests.fedalloy_adapters.samples import random_adapter
from tests.strategies.toys import LAYOUT


def test_an_adapter_is_read_as_it_was_written() -> None:
    adapter = random_adapter(LAYOUT, 3)
    tensors = to_tensors(adapter, "head_")
    assert set(tensors) == {"head_vector", "head_layout", "head_digest"}
    found = from_tensors(tensors, "head_")
    assert torch.equal(found.vector, adapter.vector)
    assert found.layout.digest == adapter.layout.digest


@pytest.mark.parametrize("part", ["vector", "digest"])
def test_a_number_that_has_changed_is_noticed(part: str) -> None:
    tensors = to_tensors(random_adapter(LAYOUT, 3), "")
    tensors[part] = tensors[part].clone()
    tensors[part][0] += 1
    with pytest.raises(ValueError, match="not those that were written"):
        from_tensors(tensors, "")


def test_what_an_optimiser_leaves_is_checked_with_names_shapes_and_types() -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4)}
    kept = with_digest(state)
    found = without_digest(kept)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    a, step = state["a"], state["step"]
    for wrong in ({"b": a}, {"a": a.reshape(3, 2)}, {"a": -a}, {"a": a.double()}, {"a": a, "step": step + 1}):
        changed = {name: tensor for name, tensor in kept.items() if name != "a"} | wrong
        with pytest.raises(ValueError, match="not those that were written"):
            without_digest(changed)


def test_tensors_that_nobody_reads_are_refused() -> None:
    require_no_more_than({"a": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="1 tensors, expected 3: a name has changed"):
        require_no_more_than({"a": torch.zeros(1)}, 3)
