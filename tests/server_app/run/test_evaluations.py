"""How often clients evaluate during a run, and on how many examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.evaluations import spared
from server_app.run.options import RunOptions
from strategies.framework import steps
from strategies.framework.exchange import Brief
from strategies.framework.options import OptionError
from strategies.framework.steps import Training
from tests.strategies.conftest import client_of, layout_of

TRAINING = Training()
MIX = steps.mixture("global")
BRIEF = Brief(
    [
        steps.evaluate(TRAINING, MIX),
        steps.train(TRAINING, MIX, ["global"]),
        steps.evaluate(TRAINING, MIX, "weight 0.5", "validation"),
        steps.evaluate(TRAINING, MIX, record="losses"),
    ]
)


CLIENT = client_of("ada", layout_of())


def evaluations(round_: int, **options: int) -> list[tuple[str, int]]:
    brief = spared(BRIEF, CLIENT, round_, RunOptions(**options))  # type: ignore[arg-type]
    assert [step for step in brief.steps if step.HasField("train")] == [BRIEF.steps[1]]
    found: list[plan_pb2.EvaluateStep] = [step.evaluate for step in brief.steps if step.HasField("evaluate")]
    return [(step.label + step.record, step.examples) for step in found]


def test_personal_models_are_evaluated_on_some_examples_and_what_a_strategy_learns_from_on_all() -> None:
    learns = [("weight 0.5", 0), ("personallosses", 0)]
    assert evaluations(1) == [("personal", 256), *learns]
    assert evaluations(2, evaluate_examples=0) == [("personal", 0), *learns]
    assert BRIEF.steps[0].evaluate.examples == 0  # the strategy's own steps stay what they are


def test_rounds_look_at_validation_examples_and_at_a_client_without_any_at_what_is_delivered_on() -> None:
    bare = replace(CLIENT, registration=report_pb2.Registration())
    splits = [spared(BRIEF, client, 1, RunOptions()).steps[0].evaluate.split for client in (CLIENT, bare)]
    assert splits == ["validation", "test"]


def test_every_third_round_begins_with_the_first() -> None:
    rounds = [round_ for round_ in range(1, 8) if evaluations(round_, evaluate_every=3)[0][0] == "personal"]
    assert rounds == [1, 4, 7]


@pytest.mark.parametrize("options", [{"evaluate_every": 0}, {"evaluate_examples": -1}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="evaluate-e"):
        RunOptions(**options)  # type: ignore[arg-type]
