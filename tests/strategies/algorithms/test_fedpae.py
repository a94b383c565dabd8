"""FedPAE: one upload, the nearest peers, and an ensemble with shares from held-out examples."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.fedpae import FedPAE, FedPAEOptions
from tests.strategies.conftest import client_of
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, Fleet


def apart(name: str, round_: int, received: Adapter) -> Adapter:
    """Ada and cyd end up alike; ben elsewhere."""
    draw = torch.Generator().manual_seed(1 if name == "ben" else 2)
    return Adapter(received.layout, torch.randn(received.vector.shape, generator=draw))


def played(**options: int) -> Fleet:
    fleet = Fleet("fedpae", **options)
    for node in fleet.nodes:
        node.move = apart
    fleet.play()
    return fleet


def test_the_nearest_peers_are_sent_once() -> None:
    fleet = played(peers=1)
    deliveries = {who: fleet.strategy.deliver(fleet.strategy.clients[who]) for who in NAMES}
    assert torch.equal(deliveries["ada"].adapters["peer-0"].vector, fleet["cyd"].slots["local"].vector)
    assert torch.equal(deliveries["cyd"].adapters["peer-0"].vector, fleet["ada"].slots["local"].vector)
    assert not fleet.brief("ada").adapters  # nothing goes down before


def test_the_ensemble_has_shares_from_validation_examples() -> None:
    fleet = played(peers=2, passes=4)
    plan = fleet.strategy.deliver(fleet.strategy.clients["ben"]).steps
    learns = [step.attribute for step in plan if step.HasField("attribute")]
    assert [(list(step.slots), step.split) for step in learns] == [(["local", "peer-0", "peer-1"], "validation")] * 4
    saved = next(step.save.mixture for step in plan if step.HasField("save"))
    assert saved.shares == "shares"
    assert [term.slot for term in saved.terms] == ["local", "peer-0", "peer-1"]


def test_alone_a_client_keeps_its_own() -> None:
    fleet = Fleet("fedpae")
    fleet.play(only=("ada",))
    assert torch.equal(fleet.deliver()["ada"].vector, fleet["ada"].slots["local"].vector)


def test_uploads_wait_for_the_last_round_where_it_is_known() -> None:
    fleet = Fleet("fedpae")
    fleet.strategy.rounds = 2
    kinds = [step.WhichOneof("kind") for step in fleet.brief("ada").steps]
    assert "send" not in kinds
    fleet.play()
    assert [step.WhichOneof("kind") for step in fleet.brief("ada").steps] == [*kinds, "send"]


def test_state_brings_the_peers_back() -> None:
    fleet = played(peers=1)
    again = FedPAE(FedPAEOptions(peers=1), seed=3)
    for index, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        again.enrol(client_of(name, LAYOUT, count, node_id=index + 1))
    again.load_state(fleet.strategy.state())
    assert again.nearest == fleet.strategy.nearest  # type: ignore[attr-defined]
