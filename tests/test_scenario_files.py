"""Benchmark scenarios on real data: disjoint shares, tasks that differ. Skipped without FEDALLOY_BENCHMARK_DATA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.data import ClientData
from client_app.model import PersonalModel
from client_app.scenarios import FROM_FILES, ScenarioError
from client_app.scenarios.files import SCENARIOS, TEXT_TASKS, load_files
from client_app.settings import DataSettings, ModelSettings, Settings
from tests import tiny_models, toy_data

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


def test_clients_of_cifar_have_classes_of_their_own(root: Path, tmp_path: Path) -> None:
    kinds = []
    for client in range(2):
        base, data = load_files("cifar100", settings_for(tmp_path, client, 8))
        assert base.own_heads == ("classifier",)
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 50, "validation": 50, "test": 200}
        assert not examples(data, "train") & examples(data, "validation")
        assert int(data.splits["test"].labels.max()) == 4
        kinds.append(tuple(base.model.config.id2label.values()))  # type: ignore[union-attr,operator]
    assert not set(kinds[0]) & set(kinds[1])
    model = PersonalModel(base, 4, 8.0)
    assert model.layout.size == 6 * 2 * 2 * 4 * 128


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


def test_text_tasks_are_one_a_client(root: Path, tmp_path: Path) -> None:
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    classes = []
    for client, task in enumerate(TEXT_TASKS):
        _, data = load_files("text-tasks", settings_for(tmp_path, client, 8, base_model=str(base)))
        assert data.task == task
        assert {name: len(split) for name, split in data.splits.items()} == {"train": 64, "validation": 64, "test": 200}
        classes.append(int(data.splits["train"].labels.max()) + 1)
    assert classes == [2, 2, 2, 2, 6, 4, 4, 2]


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


def test_names_agree_and_what_is_missing_is_said(tmp_path: Path) -> None:
    assert tuple(SCENARIOS) == FROM_FILES
    with pytest.raises(ScenarioError, match="set data-root"):
        load_files("pacs", Settings("a", tmp_path, "", 0, 1, 0, 4, 8.0, 0.0))
    with pytest.raises(ScenarioError, match=r"pacs48\.npz cannot be read"):
        load_files("pacs", settings_for(tmp_path, 0, 1, root=tmp_path))
    with pytest.raises(ScenarioError, match="at most 8 clients, got num-partitions = 9"):
        load_files("text-tasks", settings_for(tmp_path, 0, 9, root=tmp_path))
