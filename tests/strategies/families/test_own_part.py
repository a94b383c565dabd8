"""Strategies with a shared representation and a head for each client: FedPPA's stages, growing cohorts."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from server_app.run.clients.participants import choose
from strategies import STRATEGIES
from tests.strategies.fleet import LAYOUT, NAMES, Fleet

BODY = ["q_proj", "v_proj"]


def test_fedppa_aligns_more_in_each_stage_and_never_the_own_part() -> None:
    fleet = Fleet("fedppa", alignment=0.6, stages=3)
    plan = fleet.brief("ada").steps
    merges = [step.merge for step in plan if step.HasField("merge") and not step.merge.own_heads_only]
    away = [dict(merge.mixture.terms[1].per_module.values) for merge in merges]
    assert [shares["q_proj"] for shares in away] == pytest.approx([0.2, 0.4, 0.6])
    assert [shares["head"] for shares in away] == [0.0] * 3
    assert [step.train.steps for step in plan if step.HasField("train")] == [10, 10, 10]


def test_fedppa_moves_a_client_towards_the_average_by_the_stages() -> None:
    fleet = Fleet("fedppa", alignment=0.5, stages=2)
    for node in fleet.nodes:
        node.move = lambda name, round_, received: Adapter(
            received.layout,
            torch.full_like(received.vector, NAMES.index(name) + 1.0) if round_ == 1 else received.vector,
        )
    fleet.play()
    average = fleet.brief("ada").adapters["global"].vector
    fleet.play()  # nobody trains: only the alignment moves
    first = average + (1.0 - average) * (1 - 0.25) * (1 - 0.5)
    torch.testing.assert_close(fleet["ada"].slots["local"].select(modules=BODY).vector, first, rtol=0, atol=1e-5)
    assert bool((fleet["ada"].slots["local"].select(modules=["head"]).vector == 1.0).all())


def test_cohorts_of_straggler_resilient_grow_from_the_fastest() -> None:
    fleet = Fleet("straggler-resilient", first=0.34)
    strategy = fleet.strategy
    clients = list(strategy.clients.values())
    count = round(strategy.fraction(1.0) * len(clients))
    seconds = {"ada": 9.0, "ben": 1.0, "cyd": 5.0}
    cohorts = [
        [c.id for c in choose(strategy.participants, clients, count, round_=r, seed=0, seconds=seconds)]
        for r in (1, 2, 3)
    ]
    assert cohorts == [["ben"], ["ben", "cyd"], ["ada", "ben", "cyd"]]
    assert STRATEGIES["fedrep"]().fraction(0.7) == 0.7


def test_who_was_never_asked_fits_its_own_part_at_delivery() -> None:
    fleet = Fleet("straggler-resilient")
    fleet.play(only=("ben",))

    def trained(name: str) -> list[list[str]]:
        plan = fleet.strategy.deliver(fleet.strategy.clients[name]).steps
        return [list(step.train.part.modules) for step in plan if step.HasField("train")]

    assert (trained("ben"), trained("ada")) == ([], [["head"]])
    saved = fleet.deliver()
    assert saved["ada"].layout.digest == LAYOUT.digest
