"""Scenario ``digits-multimodal``: each client's tasks, and that none trains on anything that a client is tested on."""

from __future__ import annotations

import itertools

import pytest
import torch

from client_app.data.dataset import ClientData
from client_app.data.targets import IGNORED
from client_app.scenarios import digits
from client_app.scenarios import digits_multimodal as scenario

VOCABULARY = scenario.VOCABULARY


def clients(count: int = 8, seed: int = 0) -> list[ClientData]:
    return [scenario.load_client(index, count, seed) for index in range(count)]


def rows(data: ClientData, task: str, split: str) -> set[bytes]:
    images = data.tasks[task].splits[split].inputs["pixel_values"]
    return {image.numpy().tobytes() for image in images}


def texts(data: ClientData, task: str, split: str) -> list[str]:
    return [VOCABULARY.decode(ids[1:]) for ids in data.tasks[task].splits[split].inputs["input_ids"]]


def test_sentences_have_their_values_and_pools_are_disjoint() -> None:
    for language in scenario.WORDS:
        pools = {pool: scenario.sentences(language, pool) for pool in scenario.SENTENCE_POOLS}
        for first, second in itertools.combinations(pools.values(), 2):
            assert not {text for text, _ in first} & {text for text, _ in second}
        assert all(len(pool) > 25 for pool in pools.values())
        for text, value in itertools.chain(*pools.values()):
            words = {word: number for number, word in enumerate(scenario.WORDS[language])}
            numbers = [words[word] for word in text.split() if word in words]
            asked = {
                "after": 1, "nach": 1, "before": -1, "vor": -1, "twice": numbers[0], "doppelte": numbers[0],
                "half": -numbers[0] / 2, "hälfte": -numbers[0] / 2,
            }  # fmt: skip
            assert value == numbers[0] + sum(asked.get(word, 0) for word in text.split())
            assert len(numbers) == 1


def test_every_task_has_several_owners_at_both_sites_or_with_different_neighbours() -> None:
    owners: dict[str, list[int]] = {}
    for index in range(8):
        tasks, _ = scenario.client_of(index)
        for task in tasks:
            owners.setdefault(task, []).append(index)
    assert set(owners) == set(scenario.TASKS)
    assert all(len(found) >= 2 for found in owners.values())
    assert scenario.client_of(8)[0] == scenario.client_of(0)[0]
    assert scenario.client_of(8)[1] != scenario.client_of(0)[1]


def test_nobody_trains_on_anothers_images_or_on_what_is_tested() -> None:
    found = clients()
    shards = {
        (index, task): rows(data, task, "train")
        for index, data in enumerate(found)
        for task in data.tasks
        if "image" in data.tasks[task].modalities
    }
    tasks = [scenario.client_of(index)[0] for index in range(8)]
    numbers = {key: set(scenario._shard(key[1], key[0], tasks, 0).tolist()) for key in shards}
    for first, second in itertools.combinations(numbers.values(), 2):
        assert not first & second
    held_out = set(digits.pools()["test"].tolist()) | set(digits.pools()["validation"].tolist())
    assert not held_out & set().union(*numbers.values())
    for data in found:
        for task in set(data.tasks) & {"number", "answer"}:
            seen = {text.split(" [")[0] for text in texts(data, task, "train")}
            assert not seen & set(texts(data, task, "test"))


def test_the_seed_decides_training_data_and_nothing_else() -> None:
    one, same, other = (scenario.load_client(4, 8, seed) for seed in (0, 0, 1))
    for task in one.tasks:
        for split, data in one.tasks[task].splits.items():
            inputs = {name: tensor for name, tensor in data.inputs.items()}
            again = same.tasks[task].splits[split].inputs
            assert all(torch.equal(tensor, again[name]) for name, tensor in inputs.items())
            different = other.tasks[task].splits[split].inputs
            name = "pixel_values" if task == "digit" else "input_ids"
            equal = inputs[name].shape == different[name].shape and torch.equal(inputs[name], different[name])
            assert equal == (split != "train")


def test_sites_see_and_number_and_name_things_differently() -> None:
    first, second = (scenario.load_client(index, 8, 0).tasks["digit"].splits["test"] for index in (0, 4))
    assert torch.equal(first.inputs["pixel_values"].rot90(1, (2, 3)), second.inputs["pixel_values"])
    assert not torch.equal(first.labels, second.labels)
    german = texts(scenario.load_client(6, 8, 0), "compare", "test")
    assert any("mehr als" in text for text in german)
    assert not any("more" in text for text in german)
    assert scenario.describe(7, "en") == "seven , odd and large"
    assert scenario.describe(2, "de") == "zwei , gerade und klein"


def test_questions_about_images_are_answered_from_both() -> None:
    data = scenario.load_client(2, 8, 0)
    split = data.tasks["compare"].splits["test"]
    usual = digits.view(digits.pools()["test"][: len(split)], scenario._USUAL).labels.tolist()
    words = {word: number for number, word in enumerate(scenario.WORDS["en"])}
    for text, digit, label in zip(texts(data, "compare", "test"), usual, split.labels.tolist(), strict=True):
        kind, _, word = text.split()
        assert label == int(digit > words[word] if kind == "more" else digit < words[word])
    for only in (
        split.labels.float(),
        torch.tensor([text.startswith("more") for text in texts(data, "compare", "test")]),
    ):
        assert 0.3 < float(only.float().mean()) < 0.7  # neither half says it alone


def test_what_is_to_be_written_are_the_labels_and_an_end() -> None:
    split = scenario.load_client(7, 8, 0).tasks["answer"].splits["train"]
    for ids, labels in zip(split.inputs["input_ids"], split.labels, strict=True):
        targets = labels != IGNORED
        assert torch.equal(ids[targets], labels[targets])
        assert int(labels[targets][-1]) == VOCABULARY.END
        assert "," in VOCABULARY.decode(labels[targets])
    assert VOCABULARY.decode(torch.tensor([1, *VOCABULARY.encode("half of two"), VOCABULARY.END, 5])) == "half of two"


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_any_number_of_clients_can_take_part(count: int) -> None:
    for data in clients(count):
        assert all(len(split) for split in data.splits.values())
