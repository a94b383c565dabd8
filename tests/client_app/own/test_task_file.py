"""A client's own data for several tasks, over a FLAVA in a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from client_app.data.dataset import ClientData
from client_app.model.bases.model_folders import BaseModelError
from client_app.model.personal import PersonalModel
from client_app.own.reading.text_files import DataError
from client_app.own.task_file import load_tasks
from client_app.session import Executor
from client_app.settings import ModelSettings, Settings
from fedalloy_adapters.groups import groups_of
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app import own_clients
from tests.toys.tiny_models import save_bert, save_flava, save_vilt
from tests.toys.toy_data import opinions, write_captions, write_jsonl

TASKS = """
[mood]
data-path = "mood.jsonl"
labels = "neg,pos"

[caption]
task = "image-text-to-text"
data-path = "captions/data.jsonl"
max-length = 24
generate-examples = 2
max-new-tokens = 2
"""


def words_in(*paths: Path) -> list[str]:
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [word for row in rows for value in row.values() for word in str(value).split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("own-tasks")
    write_jsonl(found / "mood.jsonl", opinions(20, 0))
    write_captions(found / "captions", 8, 0)
    words = words_in(found / "mood.jsonl", found / "captions" / "data.jsonl")
    save_flava(found / "flava", words)
    save_bert(found / "bert", words)
    (found / "tasks.toml").write_text(TASKS)
    return found


def settings_of(folder: Path, base: str = "flava", tasks: str = "tasks.toml") -> Settings:
    return own_clients.settings_of(folder / tasks, folder / "state", folder / base)


def test_a_registration_names_every_task_with_its_groups(folder: Path) -> None:
    registration = Executor().register(settings_of(folder))
    assert {task.name: task.kind for task in registration.tasks} == {
        "mood": "text-classification",
        "caption": "image-text-to-text",
    }
    mood, caption = registration.tasks
    assert set(mood.groups) == {"shared", "mod/text", "task/classify", "pair/text/classify", "head/mood"}
    assert list(caption.modalities) == ["image", "text"]
    assert mood.examples["train"] + mood.examples["validation"] + mood.examples["test"] == 20


def test_both_tasks_are_trained_and_scored(folder: Path) -> None:
    executor, settings = Executor(), settings_of(folder)
    training = Training(local_steps=3, batch_size=8, learning_rate=0.05)
    mix = steps.mixture("local")
    plan = plan_pb2.Plan(
        version=1,
        run_name="own-tasks",
        client_id="berlin",
        round=1,
        steps=[
            steps.initialise("local", 0),
            steps.train(training, mix, ["local"]),
            steps.evaluate(training, mix),
            steps.save(mix),
        ],
    )
    report, _ = executor.carry_out(settings, plan, {})
    assert set(report.results[1].train.task_losses) == {"mood", "caption"}
    metrics = report.results[2].evaluate.metrics
    assert {"mood/accuracy", "mood/f1", "caption/perplexity", "caption/exact_match", "loss"} <= set(metrics)
    assert (settings.run_directory("own-tasks") / "adapter" / "adapter_config.json").exists()


def test_groups_are_those_of_the_tasks(folder: Path) -> None:
    base, data = load_tasks(settings_of(folder))
    assert isinstance(data, ClientData)
    layout = PersonalModel(base, 2, 4.0).layout
    assert set(groups_of(layout)) == {group for task in data.tasks.values() for group in task.groups}


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("x = 1", "expected a table for each task and nothing else, found x"),
        ("[mood]\nlabels = 'a,b'", "task 'mood': no data-path"),
        ("[mood]\ndata-path = 'mood.jsonl'", "task 'mood': no labels, on which all owners of its head must agree"),
        ("[mood]\ndata-path = 'mood.jsonl'\ncolor = 1", "task 'mood': unknown key 'color', expected some of task"),
        ("[mood]\ndata-path = 'mood.jsonl'\nlabels = 'a,b'", "is not one of the labels of this run"),
        ("[", "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_task_is_named(folder: Path, text: str, finding: str) -> None:
    (folder / "wrong.toml").write_text(text)
    with pytest.raises(DataError, match=finding):
        load_tasks(settings_of(folder, tasks="wrong.toml"))


def test_a_model_that_does_not_read_what_a_task_has_is_refused_by_the_tasks_name(folder: Path) -> None:
    with pytest.raises(BaseModelError, match=r"has no processor of images and texts \(task 'image-text-to-text'\)"):
        load_tasks(settings_of(folder, base="bert"))
    save_vilt(folder / "vilt", words_in(folder / "mood.jsonl"))
    (folder / "texts.toml").write_text(TASKS.partition("[caption]")[0])
    with pytest.raises(BaseModelError, match=r"does not answer as the task 'mood' \(text-classification\) needs it"):
        load_tasks(settings_of(folder, base="vilt", tasks="texts.toml"))
    nowhere = replace(settings_of(folder), model=ModelSettings(base_model="facebook/flava-full@refs/pr/5"))
    with pytest.raises(BaseModelError, match="hf download facebook/flava-full --revision refs/pr/5"):
        load_tasks(nowhere)
