"""Which state is the best on validation examples, and which clients became worse after it."""

from __future__ import annotations

from typing import Any

import pytest

from server_app.run.clients.held_out import FEWEST, Fall, HeldOut, Score, with_held_out
from server_app.run.options import RunOptions
from strategies.framework import steps
from strategies.framework.exchange import Brief
from strategies.framework.steps import Training
from tests.strategies.conftest import client_of, layout_of


def said(loss: float, accuracy: float | None = None, split: str = "validation", examples: int = 9) -> dict[str, Any]:
    metrics = {"loss": loss} | ({} if accuracy is None else {"accuracy": accuracy})
    return {"metrics": {"personal": metrics}, "evaluated": {"personal": {"split": split, "examples": examples}}}


def held_out(**losses: list[float]) -> HeldOut:
    """A loss of each client in each round."""
    rounds = range(1, 1 + max(map(len, losses.values())))
    records = [
        {
            "phase": "train",
            "round": r,
            "clients": {name: said(of[r - 1]) for name, of in losses.items() if r <= len(of)},
        }
        for r in rounds
    ]
    return HeldOut([{"phase": "register", "round": 0, "clients": {}}, *records])


def test_a_round_tells_of_the_state_that_it_begins_with_and_the_best_one_is_best_for_all() -> None:
    assert HeldOut().best_state is None
    assert held_out(ada=[3.0, 2.0, 1.0, 5.0], ben=[3.0, 2.0, 2.5, 4.0]).best_state == 2
    assert held_out(ada=[3.0, 9.0], ben=[3.0, 9.0]).best_state == 0
    # Cyd alone knows state 3, and its loss is low because its data are easy.
    assert held_out(ada=[3.0, 2.0], ben=[3.0, 2.0], cyd=[0.5, 0.4, 0.3, 0.2], dan=[3.0, 2.0]).best_state == 1
    test = HeldOut([{"phase": "train", "round": 1, "clients": {"ada": said(1.0, split="test")}}])
    assert test.best_state is None


def test_of_a_few_examples_nothing_is_concluded_but_a_loss_that_is_not_finite() -> None:
    few, enough = (
        HeldOut([{"phase": "train", "round": 1, "clients": {"ada": said(2.0, examples=count)}}])
        for count in (FEWEST - 1, FEWEST)
    )
    assert few.fallen("ada", Score(9.0)) is None
    assert few.fallen("ada", None) is not None
    assert enough.fallen("ada", Score(9.0)) is not None


@pytest.mark.parametrize(
    ("losses", "now", "lost"),
    [
        ([2.0, 1.0], 1.4, False),  # more than half of the gain is still there
        ([2.0, 1.0], 1.6, True),
        ([2.0, 1.0], 2.5, True),
        ([2.0, 3.0], 2.03, False),  # within what few examples tell
        ([2.0, 3.0], 2.5, True),
        ([2.0], 1.0, False),
    ],
)
def test_who_has_lost(losses: list[float], now: float, lost: bool) -> None:
    assert (held_out(ada=losses).fallen("ada", Score(now)) is not None) == lost


def test_a_model_that_has_learned_to_decide_has_not_lost_where_it_is_only_too_sure() -> None:
    found = HeldOut([{"phase": "train", "round": 1, "clients": {"ada": said(2.3, 0.1)}}])
    assert found.fallen("ada", Score(4.0, 0.6)) is None
    fall = found.fallen("ada", Score(4.0, 0.12))
    assert fall is not None
    assert fall.is_better_before
    assert fall.words(2) == "validation loss 4 after 2 rounds, 2.3 before training"
    again = Fall(Score(4.71), Score(4.96), Score(4.96), 1)
    assert again.words(1) == "validation loss 4.96 after 1 round, 4.71 before training"
    assert again.words(2) == "validation loss 4.96 after 2 rounds, 4.71 before training, 4.96 after 1 round"
    assert found.fallen("ben", Score(9.0)) is None
    lost = found.fallen("ada", None)
    assert lost is not None
    assert "not finite" in lost.words(1)
    assert lost.record() == {"loss": None, "first_loss": 2.3, "best_loss": 2.3, "best_round": 0}


def test_a_delivery_also_evaluates_the_examples_that_rounds_look_at() -> None:
    mix, client = steps.mixture("global"), client_of("ada", layout_of())
    brief = Brief([steps.evaluate(Training(), mix, "local"), steps.evaluate(Training(), mix), steps.save(mix)])
    found = with_held_out(brief, client, RunOptions(evaluate_examples=5)).steps
    shown = [(s.evaluate.label, s.evaluate.split, s.evaluate.examples) for s in found if s.HasField("evaluate")]
    assert shown == [("local", "test", 0), ("personal", "test", 0), ("held-out", "validation", 5)]
    assert found[2].evaluate.loss_only
