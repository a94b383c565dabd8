"""pFedHN: the network's step against clients that share everything or nothing, newcomers, and several layouts."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.pfedhn import PFedHN, PFedHNOptions
from tests.strategies.conftest import client_of, layout_of
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, Fleet

GOALS = dict(zip(NAMES, (1.0, 2.0, 6.0), strict=True))


def to_goal(name: str, round_: int, received: Adapter) -> Adapter:
    return Adapter(received.layout, torch.full_like(received.vector, GOALS.get(name, 3.0)))


def fleet_of(embeddings: dict[str, torch.Tensor], **options: float) -> Fleet:
    fleet = Fleet("pfedhn", embedding=3, hidden=3, body_rate=0.0, **options)
    strategy = fleet.strategy
    assert isinstance(strategy, PFedHN)
    strategy.body = torch.eye(3)
    strategy.embeddings.update(embeddings)
    for node in fleet.nodes:
        node.move = to_goal
    return fleet


def sent(fleet: Fleet, name: str) -> torch.Tensor:
    return fleet.brief(name).adapters["personal"].vector


def test_all_start_from_the_common_start() -> None:
    fleet = Fleet("pfedhn")
    for name in NAMES:
        assert torch.equal(sent(fleet, name), Adapter.initial(LAYOUT, 3).vector)


def test_clients_with_orthogonal_features_go_the_whole_way_and_equal_ones_to_the_mean() -> None:
    fleet = fleet_of({name: 9 * torch.eye(3)[index] for index, name in enumerate(NAMES)})
    fleet.play()
    for name in NAMES:
        torch.testing.assert_close(sent(fleet, name), torch.full((LAYOUT.size,), GOALS[name]), rtol=0, atol=1e-4)
    fleet = fleet_of(dict.fromkeys(NAMES, torch.ones(3)))
    fleet.play()
    for name in NAMES:
        torch.testing.assert_close(sent(fleet, name), torch.full((LAYOUT.size,), 3.0), rtol=0, atol=1e-4)


def test_embeddings_part_where_clients_go_different_ways() -> None:
    fleet = Fleet("pfedhn")
    for node in fleet.nodes:
        node.move = to_goal
    for _ in range(25):
        fleet.play()
    away = [float((sent(fleet, name) - GOALS[name]).abs().mean()) for name in NAMES]
    mean = [abs(3.0 - goal) for goal in GOALS.values()]
    assert sum(away) < 0.5 * sum(mean)


def test_a_newcomer_moves_its_embedding_alone() -> None:
    fleet = Fleet("pfedhn")
    fleet.play(only=("ada", "ben"))
    strategy = fleet.strategy
    assert isinstance(strategy, PFedHN)
    strategy.enrol(client_of("dan", LAYOUT))
    expected = (strategy.embeddings["ada"] + strategy.embeddings["ben"]) / 2
    torch.testing.assert_close(strategy.embeddings["dan"], expected)
    before = {name: tensor.clone() for name, tensor in strategy.state().tensors.items()}
    fleet.play(only=("cyd",))  # its first answer
    changed = {name for name, tensor in strategy.state().tensors.items() if not torch.equal(tensor, before[name])}
    assert changed == {"embedding/cyd"}


def test_clients_of_other_ranks_share_the_heads_that_they_have_in_common() -> None:
    fleet = Fleet("pfedhn", layouts=[LAYOUT, layout_of(rank=2), layout_of(base="another")])
    fleet.play()
    heads = fleet.strategy.heads  # type: ignore[attr-defined]
    assert len([key for key in heads if ":head.weight:" in key]) == 2  # one for each base model
    assert len([key for key in heads if ":q_proj.A:" in key]) == 3
    assert {who: saved.layout.digest for who, saved in fleet.deliver().items()} == {
        node.name: node.layout.digest for node in fleet.nodes
    }


def test_state_is_the_network() -> None:
    fleet = Fleet("pfedhn")
    fleet.play()
    again = PFedHN(PFedHNOptions(), seed=3)
    for index, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        again.enrol(client_of(name, LAYOUT, count, node_id=index + 1))
    again.load_state(fleet.strategy.state())
    for name in NAMES:
        brief = again.brief(2, again.clients[name])
        assert torch.equal(brief.adapters["personal"].vector, sent(fleet, name))
    with pytest.raises(ValueError, match="hidden"):
        PFedHNOptions(hidden=0)
