"""Several splits as one: every example is there once, texts are padded to one width, and choices keep their order."""

from __future__ import annotations

import torch

from client_app.data.dataset import Dataset, MixedDataset
from client_app.data.joined import join
from client_app.data.targets import IGNORED


def texts(first: int, count: int, width: int) -> Dataset:
    ids = torch.arange(first, first + count)[:, None].expand(-1, width)
    return Dataset({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone(), "causal-lm")


def test_batches_have_examples_of_both_in_the_order_that_is_asked_for() -> None:
    both = join([texts(1, 3, 2), texts(4, 2, 4)])
    assert len(both) == 5
    batch = both.batch(torch.tensor([3, 0, 4, 2]))
    assert batch.inputs["input_ids"][:, 0].tolist() == [4, 1, 5, 3]
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [4, 2, 4, 2]
    assert batch.labels[1].tolist() == [1, 1, IGNORED, IGNORED]
    part = both.subset(torch.tensor([4, 1])).batch(torch.tensor([1, 0]))
    assert part.inputs["input_ids"][:, 0].tolist() == [2, 5]


def test_an_empty_split_adds_nothing_and_tasks_are_joined_one_by_one() -> None:
    train, empty = texts(1, 3, 2), texts(9, 0, 2)
    assert join([train, empty]).batch(torch.arange(3)).inputs["input_ids"][:, 0].tolist() == [1, 2, 3]
    mixed = join([MixedDataset.of({"a": train, "b": texts(7, 1, 2)}), MixedDataset.of({"a": texts(4, 2, 3)})])
    assert isinstance(mixed, MixedDataset)
    assert {name: len(part) for name, part in mixed.parts.items()} == {"a": 5, "b": 1}
    assert [part.task for part in mixed.by_task(torch.arange(6))] == ["a", "b"]
