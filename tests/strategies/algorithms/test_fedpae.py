"""FedPAE: an ensemble with shares from held-out examples."""

from __future__ import annotations

from tests.strategies.families.test_nearest_peers import played


def test_the_ensemble_has_shares_from_validation_examples() -> None:
    fleet = played(peers=2, passes=4)
    plan = fleet.strategy.deliver(fleet.strategy.clients["ben"]).steps
    learns = [step.attribute for step in plan if step.HasField("attribute")]
    assert [(list(step.slots), step.split) for step in learns] == [(["local", "peer-0", "peer-1"], "validation")] * 4
    saved = next(step.save.mixture for step in plan if step.HasField("save"))
    assert saved.shares == "shares"
    assert [term.slot for term in saved.terms] == ["local", "peer-0", "peer-1"]
