"""Scenario ``digits-tasks``: four tasks at each client, which may come one after another."""

from __future__ import annotations

import itertools

import torch

from client_app.data.arrival import StreamedDataset, streamed
from client_app.scenarios import digits, digits_multimodal, digits_tasks


def test_every_client_has_four_tasks_and_every_task_several_owners_at_both_sites() -> None:
    owners: dict[str, set[str]] = {task: set() for task in digits_multimodal.TASKS}
    for index in range(8):
        tasks, site = digits_multimodal.client_of(index, digits_tasks.CLIENTS)
        assert len(tasks) == 4
        for task in tasks:
            owners[task].add(site.language)
    assert all(sites == {"en", "de"} for sites in owners.values())


def test_tasks_come_one_after_another_and_all_of_them_in_the_end() -> None:
    data = streamed(digits_tasks.load_client(3, 8, 0), "dynamic", 8, 5)
    train = data.splits["train"]
    assert isinstance(train, StreamedDataset)
    tasks = [sorted(set(train.until(round_).labels.tolist())) for round_ in range(1, 9)]
    assert [len(found) for found in tasks] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(set(first) <= set(second) for first, second in itertools.pairwise(tasks))
    assert len(train.until(8)) == len(train)
    assert {part.task for part in data.splits["test"].by_task(torch.arange(len(data.splits["test"])))} == set(
        data.tasks
    )


def test_images_of_a_client_are_nobody_elses_until_the_pool_is_used_up() -> None:
    tasks = [digits_multimodal.client_of(index, digits_tasks.CLIENTS)[0] for index in range(8)]
    shards = [
        digits_multimodal._shard(task, index, tasks, 0).tolist()
        for index, names in enumerate(tasks)
        for task in names
        if "image" in digits_multimodal.TASKS[task][1]
    ]
    pool = len(digits.pools()["train"])
    first = [*itertools.chain(*shards)][:pool]
    assert len(set(first)) == pool
