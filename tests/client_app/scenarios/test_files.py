"""Benchmark scenarios on real data: disjoint shares, tasks that differ. Skipped without FEDALLOY_BENCHMARK_DATA."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app.data.dataset import ClientData
from client_app.model.personal import PersonalModel
from client_app.plan.training import logits_of
from client_app.scenarios import FROM_FILES, ScenarioError, bases_to_align, cifar, multi_modal
from client_app.scenarios.files import SCENARIOS, load_files
from client_app.scenarios.texts import (
    PROMPT_TASKS,
    PROMPT_TEST,
    PROMPT_TRAIN,
    TEXT_TASKS,
    prompt_families,
    read_jsonl,
)
from client_app.settings import DataSettings, ModelSettings, Settings
from tests.toys import tiny_models, toy_data

ROOT = Path(os.environ.get("FEDALLOY_BENCHMARK_DATA", "/nowhere"))


def settings_for(state: Path, client: int, clients: int, seed: int = 0, root: Path = ROOT, **model: Any) -> Settings:
    data, chosen = DataSettings(data_root=str(root)), ModelSettings(**model)
    return Settings(f"client-{client}", state, "", client, clients, seed, 4, 8.0, 0.0, chosen, data)


@pytest.fixture(scope="module")
def root() -> Path:
    if not (ROOT / "vision").is_dir():
        pytest.skip("no benchmark data: FEDALLOY_BENCHMARK_DATA names no folder with vision, text, gen and models")
    return ROOT


def examples(data: ClientData, split: str) -> set[bytes]:
    found = data.splits[split]
    inputs = next(tensor for name, tensor in found.inputs.items() if name in ("pixel_values", "input_ids"))
    return {tensor.numpy().tobytes() for tensor in inputs}


def test_shards_of_cifar_are_disjoint_and_a_clients_splits_are_alike() -> None:
    train, test = np.repeat(np.arange(40), 100), np.repeat(np.arange(40), 50)
    shards, tested = cifar.dirichlet_shards(train, test, 0)
    for found, labels in ((shards, train), (tested, test)):
        assert sorted(np.concatenate(found).tolist()) == list(range(len(labels)))
        assert min(len(shard) for shard in found) >= cifar.SMALLEST
    for own, theirs in zip(shards, tested, strict=True):
        shares = [np.bincount(labels[chosen], minlength=40) for chosen, labels in ((own, train), (theirs, test))]
        assert np.abs(shares[0] / 100 - shares[1] / 50).max() <= 0.021
    again, other = (cifar.dirichlet_shards(train, test, seed)[0] for seed in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(shards, other, strict=True))


def test_clients_of_groups_share_no_image_and_mixtures_have_half_of_each_group() -> None:
    train, test = np.repeat(np.arange(40), 100), np.repeat(np.arange(40), 50)
    everybody = [cifar.group_images(train, test, client, 3) for client in range(len(cifar.GROUP_OF))]
    for source, splits in (("train", ("train", "validation")), ("test", ("test",))):
        numbers = np.concatenate([found[name][1] for found in everybody for name in splits])
        assert len(np.unique(numbers)) == len(numbers), source
    classes = [set(train[found["train"][1]].tolist()) for found in everybody]
    for client, found in enumerate(everybody):
        assert {name: len(numbers) for name, (_, numbers) in found.items()} == cifar.GROUP_IMAGES
        assert set(test[found["test"][1]].tolist()) == classes[client]
        groups = cifar.GROUP_OF[client]
        assert classes[client] == set().union(*(classes[group] for group in groups)), client
        assert [len(classes[client] & classes[group]) for group in groups] == [16] * len(groups)
    assert len(classes[0] & classes[1]) == 8
    other = cifar.group_images(train, test, 0, 4)["train"][1]
    assert not np.array_equal(other, everybody[0]["train"][1])


def test_clients_of_cifar_share_the_head(root: Path, tmp_path: Path) -> None:
    base, data = load_files("cifar100-20", settings_for(tmp_path, 3, 20))
    alone = load_files("cifar100-20", settings_for(tmp_path, 3, 4))[1]
    assert examples(data, "train") == examples(alone, "train")
    assert not examples(data, "train") & (examples(data, "validation") | examples(data, "test"))
    assert base.heads == ("classifier",)
    assert len(base.model.config.id2label) == 40  # type: ignore[union-attr,arg-type]
    assert PersonalModel(base, 4, 8.0).layout.size == 6 * 2 * 2 * 4 * 128 + 40 * 129


def test_clients_of_two_architectures_share_classes_and_no_image(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "Distilled", partial(cifar.Distilled, width=16, depth=1, heads=2, mlp=16, steps=2))
    found = [load_files("mixed-arch", settings_for(tmp_path, client, 8)) for client in (0, 4, 1)]
    bases, shares = [base for base, _ in found], [data for _, data in found]
    assert len({base.fingerprint for base in bases}) == 2
    assert {base.reference.fingerprint for base in bases if base.reference} == {bases[0].fingerprint}
    assert {name: len(split) for name, split in shares[0].splits.items()} == {
        "train": 120,
        "validation": 120,
        "test": 300,
    }
    assert examples(shares[0], "test") == examples(shares[1], "test")
    assert not examples(shares[0], "train") & examples(shares[1], "train")
    classes = [set(data.splits["train"].labels.tolist()) for data in shares]
    assert classes[0] == classes[1]
    assert not classes[0] & classes[2]
    aligned, public = bases_to_align("mixed-arch", tmp_path / ".cache", str(root))
    assert [base.fingerprint for base in aligned] == [base.fingerprint for base in bases[:2]]
    images = {tensor.numpy().tobytes() for tensor in public.inputs["pixel_values"]}
    assert len(images) == 40 * cifar.PUBLIC
    assert not images & set().union(*(examples(data, split) for data in shares for split in data.splits))


def test_clients_of_pacs_share_classes_and_not_domains_or_images(root: Path, tmp_path: Path) -> None:
    found = [load_files("pacs", settings_for(tmp_path, client, 8))[1] for client in (0, 4, 1)]
    for data in found:
        assert {name: len(split) for name, split in data.splits.items()} == {
            "train": 100,
            "validation": 100,
            "test": 300,
        }
        assert data.splits["train"].inputs["pixel_values"].shape == (100, 3, 32, 32)
        assert not examples(data, "train") & (examples(data, "validation") | examples(data, "test"))
    first, same_domain, other = (examples(data, "train") for data in found)
    assert not first & same_domain
    assert not first & other
    assert examples(found[0], "test") == examples(found[1], "test") != examples(found[2], "test")
    base, data = load_files(
        "pacs", settings_for(tmp_path, 0, 4, labels="dog,elephant,giraffe,guitar,horse,house,person")
    )
    assert base.heads == ("classifier",)  # all clients have the same labels
    with torch.no_grad():
        assert base.model(**data.splits["test"].batch(torch.arange(3)).inputs).logits.shape == (3, 7)


def test_texts_are_scored_against_descriptions_of_their_tasks_labels(root: Path, tmp_path: Path) -> None:
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    layouts = set()
    for client, (task, labels) in enumerate(TEXT_TASKS.items()):
        model, data = load_files("text-8", settings_for(tmp_path, client, 8, base_model=str(base)))
        assert data.task == task
        assert {name: len(split) for name, split in data.splits.items()} == {
            "train": 16,
            "validation": 60,
            "test": 100,
        }
        personal = PersonalModel(model, 4, 8.0)
        logits = logits_of(personal, data.splits["test"].batch(torch.arange(3)))
        assert logits.shape == (3, len(labels))
        layouts.add(personal.layout.digest)
    assert len(layouts) == 1  # one adapter serves them all


def test_clients_with_several_modalities_have_examples_of_their_own(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_modal, "Recipe", partial(multi_modal.Recipe, steps=2, layers=1))
    found = {client: load_files("multi-modal", settings_for(tmp_path, client, 8)) for client in (0, 2, 4, 5)}
    for client, (base, data) in found.items():
        assert tuple(data.tasks) == multi_modal.CLIENTS[client]
        model = PersonalModel(base, 2, 4.0)
        for name, task in data.tasks.items():
            assert task.splits["train"].labels.shape[0] == multi_modal.TASKS[name][3]
            assert len(task.splits["validation"]) > 50
            batch = replace(task.splits["test"].batch(torch.arange(2)), task=name)
            assert logits_of(model, batch).shape[:1] == (2,)
    images = {client: examples(found[client][1].tasks[task], "train") for client, task in ((0, "object"), (2, "match"))}
    assert not images[0] & images[2]
    assert not images[0] & examples(found[2][1].tasks["match"], "test")
    pool, parts = (ask("statement", root) for ask in (multi_modal.pool_of, multi_modal.parts_of))
    sentences = [{pool.prompts[number] for number in numbers} for numbers in parts.values()]
    assert sum(map(len, sentences)) == len(set().union(*sentences))


def test_prompt_tasks_differ_and_depend_on_the_seed_alone(root: Path, tmp_path: Path) -> None:
    base = tiny_models.save_llama(tmp_path / "llama")

    def load(client: int, seed: int = 0) -> ClientData:
        return load_files("prompt-tasks", settings_for(tmp_path, client, 2, seed, base_model=str(base)))[1]

    first, again, reseeded, other = load(0), load(0), load(0, 7), load(1)
    assert first.task != other.task
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 100, "validation": 20, "test": 40}
    assert torch.equal(first.splits["train"].labels, again.splits["train"].labels)
    assert examples(first, "train") != examples(reseeded, "train")
    assert not examples(first, "train") & examples(first, "validation")
    assert torch.equal(first.splits["test"].labels, reseeded.splits["test"].labels)


def prompt_rows(family: str, template: str, count: int, **given: str) -> list[dict[str, Any]]:
    named = {"family": family, "task": f"{family}_{template}"}
    texts = [{"prompt": f"{template}: what is {family} {n}?", "completion": f"{n}"} for n in range(count)]
    return [named | text | given for text in texts]


def test_a_family_of_prompt_tasks_is_one_clients() -> None:
    enough = PROMPT_TRAIN + PROMPT_TEST
    twice = prompt_rows("bb", "x", enough)
    rows = [
        *prompt_rows("a", "short", enough + 5),
        *prompt_rows("a", "in many more words", enough + 5),
        *twice,
        *prompt_rows("c", "some", enough - 1),
        *prompt_rows("empty", "", enough, completion=" "),
        *prompt_rows("same", "", enough, completion="yes"),
        *[row | {"family": "copies-prompts", "task": "y"} for row in twice],
        *[
            row | {"prompt": f"say {row['prompt']}", "completion": row["prompt"]} | {"family": "reverse"}
            for row in twice
        ],
        *[row | {"family": "repeats", "task": "z", "prompt": "what was it again?"} for row in twice],
    ]
    found = prompt_families(rows)
    assert {family: {row["task"] for row in kept} for family, kept in found.items()} == {
        "a": {"a_short"},
        "bb": {"bb_x"},
    }
    assert found["bb"] == twice
    with pytest.raises(ScenarioError, match="an example of task 'a_short' has no 'family'"):
        prompt_families([{key: value for key, value in rows[0].items() if key != "family"}])


def test_no_client_of_prompt_tasks_is_tested_on_what_another_trains_on(root: Path) -> None:
    families = list(prompt_families(read_jsonl(root / "gen" / "t0_short600.jsonl.gz")).values())
    assert len(families) >= PROMPT_TASKS
    prompts = [{row["prompt"] for row in family} for family in families[:PROMPT_TASKS]]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == sum(map(len, families[:PROMPT_TASKS]))
    sentences = [
        {r["completion"] for r in rows if len(r["completion"].split()) > 3} for rows in families[:PROMPT_TASKS]
    ]
    assert sum(map(len, sentences)) == len(set().union(*sentences))


def test_names_agree_and_what_is_missing_is_said(tmp_path: Path) -> None:
    assert tuple(SCENARIOS) == FROM_FILES
    with pytest.raises(ScenarioError, match="set data-root"):
        load_files("pacs", Settings("a", tmp_path, "", 0, 1, 0, 4, 8.0, 0.0))
    with pytest.raises(ScenarioError, match=r"pacs48\.npz cannot be read"):
        load_files("pacs", settings_for(tmp_path, 0, 1, root=tmp_path))
    with pytest.raises(ScenarioError, match="at most 8 clients, got num-partitions = 9"):
        load_files("text-8", settings_for(tmp_path, 0, 9, root=tmp_path))
