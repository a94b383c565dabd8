"""SAMerging: a client's coefficients learn from its peers' ensemble and not from labels."""

from __future__ import annotations

import pytest
import torch

from strategies.algorithms.samerging import SAMerging
from tests.strategies.families.test_nearest_peers import played
from tests.strategies.fleet import Fleet

SLOTS = ["local", "peer-0", "peer-1"]


def test_the_ensemble_teaches_the_coefficients_and_labels_do_not() -> None:
    fleet = played("samerging", peers=2, rho=0.25)
    plan = fleet.strategy.deliver(fleet.strategy.clients["ben"]).steps
    (taught,) = [step.distill for step in plan if step.HasField("distill")]
    assert taught.HasField("label_weight")
    assert taught.label_weight == 0.0
    assert [(item.task, item.weight) for item in taught.tasks] == [("toy", 1.0)]
    assert taught.teacher.shares == "shares"
    assert [term.slot for term in taught.teacher.terms] == SLOTS
    train = taught.train
    assert [(term.slot, term.gate.slot) for term in train.mixture.terms] == [(s, f"gates-{s}") for s in SLOTS]
    assert list(train.slots) == [f"gates-{slot}" for slot in SLOTS]
    assert train.sharpness_radius == 0.25
    assert train.learning_rate * train.rate_scales[0].scale == pytest.approx(0.1)
    kinds = [step.WhichOneof("kind") for step in plan]
    assert kinds.index("attribute") < kinds.index("distill") < kinds.index("save")
    saved = next(step.save.mixture for step in plan if step.HasField("save"))
    assert saved == train.mixture


def test_alone_a_client_keeps_its_own() -> None:
    fleet = Fleet("samerging")
    fleet.play(only=("ada",))
    assert isinstance(fleet.strategy, SAMerging)
    assert torch.equal(fleet.deliver()["ada"].vector, fleet["ada"].slots["local"].vector)
