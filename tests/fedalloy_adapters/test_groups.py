"""Parameter groups: whose they are, what they start from, and averages over their owners."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import (
    average_groups,
    group_difference,
    group_of,
    groups_of,
    layout_of_groups,
    union,
)
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from strategies.families.fedavg import average


def layout_of(*groups: str, rank: int = 2, base: str = "base") -> Layout:
    entries: list[Entry] = []
    for group in groups:
        if group.startswith("head/"):
            entries.append(Entry(f"{group}::out", Factor.WEIGHT, (3, 4)))
        else:
            entries += [Entry(f"{group}::q", Factor.A, (rank, 4)), Entry(f"{group}::q", Factor.B, (4, rank))]
    lora = {entry.module: 2.0 for entry in entries if entry.factor.is_lora}
    return Layout(tuple(entries), lora, base)


def filled(layout: Layout, value: float) -> Adapter:
    return Adapter(layout, torch.full((layout.size,), value))


def mean(weights: dict[str, int]) -> Any:
    return lambda group, owners: average(list(owners.values()), [weights[name] for name in owners])


def test_groups_are_matched_by_their_whole_id() -> None:
    layout = layout_of("shared", "task/cls", "task/cls2", "head/cls")
    assert groups_of(layout) == ("shared", "task/cls", "task/cls2", "head/cls")
    assert layout_of_groups(layout, ["task/cls"]).modules == ("task/cls::q",)
    assert group_of("layer.0.q") == ""
    with pytest.raises(LayoutError, match="no group 'task/cl' in the layout; it has shared, task/cls"):
        layout_of_groups(layout, ["task/cl"])
    with pytest.raises(LayoutError, match="group 'experts/cls', expected shared, mod/<modality>"):
        groups_of(layout_of("experts/cls"))


def test_a_group_starts_from_the_seed_and_its_id_alone() -> None:  # T23
    one, other = layout_of("shared", "mod/image"), layout_of("head/x", "mod/text", "mod/image", "shared")
    first, second = Adapter.initial(one, 7), Adapter.initial(other, 7)
    for group in ("shared", "mod/image"):
        part = layout_of_groups(one, [group])
        assert torch.equal(first.part(part).vector, second.part(part).vector)
    a = first["shared::q", Factor.A]
    assert not torch.equal(a, first["mod/image::q", Factor.A])
    assert not torch.equal(a, Adapter.initial(one, 8)["shared::q", Factor.A])


def test_the_union_has_every_group_once_whatever_the_order() -> None:
    layouts = [layout_of("shared", "mod/image"), layout_of("mod/text", "shared"), layout_of("head/x", "shared")]
    digests = {union(order).digest for order in itertools.permutations(layouts)}
    assert len(digests) == 1
    assert groups_of(union(layouts)) == ("head/x", "mod/image", "mod/text", "shared")
    plain = Layout((Entry("q", Factor.WEIGHT, (2,)),), {}, "base")
    assert union([plain, plain]) is plain


def test_groups_that_two_clients_own_must_be_equal() -> None:
    assert group_difference(layout_of("shared", "mod/image"), layout_of("shared", "mod/text")) is None
    found = group_difference(layout_of("shared", "mod/image"), layout_of("mod/image", rank=3))
    assert found == "rank 3 for 'mod/image::q', expected 2 in group 'mod/image'"
    assert "base model other" in str(group_difference(layout_of("shared"), layout_of("head/x", base="other")))
    with pytest.raises(LayoutError, match="rank 3"):
        union([layout_of("shared"), layout_of("shared", rank=3)])


def test_owners_alone_are_averaged_and_what_nobody_owns_stays() -> None:  # T8
    whole = union([layout_of("shared", "mod/image"), layout_of("shared", "mod/text"), layout_of("head/x")])
    model = filled(whole, 9.0)
    arrived = {"a": filled(layout_of("shared", "mod/image"), 1.0), "b": filled(layout_of("shared", "mod/text"), -1.0)}
    found = average_groups(model, arrived, mean({"a": 100, "b": 300}))
    values = {group: found.part(layout_of_groups(whole, [group])).vector for group in groups_of(whole)}
    assert set(values["shared"].tolist()) == {-0.5}
    assert set(values["mod/image"].tolist()) == {1.0}
    assert set(values["mod/text"].tolist()) == {-1.0}
    assert set(values["head/x"].tolist()) == {9.0}
    assert set(model.vector.tolist()) == {9.0}


def test_weights_sum_to_one_in_every_group_and_the_order_of_clients_does_not_matter() -> None:  # T8, T21
    layouts = {"a": layout_of("shared", "mod/image"), "b": layout_of("shared"), "c": layout_of("shared", "mod/image")}
    whole = union(layouts.values())
    counts = {"a": 7, "b": 11, "c": 13}
    ones = average_groups(filled(whole, 0.0), {n: filled(x, 1.0) for n, x in layouts.items()}, mean(counts))
    torch.testing.assert_close(ones.vector, torch.ones(whole.size), rtol=0, atol=1e-6)
    drawn = {name: Adapter.initial(layout, seed) for seed, (name, layout) in enumerate(layouts.items())}
    results = [
        average_groups(filled(whole, 0.0), {name: drawn[name] for name in order}, mean(counts)).vector
        for order in itertools.permutations(drawn)
    ]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)
