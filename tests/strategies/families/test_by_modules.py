"""Merging a few modules at a time gives the same bits as merging all at once; ranks may differ."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.layout import LayoutError
from strategies.families import by_modules as module
from strategies.families.by_modules import by_modules, exact_average, in_turns
from tests.strategies.conftest import layout_of, random_adapter

LAYOUT = layout_of(modules=("q", "k", "v"))


@pytest.mark.parametrize("room", [1, 250, 2**24])
def test_the_average_is_that_of_the_whole_however_many_modules_are_read_together(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOGETHER", room)
    found = [random_adapter(LAYOUT, seed) for seed in range(3)]
    expected = truncate(stack(found, [0.2, 0.3, 0.5]), LAYOUT)
    assert torch.equal(exact_average(found, [0.2, 0.3, 0.5]).vector, expected.vector)


def test_modules_are_read_in_turns_that_fit() -> None:
    assert in_turns(LAYOUT, 1) == [["q", "k", "v", "head"]]
    assert in_turns(LAYOUT, 2**22) == [["q"], ["k"], ["v"], ["head"]]


def test_ranks_may_differ_where_the_merge_allows_it() -> None:
    found = [random_adapter(layout_of(rank=rank, modules=("q", "k")), rank) for rank in (2, 3)]
    layout = found[1].layout

    def merge(parts: list[Adapter]) -> Adapter:
        return truncate(stack(parts, [0.5, 0.5]), layout.select((), parts[0].layout.modules))

    assert torch.equal(by_modules(found, merge, layout).vector, truncate(stack(found, [0.5, 0.5]), layout).vector)
    with pytest.raises(LayoutError, match="no adapters"):
        by_modules([], merge, layout)
