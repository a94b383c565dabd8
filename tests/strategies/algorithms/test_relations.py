"""Relations between clients: weights against brute force and in limits, and what each client is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from strategies.algorithms.fedamp import attention
from strategies.algorithms.pfedgraph import collaboration, to_simplex
from strategies.framework.exchange import BadAnswerError
from tests.strategies.conftest import drift, random_adapter
from tests.strategies.fleet import COUNTS, LAYOUT, NAMES, SHARES, Fleet


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_is_a_convex_combination_and_prefers_neighbours() -> None:
    vectors = torch.cat([draw(2, 30, seed=1) * 0.1, draw(2, 30, seed=2) * 0.1 + 1])
    found = attention(vectors, 0.3, 0.2)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert float(found[0, 1]) > 10 * float(found[0, 2])
    assert torch.equal(found, found.T)
    everyone = attention(vectors, 1.0, 1e9)  # the others would weigh 3
    torch.testing.assert_close(everyone[0], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(attention(vectors, 0.3, 1e-6), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(attention(vectors[:1], 0.3, 1.0), torch.ones(1, 1, dtype=torch.float64))
    same = attention(vectors[:1].expand(3, -1), 0.3, 1.0)
    assert bool(same.isfinite().all())


def test_attention_formula() -> None:
    vectors = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)  # squared distances 1, 4, 9: the median is 4
    found = attention(vectors, 0.2, 0.5)
    for i, j, squared in ((0, 1, 1), (1, 2, 4), (0, 2, 9)):
        assert float(found[i, j]) == pytest.approx(0.2 * torch.exp(torch.tensor(-squared / 2.0)).item())


def test_fedamp_pulls_its_own_adapter_to_the_cloud() -> None:
    fleet = Fleet("fedamp", pull=0.25)
    assert not any(step.train.HasField("proximal") for step in fleet.brief("ada").steps)
    fleet.play()
    brief = fleet.brief("ada")
    (train,) = [step.train for step in brief.steps if step.HasField("train")]
    assert (list(train.slots), train.proximal.slot, train.proximal.mu) == (["local"], "cloud", 0.25)
    vectors = torch.stack([fleet[who].slots["local"].vector for who in NAMES])
    weights = attention(vectors.double(), 0.2, 1.0)[0]
    torch.testing.assert_close(brief.adapters["cloud"].vector, (weights @ vectors.double()).float(), rtol=0, atol=1e-5)
    own = {who: fleet[who].slots["local"].digest for who in NAMES}
    assert {who: adapter.digest for who, adapter in fleet.deliver().items()} == own


def test_the_projection_onto_the_simplex_is_the_nearest_point() -> None:
    rows = 2 * draw(5, 3, seed=4)
    found = to_simplex(rows)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert float(found.min()) >= 0
    grid = torch.arange(0, 201, dtype=torch.float64) / 200
    points = torch.stack([torch.stack([a, b, 1 - a - b]) for a in grid for b in grid if a + b <= 1 + 1e-9])
    for row, nearest in zip(rows, found, strict=True):
        best = points[(points - row).square().sum(dim=1).argmin()]
        assert float((best - nearest).abs().max()) <= 0.011
        assert float((nearest - row).square().sum()) <= float((best - row).square().sum()) + 1e-12


def test_the_graph_minimises_its_objective_and_has_its_limits() -> None:
    updates = draw(4, 20, seed=5)
    updates[1] = updates[0] + 0.05 * updates[1]  # cosine above 0.9
    inner, shares = updates @ updates.T, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = collaboration(inner, shares, 0.8)
    cosines = inner / inner.diagonal().sqrt().outer(inner.diagonal().sqrt())
    cosines = torch.where(cosines > 0.9, 1.0, cosines)
    points = torch.distributions.Dirichlet(torch.full((4,), 0.7, dtype=torch.float64)).sample((20000,))
    for i in range(4):
        objective = lambda x: 0.8 * x.square().sum(-1) + x @ (-cosines[i] - 1.6 * shares)  # noqa: B023, E731
        assert float(objective(found[i])) <= float(objective(points).min()) + 1e-9
    torch.testing.assert_close(collaboration(inner, shares, 1e9), shares.expand(4, -1), rtol=0, atol=1e-8)
    alone = collaboration(inner, shares, 1e-6)
    torch.testing.assert_close(alone[2:], torch.eye(4, dtype=torch.float64)[2:])
    assert float(alone[0, :2].sum()) == pytest.approx(1)  # ties with whom it is alike
    assert bool(collaboration(torch.zeros(2, 2, dtype=torch.float64), shares[:2], 0.8).isfinite().all())


def test_pfedgraph_sends_and_delivers_an_average_of_its_own() -> None:
    fleet = Fleet("pfedgraph", smoothing=1e9)
    fleet.play()
    mean = sum(share * fleet[who].slots["local"].vector for share, who in zip(SHARES, NAMES, strict=True))
    for adapter in fleet.deliver().values():
        torch.testing.assert_close(adapter.vector, torch.as_tensor(mean), rtol=0, atol=1e-5)


def test_fedfomo_learns_whose_adapters_help() -> None:
    fleet = Fleet("fedfomo", candidates=1, explore=0.0)
    assert not any(step.HasField("select") for step in fleet.brief("ada").steps)
    fleet.play()
    strategy = fleet.strategy
    strategy.affinity["ada"] = {"cyd": 2.0, "ben": 1.0}  # type: ignore[attr-defined]
    brief = fleet.brief("ada")
    assert brief.adapters["peer-0"].digest == fleet["cyd"].slots["local"].digest
    (step,) = (step.select for step in brief.steps if step.HasField("select"))
    assert (step.target, list(step.slots), step.split) == ("local", ["peer-0"], "validation")
    fleet.play()
    assert strategy.affinity["ada"]["cyd"] in (2.0, 3.0)  # type: ignore[attr-defined]
    everybody = {peer for round_ in range(20) for peer in drawn(fleet, round_)}
    assert everybody == {"ben", "cyd"}


def test_fedfomo_does_not_ask_by_name_where_nobody_has_helped() -> None:
    fleet = Fleet("fedfomo", candidates=1, explore=0.0)
    fleet.play()
    strategy = fleet.strategy
    strategy.affinity["ada"] = {"ben": 0.0}  # type: ignore[attr-defined]
    asked = {strategy.candidates(round_, strategy.clients["ada"])[0] for round_ in range(20)}  # type: ignore[attr-defined]
    assert asked == {"ben", "cyd"}
    strategy.affinity["ada"] = {"ben": 0.0, "cyd": 0.1}  # type: ignore[attr-defined]
    assert all(strategy.candidates(n, strategy.clients["ada"]) == ["cyd"] for n in range(20))  # type: ignore[attr-defined]


def drawn(fleet: Fleet, round_: int) -> list[str]:
    strategy = fleet.strategy
    strategy.options = type(strategy.options)(candidates=1, explore=1.0)
    first, second = (strategy.candidates(round_, strategy.clients["ada"]) for _ in range(2))  # type: ignore[attr-defined]
    assert first == second  # a repeated round asks for the same
    return list(first)


def test_ifca_with_one_cluster_is_fedavg() -> None:
    one, fedavg = Fleet("ifca", clusters=1), Fleet("fedavg")
    for fleet in (one, fedavg):
        fleet.play()
        fleet.play()
    assert torch.equal(one.strategy.state().tensors["model/0"], fedavg.strategy.state().tensors["model"])


def test_ifca_averages_clusters_and_leaves_an_empty_one() -> None:
    fleet = Fleet("ifca", clusters=2)
    move = {who: 1.0 if who == "ben" else -1.0 for who in NAMES}
    away = random_adapter(LAYOUT, 9)
    for node in fleet.nodes:  # two camps
        node.move = lambda name, round_, received: Adapter(  # type: ignore[assignment]
            received.layout, drift(name, round_, received).vector + 5 * move[name] * away.vector
        )
    record = fleet.play()
    assert record["clusters"]["ada"] == record["clusters"]["cyd"] != record["clusters"]["ben"]
    assert sorted(record["sizes"]) == [1, 2]
    camp = record["clusters"]["ada"]
    pair = COUNTS[0] + COUNTS[2]
    mean = (COUNTS[0] * fleet["ada"].slots["model"].vector + COUNTS[2] * fleet["cyd"].slots["model"].vector) / pair
    models = fleet.strategy.state().tensors
    torch.testing.assert_close(models[f"model/{camp}"], mean, rtol=0, atol=1e-5)
    fleet.play(only=("ada",))
    after = fleet.strategy.state().tensors
    chosen = [key for key in models if not torch.equal(models[key], after[key])]
    assert len(chosen) == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda found: found.losses.pop(), "1 numbers in losses, expected one for each of 2 candidates"),
        (lambda found: found.weights.pop(), "1 numbers in weights, expected one for each of 2 candidates"),
        (lambda found: found.weights.__setitem__(0, 7.0), "expected 0 to 1"),
        (lambda found: found.losses.__setitem__(0, float("nan")), "expected a finite number"),
    ],
)
def test_a_choice_that_is_none_is_refused(spoil: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet("ifca")
    fleet.play()
    honest = fleet["ben"]._step

    def step(*arguments: Any) -> Any:
        result = honest(*arguments)
        if result.HasField("select"):
            spoil(result.select)
        return result

    monkeypatch.setattr(fleet["ben"], "_step", step)
    with pytest.raises(BadAnswerError, match=f"client 'ben'.*{reason}"):
        fleet.play()


def test_fedem_with_one_learner_is_fedavg() -> None:
    one, fedavg = Fleet("fedem", learners=1), Fleet("fedavg")
    for fleet in (one, fedavg):
        fleet.play()
        fleet.play()
    assert torch.equal(one.strategy.state().tensors["learner-0"], fedavg.strategy.state().tensors["model"])


def test_fedem_trains_each_learner_on_its_share_and_keeps_the_shares_at_the_client() -> None:
    fleet = Fleet("fedem", learners=3)
    brief = fleet.brief("ada")
    slots = [f"learner-{index}" for index in range(3)]
    assert list(brief.adapters) == slots
    assert len({adapter.digest for adapter in brief.adapters.values()}) == 3  # equal ones would stay equal
    trains = [step.train for step in brief.steps if step.HasField("train")]
    assert [(list(t.slots), t.attributed_to) for t in trains] == [([slot], slot) for slot in slots]
    assert [step.send.slot for step in brief.steps if step.HasField("send")] == slots
    evaluated = next(step.evaluate.mixture for step in brief.steps if step.HasField("evaluate"))
    assert ([term.slot for term in evaluated.terms], evaluated.shares) == (slots, "shares")
    fleet.play()
    for slot in slots:  # by numbers of examples, each client alone
        mean = sum(share * fleet[who].slots[slot].vector for share, who in zip(SHARES, NAMES, strict=True))
        torch.testing.assert_close(fleet.strategy.state().tensors[slot], torch.as_tensor(mean), rtol=0, atol=1e-6)
