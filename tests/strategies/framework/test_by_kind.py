"""Settings by kind and size: only if a run names a base model and sets none itself; each client gets its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client_app.kinds import KINDS
from client_app.model.personal import PersonalModel
from fedalloy_adapters.factors import Factor, factor_to_proto
from proto.fedalloy.v1 import plan_pb2
from strategies import strategy_from_run_config
from strategies.framework.training import (
    TABLE,
    Training,
    counted,
    local_steps,
    resolved,
    settings_for,
    settings_words,
    width,
)
from tests.fedalloy_adapters.tiny_vit import base_of
from tests.strategies.fleet import client_of

LAYOUT = PersonalModel(base_of(), 2, 4.0).layout
CHOSEN = resolved(Training(), "org/model")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scenario": "instruct-8"},
        {"base-model": "m", "learning-rate": 1e-2},
        {"base-model": "m", "local-steps": 2},
        {"base-model": "m", "optimizer": "sgd"},
        {"base-model": "m", "training-defaults": "plain"},
    ],
)
def test_what_a_run_sets_and_built_in_scenarios_keep_their_numbers(config: dict[str, object]) -> None:
    strategy = strategy_from_run_config(config)  # type: ignore[arg-type]
    said = {key.replace("-", "_"): value for key, value in config.items()}
    for name in ("learning_rate", "batch_size", "local_steps", "local_epochs", "schedule", "warmup_ratio"):
        assert getattr(strategy.training, name) == said.get(name, getattr(Training(), name))
    assert settings_for(strategy.training, ["causal-lm"], LAYOUT) == strategy.training
    assert settings_words(strategy.training, ["causal-lm"], LAYOUT) == ""


def test_a_client_gets_its_kinds_rate_and_batch() -> None:
    strategy = strategy_from_run_config({"base-model": "m", "num-server-rounds": 4})
    client = client_of("berlin", LAYOUT, examples=1000)
    client.registration.tasks[0].kind = "preferences"
    strategy.enrol(client)
    plan = strategy.dispatch(1, client, strategy.brief(1, client), "run", b"key").plan
    (train,) = [step.train for step in plan.steps if step.WhichOneof("kind") == "train"]
    assert train.learning_rate == pytest.approx(5e-4)
    assert (train.batch_size, train.steps, train.schedule_total) == (8, 125, 500)
    assert train.schedule == plan_pb2.SCHEDULE_COSINE
    assert "preferences, width 16: learning-rate 0.0005, batch-size 8" in settings_words(
        strategy.training, ["preferences"], LAYOUT
    )


def test_few_examples_are_passed_over_more_than_once() -> None:
    assert local_steps(CHOSEN, 40) == 30
    assert local_steps(replace(CHOSEN, training_defaults="plain"), 40) == 3


def test_a_gates_own_rate_stays_and_a_share_of_the_rate_stays_a_share() -> None:
    step = plan_pb2.Step()
    step.train.CopyFrom(plan_pb2.TrainStep(learning_rate=CHOSEN.learning_rate / 2, batch_size=16, steps=3))
    step.train.rate_scales.add(factor=factor_to_proto(Factor.GATE), scale=20.0)
    kept = plan_pb2.Step.FromString(step.SerializeToString())
    own = replace(CHOSEN, learning_rate=CHOSEN.learning_rate / 10, batch_size=8)
    (found,) = counted([step], CHOSEN, (10, 0), 1, 1, own)
    assert found.train.learning_rate == pytest.approx(CHOSEN.learning_rate / 20)
    assert found.train.learning_rate * found.train.rate_scales[0].scale == pytest.approx(
        kept.train.learning_rate * kept.train.rate_scales[0].scale
    )
    assert found.train.batch_size == 8
    assert step.train.learning_rate == kept.train.learning_rate


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
    for row in TABLE:
        cells = [
            f"{float(cell):g}"
            for line in page.splitlines()
            if line.startswith("| ") and _names(line, row.kinds)
            for cell in line.split("|")[2:-1]
        ]
        assert cells == [f"{number:g}" for number in (row.batch, *row.rates)]


def _names(line: str, kinds: tuple[str, ...]) -> bool:
    first = line.split("|")[1].strip()
    return first == (", ".join(f"`{kind}`" for kind in kinds) or "all others")


def test_every_kind_has_a_row_and_several_kinds_get_the_careful_one() -> None:
    assert {kind for row in TABLE for kind in row.kinds} <= set(KINDS)
    assert not TABLE[-1].kinds
    for row in TABLE:
        assert list(row.rates) == sorted(row.rates, reverse=True)
    both = settings_for(CHOSEN, ["preferences", "image-classification"], LAYOUT)
    assert both == settings_for(CHOSEN, ["preferences"], LAYOUT)
    assert 0 < width(LAYOUT) < 128
