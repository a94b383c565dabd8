"""What stays in memory between requests, and what does not."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from client_app.own.reading.text_files import DataError
from client_app.plan.interpreter import PlanError
from client_app.plan.progress import Cancelled, listening
from client_app.session import Executor, base_and_data
from client_app.settings import Settings, read_settings
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.steps import Training, evaluate, initialise, mixture, send, train
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

MESSAGES = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_cache: Path) -> Path:
    """One state directory."""
    folder = tmp_path_factory.mktemp("state")
    (folder / ".cache").symlink_to(base_cache)
    return folder


def settings(folder: Path, **run_config: Any) -> Settings:
    node = {"partition-id": 1, "num-partitions": 2, "state-dir": str(folder), "client-id": "berlin"}
    return read_settings(Context(1, 7, node, RecordDict(), {"lora-r": 2, **run_config}))


def plan(round_: int, split: str = "train", run_name: str = "other") -> plan_pb2.Plan:
    training = Training(local_steps=1, batch_size=4)
    steps = [initialise("a", seed=1), initialise(f"b{round_ % 3}", seed=2)]
    steps += [train(training, mixture("a", f"b{round_ % 3}"), ["a"])]
    steps[-1].train.split = split
    steps += [evaluate(training, mixture("a"), split="validation"), send(training, "a", relative_to_received=False)]
    return plan_pb2.Plan(version=1, run_name=run_name, client_id="berlin", round=round_, seed=0, steps=steps)


def held() -> tuple[int, int, int]:
    """Live tensors, live modules, and bytes of GPU memory (0 on a machine without one)."""
    gc.collect()
    found = gc.get_objects()
    tensors = sum(issubclass(type(item), torch.Tensor) for item in found)
    modules = sum(issubclass(type(item), torch.nn.Module) for item in found)
    return tensors, modules, torch.cuda.memory_allocated()


@pytest.mark.long
def test_a_hundred_messages_leave_nothing_behind(folder: Path) -> None:
    """Good plans, plans that fail, plans that are cancelled, and another run's settings in between."""
    executor, here, other = Executor(), settings(folder), settings(folder, **{"lora-r": 3, "seed": 1})
    seen = []
    round_ = 0

    def cancel(activity: str, done: int, total: int) -> None:
        if activity == "train":
            raise Cancelled("enough")

    for message in range(1, MESSAGES + 1):
        if message % 10 == 3:
            with pytest.raises(PlanError, match="no split 'nowhere'"):
                executor.carry_out(here, plan(round_ + 1, "nowhere", "hundred"), {})
        elif message % 10 == 5:
            with listening(cancel), pytest.raises(Cancelled):
                executor.carry_out(here, plan(round_ + 1, run_name="hundred"), {})
        elif message % 10 == 7:
            executor.register(other)
        else:
            round_ += 1
            executor.carry_out(here, plan(round_, run_name="hundred"), {})
        if message % 20 == 0:
            seen.append(held())
    assert seen[0][0] > 0
    assert seen[0][1] > 0
    assert seen[1:] == seen[:1] * (len(seen) - 1)


def test_one_base_model_at_a_time(folder: Path) -> None:
    executor = Executor()
    executor.register(settings(folder))
    first = _model(executor)
    executor.register(settings(folder))
    assert _model(executor)() is first() is not None
    executor.register(settings(folder, **{"lora-r": 3}))
    gc.collect()
    assert first() is None


def test_an_error_evicts_the_model_and_a_cancelled_plan_does_not(folder: Path) -> None:
    executor, here = Executor(), settings(folder)
    executor.register(here)
    kept = _model(executor)

    def cancel(activity: str, done: int, total: int) -> None:
        if (activity, done) == ("train", 0):
            raise Cancelled("enough")

    with listening(cancel), pytest.raises(Cancelled):
        executor.carry_out(here, plan(1), {})
    assert _model(executor)() is kept() is not None
    with pytest.raises(PlanError):
        executor.carry_out(here, plan(1, "nowhere"), {})
    gc.collect()
    assert kept() is None


def _model(executor: Executor) -> weakref.ref[torch.nn.Module]:
    assert executor._held is not None
    return weakref.ref(executor._held[0].module)


def test_data_without_a_test_split_are_refused_before_the_first_round(tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(10, 0))
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    for fractions, fits in (("1,0,0", False), ("0.8,0.2,0", False), ("0.8,0,0.2", True)):
        asked = settings_of(path, tmp_path / "state", base, {"split_fractions": fractions})
        if fits:
            base_and_data(asked)
            continue
        with pytest.raises(DataError, match=r"x\.jsonl, task 'text-classification': no example is in split 'test'"):
            base_and_data(asked)
