"""FedAvg in factor space (FedIT) and in delta space, against dense matrices computed by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, LayoutError
from strategies.algorithms.fedavg import FedAvg, FedAvgOptions
from strategies.families.fedavg import average
from strategies.framework.exchange import State
from strategies.framework.options import OptionError
from strategies.framework.steps import Training
from tests.strategies.conftest import client_of, dispatch_of, drift, layout_of, personal, play, random_adapter

NAMES = ("ada", "ben", "cyd")
COUNTS = (10, 35, 5)
LAYOUT = layout_of()


def fedavg(space: str = "factor", training: Training | None = None) -> FedAvg:
    strategy = FedAvg(FedAvgOptions(space), training, seed=5)
    for name, count in zip(NAMES, COUNTS, strict=True):
        strategy.enrol(client_of(name, LAYOUT, count))
    return strategy


def dense(adapter: Adapter, module: str) -> Tensor:
    """The delta of one module as a matrix, scaling included, in float64."""
    scaling = adapter.layout.scalings[module]
    return scaling * adapter[module, Factor.B].double() @ adapter[module, Factor.A].double()


def test_factors_are_averaged_by_example_count() -> None:
    layout = layout_of(rank=1, modules=("q",), d_in=2, d_out=2, head=1)
    first = Adapter(layout, torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    second = Adapter(layout, torch.tensor([-1.0, 0, 1, 8, 0, -6, 3]))
    # 3/4 of the first and 1/4 of the second
    expected = torch.tensor([0.5, 1.5, 2.5, 5.0, 3.75, 3.0, 6.0])
    assert torch.equal(average([first, second], [30, 10]).vector, expected)


def test_a_round_replaces_the_model_by_the_average_of_what_the_clients_returned() -> None:
    strategy = fedavg()
    start = personal(strategy, "ada")
    assert torch.equal(start.vector, Adapter.initial(LAYOUT, 5).vector)
    record = play(strategy, NAMES, 1)
    returned = [drift(name, 1, start).vector for name in NAMES]
    for position in range(0, LAYOUT.size, 7):
        exact = sum(
            Fraction(count, sum(COUNTS)) * Fraction(float(vector[position]))
            for count, vector in zip(COUNTS, returned, strict=True)
        )
        assert float(personal(strategy, "ben").vector[position]) == pytest.approx(float(exact), abs=1e-6)
    assert record == {"merged": 3}
    only = play(strategy, ["cyd"], 2)
    assert only == {"merged": 1}


def test_the_average_in_delta_space_is_the_truncated_svd_of_the_dense_mean() -> None:
    layout = layout_of(rank=3, modules=("q", "v"), d_in=9, d_out=8, alpha=5.0)
    adapters = [random_adapter(layout, seed, dtype=torch.float64) for seed in range(4)]
    counts = [1, 2, 3, 10]
    merged = average(adapters, counts, "delta")
    assert merged.layout.digest == layout.digest
    for module in ("q", "v"):
        mean = sum(count / 16 * dense(adapter, module) for count, adapter in zip(counts, adapters, strict=True))
        u, sigma, v = torch.linalg.svd(torch.as_tensor(mean))
        best = u[:, :3] @ torch.diag(sigma[:3]) @ v[:3]
        assert float(sigma[3]) > 0.1  # there is something to cut off
        torch.testing.assert_close(dense(merged, module), best, rtol=0, atol=1e-10)
    for factor in (Factor.WEIGHT, Factor.BIAS):
        mean = sum(count / 16 * adapter["head", factor] for count, adapter in zip(counts, adapters, strict=True))
        torch.testing.assert_close(merged["head", factor], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", ["factor", "delta"])
def test_identical_clients_return_the_client(space: str) -> None:
    adapter = random_adapter(LAYOUT, 1, dtype=torch.float64)
    merged = average([adapter] * 3, [10, 3, 11], space)
    if space == "factor":
        torch.testing.assert_close(merged.vector, adapter.vector, rtol=0, atol=1e-14)
    for module in LAYOUT.lora_modules:
        torch.testing.assert_close(dense(merged, module), dense(adapter, module), rtol=0, atol=1e-12)


def test_the_residual_identity_and_its_rank() -> None:
    """sum p B A - (sum p B)(sum p A) = sum p (B - mean)(A - mean), of rank (S - 1) r."""
    clients, rank = 6, 4
    layout = layout_of(rank=rank, modules=("q",), d_in=40, d_out=30, alpha=rank, head=0)
    adapters = [random_adapter(layout, seed, dtype=torch.float64) for seed in range(clients)]
    counts = list(range(1, clients + 1))
    p = [count / sum(counts) for count in counts]
    factors = average(adapters, counts, "factor")
    a, b = factors["q", Factor.A], factors["q", Factor.B]
    ideal = sum(p_k * dense(adapter, "q") for p_k, adapter in zip(p, adapters, strict=True))
    residual = sum(
        p_k * (adapter["q", Factor.B] - b) @ (adapter["q", Factor.A] - a)
        for p_k, adapter in zip(p, adapters, strict=True)
    )
    torch.testing.assert_close(ideal - dense(factors, "q"), residual, rtol=0, atol=1e-13)
    assert int(torch.linalg.matrix_rank(torch.as_tensor(residual))) == (clients - 1) * rank
    exact = average(adapters, counts, "delta")
    assert (ideal - dense(exact, "q")).norm() < (ideal - dense(factors, "q")).norm()


@pytest.mark.parametrize("space", ["factor", "delta"])
def test_the_order_of_arrival_changes_no_bit(space: str) -> None:
    found = set()
    for order in itertools.permutations(NAMES):
        strategy = fedavg(space)
        play(strategy, order, 1)
        play(strategy, order[:2] if "ada" in order[2:] else ["ben", "cyd"], 2)
        found.add(personal(strategy, "ada").digest)
    assert len(found) == 1


@pytest.mark.parametrize("space", ["factor", "delta"])
def test_no_answers_leave_the_model(space: str) -> None:
    strategy = fedavg(space)
    play(strategy, NAMES, 1)
    before = personal(strategy, "ada").digest
    assert play(strategy, [], 2) == {"merged": 0}
    assert personal(strategy, "ada").digest == before


def test_an_answer_counts_in_one_round_only() -> None:
    strategy = fedavg()
    play(strategy, NAMES, 1)
    play(strategy, ["ben"], 2)
    model = personal(strategy, "ada")
    play(strategy, ["cyd"], 3)
    torch.testing.assert_close(personal(strategy, "ada").vector, drift("cyd", 3, model).vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", ["factor", "delta"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(space: str) -> None:
    straight, first, second = fedavg(space), fedavg(space), fedavg(space)
    for round_ in (1, 2, 3):
        play(straight, NAMES, round_)
    play(first, NAMES, 1)
    state = first.state()
    saved = State({name: tensor.clone() for name, tensor in state.tensors.items()}, dict(state.values))
    play(first, NAMES, 2)
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in state.tensors.items())
    second.load_state(saved)
    for round_ in (2, 3):
        play(second, NAMES, round_)
    assert personal(second, "ada").digest == personal(straight, "ada").digest


def test_everybody_gets_the_same_and_a_lossy_uplink_is_relative_to_it() -> None:
    strategy = fedavg(training=Training(uplink_encoding="int8", downlink_encoding="bf16"))
    play(strategy, NAMES, 1)
    received = {name: dispatch_of(strategy, name).received["global"].digest for name in NAMES}
    assert len(set(received.values())) == 1
    sends = [step.send for step in dispatch_of(strategy, "ada").plan.steps if step.WhichOneof("kind") == "send"]
    assert [(send.slot, send.relative_to_received) for send in sends] == [("global", True)]
    exact = [step.send for step in dispatch_of(fedavg(), "ada").plan.steps if step.WhichOneof("kind") == "send"]
    assert [send.relative_to_received for send in exact] == [False]


def test_errors() -> None:
    with pytest.raises(
        OptionError, match=r"fedavg\.space = 'deltas' \(did you mean 'delta'\?\), expected one of factor"
    ):
        FedAvgOptions("deltas")
    with pytest.raises(LayoutError, match="rank 2 for 'q_proj', expected 4"):
        average([Adapter.zeros(LAYOUT), Adapter.zeros(layout_of(rank=2))], [1, 1])
    with pytest.raises(LayoutError, match="base model other, expected base-model"):
        average([Adapter.zeros(LAYOUT), Adapter.zeros(layout_of(base="other"))], [1, 1], "delta")
    strategy: Any = FedAvg()
    with pytest.raises(RuntimeError, match="no client is enrolled"):
        strategy.state()
