"""Scenarios ``text-6`` to ``text-12``: the clients of ``instruct-*``, with texts scored against descriptions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from client_app.model.personal import PersonalModel
from client_app.plan.evaluation import evaluate
from client_app.scenarios import FROM_FILES, described, instruct
from client_app.scenarios.files import SCENARIOS, load_files
from client_app.settings import DataSettings, ModelSettings, Settings
from tests.toys import tiny_models


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Texts of every task."""
    (tmp_path / "text").mkdir()
    for task, question in instruct.QUESTIONS.items():
        rows = [{"meta": task, "labels": list(question.answers)}]
        for number in range(500):
            label = number % len(question.answers)
            text = f"text {number} of {task} is {question.answers[label]}"
            rows.append({"s": "test" if number % 4 == 0 else "train", "x": text, "y": label})
        with gzip.open(tmp_path / "text" / f"{task}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return tmp_path


def test_every_task_has_a_description_for_each_answer() -> None:
    assert list(described.SETS) == [name for name in FROM_FILES if name in described.SETS]
    for clients in described.SETS.values():
        for task in clients.tasks:
            assert len(described.DESCRIBED[task]) == len(instruct.QUESTIONS[task].answers), task
            assert len(set(described.DESCRIBED[task])) == len(described.DESCRIBED[task])


def test_clients_have_the_texts_of_the_instruct_scenario(root: Path) -> None:
    folder = tiny_models.save_bert(root / "bert", ["text", "of", "is", *instruct.QUESTIONS])
    model = ModelSettings(base_model=str(folder))
    settings = Settings("c", root, "", 5, 6, 1, 4, 8.0, 0.0, model, DataSettings(data_root=str(root)))
    base, data = load_files("text-6-unrelated", settings)
    rows = instruct.own_rows(instruct.SETS["instruct-6-unrelated"], 5, 1, root)
    assert data.task == "sms"
    assert SCENARIOS["text-6-unrelated"].clients == 6
    assert {name: split.labels.tolist() for name, split in data.splits.items()} == {
        name: [row["y"] for row in part] for name, part in rows.items()
    }
    assert 0 <= evaluate(PersonalModel(base, 4, 8.0), data.splits["test"], data)["accuracy"] <= 1
