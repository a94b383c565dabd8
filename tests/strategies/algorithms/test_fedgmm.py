"""FedGMM: Gaussians that are merged as if all examples were in one place, and clients that the record tells apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies import STRATEGIES
from strategies.algorithms.fedgmm import FedGMM, pooled, starts
from strategies.framework.options import OptionError
from tests.strategies.fleet import COUNTS, NAMES, Fleet

SIZE = 3


def density_of(fleet: Fleet, name: str = "ada") -> plan_pb2.DensityStep:
    (found,) = [step.density for step in fleet.brief(name).steps if step.HasField("density")]
    return found


def fleet_of(**options: int) -> tuple[Fleet, FedGMM]:
    fleet = Fleet("fedgmm", dimensions=SIZE, **options)
    assert isinstance(fleet.strategy, FedGMM)
    return fleet, fleet.strategy


def test_moments_of_parts_together_are_those_of_all_examples() -> None:
    draw = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, SIZE, generator=draw, dtype=torch.float64) * n for n in COUNTS]
    means, variances = (
        torch.stack(rows) for rows in ([p.mean(0) for p in parts], [p.var(0, correction=0) for p in parts])
    )
    mean, variance = pooled(torch.tensor(COUNTS, dtype=torch.float64), means, variances)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(dim=0))
    torch.testing.assert_close(variance, whole.var(dim=0, correction=0))


def test_gaussians_start_far_from_each_other() -> None:
    means = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [0.0, 40.0]], dtype=torch.float64)
    variance = torch.tensor([1.0, 100.0], dtype=torch.float64)  # 40 is 4 deviations, 9 is 9
    assert torch.equal(starts(means, variance, 3, 0), means[[0, 2, 3]])
    drawn = starts(means[:1], variance, 3, 0)
    assert torch.equal(drawn[0], means[0])
    assert len({tuple(row) for row in drawn.tolist()}) == 3
    assert torch.equal(drawn, starts(means[:1], variance, 3, 0))


def test_the_first_round_asks_for_moments_and_the_next_sends_gaussians() -> None:
    fleet, strategy = fleet_of(gaussians=2, learners=2)
    first = density_of(fleet)
    assert (len(first.gaussians), first.dimensions, first.seed) == (0, SIZE, strategy.seed)
    assert list(first.slots) == ["learner-0", "learner-1"]
    fleet.play()
    found = density_of(fleet)
    assert len(found.gaussians) == 2
    means = {who: result_of(fleet, who).gaussians[0].mean for who in NAMES}
    assert list(found.gaussians[0].mean) == pytest.approx(means["ben"])  # of the client with the most examples
    assert list(found.gaussians[1].mean) in (pytest.approx(means["ada"]), pytest.approx(means["cyd"]))
    assert all(variance > 0 for gaussian in found.gaussians for variance in gaussian.variance)
    kinds = [step.WhichOneof("kind") for step in fleet.brief("ada").steps]
    assert kinds == ["density", "evaluate", "train", "train", "send", "send"]


def result_of(fleet: Fleet, who: str) -> report_pb2.DensityResult:
    """What a node reports in the first round; it is the same in every round."""
    step = plan_pb2.Step(density=plan_pb2.DensityStep(slots=["learner-0"], dimensions=SIZE))
    return fleet[who]._step(plan_pb2.Plan(), step, {}, {}).density


def test_gaussians_are_merged_by_their_parts_and_adapters_by_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, strategy = fleet_of(gaussians=2, learners=2)
    fleet.play()
    weights = {"ada": (0.25, 0.75), "ben": (0.0, 1.0), "cyd": (0.5, 0.5)}
    shares = {"ada": (0.9, 0.1), "ben": (0.2, 0.8), "cyd": (0.0, 1.0)}
    for who in NAMES:
        plain = fleet[who]._step

        def step(plan: Any, body: plan_pb2.Step, *more: Any, plain: Any = plain, who: str = who) -> Any:
            result = plain(plan, body, *more)
            if body.HasField("density"):
                result.density.shares[:] = shares[who]
                for gaussian, weight, shift in zip(result.density.gaussians, weights[who], (-1, 1), strict=True):
                    gaussian.weight = weight
                    gaussian.mean[:] = [shift * len(who) + COUNTS[NAMES.index(who)]] * SIZE
            return result

        monkeypatch.setattr(fleet[who], "_step", step)
    record = fleet.play()
    mass = torch.tensor([[c * w for w in weights[who]] for c, who in zip(COUNTS, NAMES, strict=True)]).double()
    means = torch.tensor([[c - 3.0, c + 3.0] for c in COUNTS]).double()
    expected = (mass * means).sum(dim=0) / mass.sum(dim=0)
    torch.testing.assert_close(strategy.gaussians[:, 0], expected[:, None].expand(2, SIZE))
    within = 0.5 + (mass * (means - expected).square()).sum(dim=0) / mass.sum(dim=0)
    assert bool((strategy.gaussians[:, 1] >= within[:, None] - 1e-9).all())
    assert record["log-density"] == {who: -1.0 for who in NAMES}
    for index, slot in enumerate(strategy.slots):
        parts = {who: count * shares[who][index] for who, count in zip(NAMES, COUNTS, strict=True)}
        mean = sum(parts[who] * fleet[who].slots[slot].vector for who in NAMES) / sum(parts.values())
        torch.testing.assert_close(strategy.models[slot].vector, torch.as_tensor(mean), rtol=0, atol=1e-5)


def test_a_gaussian_without_examples_stays_and_one_with_a_single_point_keeps_some_width() -> None:
    fleet, strategy = fleet_of(gaussians=3)
    fleet.play()
    before = strategy.gaussians.clone()
    for who in NAMES:
        rows = torch.zeros(3, 3, SIZE, dtype=torch.float64)
        rows[0, 0], rows[1, 0] = 0.5, 0.5  # the third has no examples
        rows[0, 1], rows[1, 1] = 1.0, 3.0
        strategy.answers[who] = rows, [0.5, 0.5], -2.0
    found = strategy._merged(sorted(NAMES))
    torch.testing.assert_close(found[2, 0], before[2, 0])
    assert found[:2, 0].tolist() == [[1.0] * SIZE, [3.0] * SIZE]
    torch.testing.assert_close(found[0, 1], torch.full((SIZE,), 0.1, dtype=torch.float64), rtol=0, atol=1e-9)


def test_one_gaussian_and_one_learner_is_fedavg() -> None:
    one, fedavg = Fleet("fedgmm", learners=1, gaussians=1), Fleet("fedavg")
    for fleet in (one, fedavg):
        fleet.play()
        fleet.play()
    torch.testing.assert_close(
        one.strategy.state().tensors["learner-0"], fedavg.strategy.state().tensors["model"], rtol=0, atol=1e-6
    )


def test_a_resumed_run_goes_on_with_the_same_gaussians() -> None:
    fleet, strategy = fleet_of()
    fleet.play()
    fleet.play(deaf="cyd")
    again, other = fleet_of()
    other.load_state(strategy.state())
    again.round_ = fleet.round_
    assert density_of(again) == density_of(fleet)
    assert again.brief("ben").steps == fleet.brief("ben").steps


def test_options() -> None:
    for options, message in (
        ({"gaussians": 65}, "gaussians = 65"),
        ({"dimensions": 0}, "dimensions = 0"),
        ({"learners": 0}, "learners = 0"),
    ):
        with pytest.raises(OptionError, match=message):
            STRATEGIES["fedgmm"].Options(**options)
