"""Data that arrive over the rounds (FedMosaic's invariants, group 13): arrivals, replay, and runs that are resumed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.data.arrival import StreamedDataset, arrivals_dynamic, arrivals_static, class_groups, streamed
from client_app.data.dataset import ClientData, Dataset, MixedDataset
from client_app.own.files import load_own, read_own
from client_app.own.reading.text_files import DataError
from client_app.settings import SettingsError
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

LABELS = np.repeat(np.arange(8), [9, 3, 7, 12, 5, 8, 4, 6])


def stream(arrival: str = "dynamic", rounds: int = 6, seed: int = 3) -> StreamedDataset:
    labels = torch.from_numpy(LABELS)
    whole = Dataset({"pixel_values": torch.arange(len(LABELS)).float()[:, None]}, labels)
    found = streamed(ClientData("toy", whole.kind, {"train": whole, "test": whole}), arrival, rounds, seed)
    assert type(found.splits["test"]) is Dataset
    train = found.splits["train"]
    assert isinstance(train, StreamedDataset)
    return train


def batches(data: StreamedDataset, round_: int, size: int = 5, steps: int = 7, seed: int = 0) -> list[torch.Tensor]:
    return data.until(round_).batches(size, steps, round_, lambda number: 100 * seed + number)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 30), st.integers(0, 2**62))
def test_every_example_arrives_once_and_something_is_there_from_the_first_round(
    labels: list[int], rounds: int, seed: int
) -> None:
    for find in (arrivals_static, arrivals_dynamic):
        found = find(np.array(labels), rounds, seed)
        assert found.min() == 1
        assert found.max() <= rounds
        assert np.array_equal(found, find(np.array(labels), rounds, seed))


def test_static_chunks_are_equal() -> None:
    counts = np.bincount(arrivals_static(LABELS, 6, 0))[1:]
    assert counts.tolist() == [9] * 6
    assert not np.array_equal(arrivals_static(LABELS, 6, 0), arrivals_static(LABELS, 6, 1))


@pytest.mark.parametrize("rounds", [4, 8, 6, 3])
def test_tasks_come_one_after_another_in_slices_that_partition_them(rounds: int) -> None:
    tasks, found = class_groups(LABELS, 5), arrivals_dynamic(LABELS, rounds, 5)
    assert sorted(set(tasks)) == [0, 1, 2, 3]
    for task in range(4):
        mine = found[tasks == task]
        assert len({label for label in LABELS[tasks == task]}) == 2
        first, last = task * rounds / 4, (task + 1) * rounds / 4
        assert mine.min() == int(first) + 1
        assert mine.max() <= -(-(task + 1) * rounds // 4)
        if rounds % 4 == 0:  # equal slices, but for one example
            slices = np.bincount(mine, minlength=rounds + 1)[int(first) + 1 : int(last) + 1]
            assert slices.sum() == len(mine)
            assert slices.max() - slices.min() <= 1


@pytest.mark.parametrize("arrival", ["static", "dynamic"])
def test_batches_are_as_many_and_as_large_as_wanted_without_repetition_from_what_has_arrived(arrival: str) -> None:
    data = stream(arrival)
    for round_ in range(1, 8):  # one more than there are
        found, memory = batches(data, round_), data.until(round_)
        assert [len(batch) for batch in found] == [5] * 7
        assert int(memory.arrivals.max()) == min(round_, 6)
        for number, batch in enumerate(found, start=1):
            before, new = int((memory.arrivals < round_).sum()), int((memory.arrivals == round_).sum())
            if before + number * new // 7 >= 5:
                assert len(set(batch.tolist())) == 5
    assert len(data.until(6)) == len(data)


def test_a_batch_has_repetitions_only_while_fewer_have_arrived() -> None:
    data = stream("dynamic", rounds=4)
    first = data.until(1)
    large = first.batches(len(first) + 2, 3, 1, lambda number: number)
    assert [len(batch) for batch in large] == [len(first) + 2] * 3


def test_new_and_rarely_drawn_examples_come_first() -> None:
    data = stream("dynamic", rounds=4)
    memory = data.until(3)
    new = set((memory.arrivals == 3).nonzero().flatten().tolist())
    last = batches(data, 3)[-1].tolist()
    assert len(new & set(last)) > len(last) * len(new) / len(memory)
    drawn = list(itertools.chain(*(batch.tolist() for batch in batches(data, 5, steps=54))))  # after all have arrived
    counts = np.bincount(drawn, minlength=len(data))
    assert counts.sum() == 5 * len(data)
    assert counts.std() < 1.5  # draws without a memory of draws: about 2.1


def test_a_round_depends_on_its_number_and_the_seed_alone() -> None:
    alone = batches(stream(), 4)
    after_others = [batches(stream(), round_) for round_ in (1, 2, 3, 4)][-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, after_others, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, batches(stream(), 4, seed=1), strict=True))


def stories(count: int = 12) -> Dataset:
    """Texts to be written, three of them of a kind after another."""
    tokens = torch.arange(count)[:, None].repeat(1, 3)
    return Dataset({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens.clone(), "causal-lm")


def test_tasks_that_a_column_names_come_in_their_order() -> None:
    texts = stories()
    data = ClientData("story", "causal-lm", {"train": texts}, streams=torch.arange(12) % 3)
    train = streamed(data, "dynamic", 6, 0).splits["train"]
    assert isinstance(train, StreamedDataset)
    for task in range(3):
        assert sorted(set(train.arrivals[task::3].tolist())) == [2 * task + 1, 2 * task + 2]
    memory = train.until(4)
    assert len(memory) == 8
    batch = memory.batch(torch.tensor([7, 0]))
    assert batch.labels.tolist() == [[10] * 3, [0] * 3]
    assert [tuple(drawn.shape) for drawn in batches(memory, 4)] == [(5,)] * 7


@pytest.mark.parametrize("arrival", ["static", "dynamic"])
def test_several_tasks_arrive_and_each_batch_is_read_by_its_task(arrival: str) -> None:
    parts = [ClientData(name, "causal-lm", {"train": stories(count)}) for name, count in (("a", 12), ("b", 9))]
    train = streamed(ClientData.of_tasks(parts), arrival, 4, 1).splits["train"]
    assert isinstance(train, StreamedDataset)
    assert isinstance(train, MixedDataset)
    for round_ in (1, 2, 3, 4):
        memory = train.until(round_)
        assert isinstance(memory, MixedDataset)
        assert memory.arrivals.tolist() == [a for a in train.arrivals.tolist() if a <= round_]
        names = {name for name, part in memory.parts.items() if len(part)}
        assert len(names) == (1 if arrival == "dynamic" and round_ < 3 else 2)
        for drawn in batches(memory, round_):
            assert sum(len(batch) for batch in memory.by_task(drawn)) == 5
    # A subset in any order keeps each example's round.
    mixed = train.subset(torch.tensor([20, 3, 12, 0]))
    assert mixed.arrivals.tolist() == train.arrivals[[3, 0, 20, 12]].tolist()
    assert [batch.labels[:, 0].tolist() for batch in mixed.by_task(torch.arange(4))] == [[3, 0], [8, 0]]


def test_without_tasks_and_classes_only_equal_shares_can_arrive() -> None:
    data = ClientData("story", "causal-lm", {"train": stories()})
    with pytest.raises(
        SettingsError, match=r"task-arrival = 'dynamic' .* \(story, causal-lm\) have neither .*task-column"
    ):
        streamed(data, "dynamic", 3, 0)
    train = streamed(data, "static", 3, 0).splits["train"]
    assert isinstance(train, StreamedDataset)
    assert [len(train.until(round_)) for round_ in (1, 2, 3)] == [4, 8, 12]


SUBJECTS = ("tides", "bread", "roofs")


def subjects(rows: int = 30) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{SUBJECTS[n * 3 // rows]} {n}?", "completion": f"yes {n}", "subject": SUBJECTS[n * 3 // rows]}
        for n in range(rows)
    ]


def test_the_tasks_of_own_data_come_in_the_order_of_their_first_rows(tmp_path: Path) -> None:
    llama = tiny_models.save_llama(tmp_path / "llama")
    rows = subjects()
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    given = replace(settings_of(path, tmp_path, llama, data={"task_column": "subject"}), task_arrival="dynamic")
    examples = read_own(given).splits["train"]
    of_row = [next(row["subject"] for row in rows if row["prompt"] == example.prompt) for example in examples]
    _, data = load_own(given)
    train = streamed(data, given.task_arrival, 6, 1).splits["train"]
    assert isinstance(train, StreamedDataset)
    assert len(train) == len(of_row) > 20
    for number, subject in enumerate(SUBJECTS):
        rounds = {arrival for arrival, found in zip(train.arrivals.tolist(), of_row, strict=True) if found == subject}
        assert rounds == {2 * number + 1, 2 * number + 2}, "two of the six rounds for each"


def test_a_row_without_its_task_is_named(tmp_path: Path) -> None:
    rows = subjects()
    for row in rows[7:]:
        del row["subject"]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=r"x\.jsonl.*(line|row) \d+.*subject"):
        load_own(
            settings_of(path, tmp_path, tiny_models.save_llama(tmp_path / "llama"), data={"task_column": "subject"})
        )
