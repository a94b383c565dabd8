"""Batches: group 13 of FedMosaic's invariants, for the sampler that there is (data do not arrive in streams here)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.plan.seeds import batches, by_length


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 30), st.integers(0, 5))
def test_batches_are_as_many_as_asked_without_duplicates_and_pass_over_everything(
    examples: int, size: int, steps: int, seed: int
) -> None:
    found = list(batches(examples, size, steps, seed))
    assert len(found) == steps
    assert all(len(set(batch.tolist())) == len(batch) <= size for batch in found)
    passed = -(-examples // size)  # batches of one pass, the last of which may be smaller
    for first in range(0, steps - passed + 1, passed):
        assert torch.cat(found[first : first + passed]).sort().values.tolist() == list(range(examples))
    again = list(batches(examples, size, steps, seed))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_another_seed_is_another_order() -> None:
    first, second = (torch.cat(list(batches(40, 8, 5, seed))) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_batches_of_similar_lengths_have_every_example_as_often_and_are_the_same_again() -> None:
    lengths = torch.randint(1, 200, (100,), generator=torch.Generator().manual_seed(0))
    plain = list(batches(100, 7, 30, 5))
    found = list(by_length(batches(100, 7, 30, 5), lengths, 5))
    assert [sorted(torch.cat(some[start : start + 8]).tolist()) for some in (plain,) for start in range(0, 30, 8)] == [
        sorted(torch.cat(found[start : start + 8]).tolist()) for start in range(0, 30, 8)
    ]
    assert sorted(map(len, found)) == sorted(map(len, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, by_length(batches(100, 7, 30, 5), lengths, 5), strict=True))
    width = [sum(int(lengths[batch].max()) * len(batch) for batch in some) for some in (plain, found)]
    assert width[1] < 0.75 * width[0]
