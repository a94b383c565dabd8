"""The best sum of slots by forward passes: it is what was measured, within its bounds, and no worse than a slot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import PlanError
from client_app.plan.search import Tried, by_coordinate, try_first
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.plan.plan_client import Client

SLOTS = ["a", "b", "c"]


@pytest.fixture
def client(model: PersonalModel, tmp_path: Path) -> Client:
    return Client(model, tmp_path)


def search(**changed: Any) -> plan_pb2.Step:
    given = {"split": "train", "samples": 32, "evaluations": 30, "penalty": 0.05, "bound": 1.5} | changed
    return steps.search("found", given.pop("slots", SLOTS), **given)


def test_the_target_is_the_sum_that_was_found_and_has_its_loss(client: Client) -> None:
    alone = [client.loss(slot) for slot in SLOTS]  # on test, which has the same examples
    measured = steps.evaluate(Training(), steps.mixture("found"))
    found, after = client.run(search(), measured)
    said = found.search
    assert list(said.slot_losses) == pytest.approx(alone, rel=1e-5)
    assert after.evaluate.metrics["loss"] == pytest.approx(said.loss, rel=1e-5)
    size = sum(map(abs, said.coefficients))
    assert said.loss + 0.05 * size <= min(said.base_loss, *(loss + 0.05 for loss in alone)) + 1e-6
    assert max(map(abs, said.coefficients)) <= 1.5
    assert 4 < said.evaluations <= 30
    assert said.examples == 12
    used = sum(number != 0 for number in said.coefficients)
    assert max(client.slots["found"].layout.ranks.values()) == 2 * max(1, used)  # deltas were added, exactly


def test_where_nothing_helps_the_model_is_the_base(client: Client) -> None:
    found, after = client.run(search(penalty=1e6), steps.evaluate(Training(), steps.mixture("found")))
    assert not any(found.search.coefficients)
    assert after.evaluate.metrics["loss"] == pytest.approx(found.search.base_loss, rel=1e-6)


@pytest.mark.parametrize("evaluations", [3, 4, 9, 60])
def test_a_search_by_coordinate_stays_within_bound_and_budget(evaluations: int) -> None:
    asked = []

    def loss(at: Any) -> float:
        asked.append(tuple(at))
        return (at[0] - 9.0) ** 2 + (at[1] + 0.25) ** 2

    tried = Tried(loss, 2, evaluations, 0.0, 1.5)
    try_first(tried)
    by_coordinate(tried)
    assert len(asked) == len(set(asked)) <= evaluations
    assert max(abs(number) for at in asked for number in at) <= 1.5
    if evaluations == 60:
        assert tried.best == (1.5, -0.25)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    tried = Tried(lambda at: math.nan if at[0] > 0 else 1.0 + abs(at[0] + 0.5), 1, 40, 0.0, 1.5)
    try_first(tried)
    by_coordinate(tried)
    assert tried.best == (-0.5,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"slots": []}, "over the slots none"),
        ({"slots": ["a", "a"]}, "expected different ones"),
        ({"evaluations": 3}, "with 3 evaluations, expected"),
        ({"bound": 0.0}, "bound 0"),
        ({"penalty": float("nan")}, "penalty nan"),
        ({"slots": ["nobody"]}, "no slot 'nobody'"),
    ],
)
def test_what_cannot_be_searched_is_refused(client: Client, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        client.run(search(**changed))
