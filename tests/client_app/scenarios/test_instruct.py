"""Scenarios ``instruct-*``: each client's question, texts that are in one place only, and the scores of answers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from client_app.data.targets import IGNORED, at_targets
from client_app.model.personal import PersonalModel
from client_app.plan.evaluation import evaluate, first_targets, likeliest_of
from client_app.scenarios import FROM_FILES, ScenarioError, instruct
from client_app.scenarios.files import SCENARIOS, load_files
from client_app.settings import DataSettings, ModelSettings, Settings
from tests.toys import tiny_models


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in the benchmark's format: every task has some that other tasks have, too, and some twice."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    chance = np.random.default_rng(0)
    for task, question in instruct.QUESTIONS.items():
        rows = [{"meta": task, "labels": list(question.answers)}]
        for number in range(900):
            label = int(chance.integers(len(question.answers)))
            text = f"text {number % 880} of {task if number > 20 else 'all'} is {question.answers[label]}"
            rows.append({"s": "test" if number % 4 == 0 else "train", "x": text, "y": label})
        with gzip.open(folder / "text" / f"{task}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def settings_of(state: Path, root: Path, base: Path | str, client: int, clients: int, seed: int = 0) -> Settings:
    model = ModelSettings(base_model=str(base), generate_examples=2, max_new_tokens=3)
    return Settings(
        f"c{client}", state, "", client, clients, seed, 4, 8.0, 0.0, model, DataSettings(data_root=str(root))
    )


def rows_of(name: str, root: Path, seed: int = 0) -> list[dict[str, list[str]]]:
    clients = instruct.SETS[name]
    found = [instruct.own_rows(clients, number, seed, root) for number in range(len(clients.tasks))]
    return [{split: [row["x"] for row in part] for split, part in rows.items()} for rows in found]


@pytest.mark.parametrize("name", list(instruct.SETS))
def test_no_text_is_in_two_places(name: str, root: Path) -> None:
    everywhere = [text for rows in rows_of(name, root) for part in rows.values() for text in part]
    assert len(set(everywhere)) == len(everywhere)


@pytest.mark.parametrize("name", list(instruct.SETS))
def test_sizes_are_as_the_scenario_says_and_tests_stay_from_seed_to_seed(name: str, root: Path) -> None:
    assert name in FROM_FILES
    first, second = rows_of(name, root), rows_of(name, root, seed=1)
    assert [len(rows["train"]) for rows in first] == list(instruct.SETS[name].sizes)
    assert SCENARIOS[name].clients == len(first)
    for one, other in zip(first, second, strict=True):
        assert (len(one["validation"]), len(one["test"])) == (instruct.VALIDATION, instruct.TEST)
        assert one["test"] == other["test"]
        assert one["train"] != other["train"]


def test_a_client_is_asked_through_the_chat_template_and_scored_among_its_answers(root: Path, tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama", chat=True)
    base, data = load_files("instruct-6", settings_of(tmp_path, root, folder, 2, 6))
    assert data.task == "trec"
    assert len(data.choices) == 6
    train = data.splits["train"]
    assert data.decode is not None
    shown = data.decode(train.inputs["input_ids"][0])
    assert "What does this question ask for? Answer with one word: description, entity" in shown
    model = PersonalModel(base, 4, 8.0)
    metrics = evaluate(model, data.splits["test"], data)
    assert {"loss", "perplexity", "accuracy", "exact_match"} <= set(metrics)
    assert 0 <= metrics["accuracy"] <= 1


def test_the_likeliest_answer_counts_and_other_tokens_do_not() -> None:
    labels = torch.full((3, 5), IGNORED)
    labels[0, 2:4], labels[1, 3], labels[2, 1] = torch.tensor([7, 1]), 8, 7
    logits = torch.zeros(3, 5, 10)
    logits[:, :, 2] = 9.0  # likelier than any choice, and none
    logits[0, 1, 7], logits[1, 2, 7], logits[2, 0, 7] = 1.0, 1.0, 1.0

    def likeliest(choices: tuple[int, int]) -> int:
        return likeliest_of(at_targets(logits, labels)[first_targets(labels)], labels, choices)

    assert first_targets(labels).tolist() == [0, 2, 3]
    assert likeliest((7, 8)) == likeliest((8, 7)) == 2
    logits[1, 2, 8] = 2.0
    assert likeliest((7, 8)) == 3


def test_answers_that_begin_alike_are_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama", chat=True)
    alike = instruct.Question("Which?", ("plus", "positive"))
    monkeypatch.setitem(instruct.QUESTIONS, "sst2", alike)  # type: ignore[misc]
    with pytest.raises(ScenarioError, match="answers plus, positive begin with the tokens"):
        load_files("instruct-6", settings_of(tmp_path, root, folder, 0, 6))


def test_a_task_with_too_few_texts_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for task in instruct.SETS["instruct-6"].tasks:
        rows = [{"meta": task}, *({"s": "test", "x": f"{task} {i}", "y": 0} for i in range(60))]
        with gzip.open(tmp_path / "text" / f"{task}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(ScenarioError, match="task 'sst2' has 0 train texts left for client 0, expected 64"):
        instruct.own_rows(instruct.SETS["instruct-6"], 0, 0, tmp_path)
