"""Nearest peers: one upload, which peers are near, and the state after a resume; with FedPAE's ensemble."""

from __future__ import annotations

import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.fedpae import FedPAE
from strategies.families.nearest_peers import NearestPeersOptions
from tests.strategies.conftest import client_of
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, Fleet


def apart(name: str, round_: int, received: Adapter) -> Adapter:
    """Ada and cyd end up alike; ben elsewhere."""
    draw = torch.Generator().manual_seed(1 if name == "ben" else 2)
    return Adapter(received.layout, torch.randn(received.vector.shape, generator=draw))


def played(name: str = "fedpae", **options: float) -> Fleet:
    fleet = Fleet(name, **options)
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
    again = FedPAE(NearestPeersOptions(peers=1), seed=3)
    for index, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        again.enrol(client_of(name, LAYOUT, count, node_id=index + 1))
    again.load_state(fleet.strategy.state())
    assert again.nearest == fleet.strategy.nearest  # type: ignore[attr-defined]
