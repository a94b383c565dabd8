"""FedMerge against a second implementation in plain loops; initialisation, joining, transport, state, errors."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from proto.fedalloy.v1 import report_pb2
from strategies.algorithms.fedmerge import FedMerge, FedMergeOptions
from strategies.algorithms.fedmerge_weights import cluster, logit_gradient
from strategies.framework.exchange import Answer, State, StrategyError
from strategies.framework.flower import AlloyStrategy
from strategies.framework.steps import Training
from tests.strategies.conftest import (
    FakeNode,
    client_of,
    dispatch_of,
    drift,
    noise,
    personal,
    play,
    random_adapter,
    send_step,
)
from tests.strategies.toys import COUNTS, LAYOUT, NAMES, NOT_A, VARIANTS, Reference, draw, fedmerge


@pytest.mark.parametrize("theta_norm", ["column", "none"])
@pytest.mark.parametrize("w_client_weight", [True, False])
@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize("variant", ["frozen-a", "factors"])
def test_rounds_are_those_of_an_implementation_in_plain_loops(
    variant: str, w_step: str, w_client_weight: bool, theta_norm: str
) -> None:
    strategy = fedmerge(
        models=3, variant=variant, w_step=w_step, w_client_weight=w_client_weight, theta_norm=theta_norm,
        jitter=0.5, lr_theta=0.8, min_mass=0.05, w_layers="q_proj.B,head.*",
    )  # fmt: skip
    part = LAYOUT.select(() if variant == "factors" else NOT_A)
    strategy.logits = draw(4, 3, seed=7)
    chosen = torch.cat(
        [torch.full((entry.size,), entry.name in ("q_proj.B", "head.weight", "head.bias")) for entry in part.entries]
    )
    rows = [strategy.rows[name] for name in NAMES]
    reference = Reference(strategy.options, strategy.theta, strategy.logits[rows], list(COUNTS), chosen)
    for round_, present in enumerate((NAMES, ("dan", "ada"), NAMES, ("ben",)), start=1):
        displacement = {}
        for name in present:
            received = Adapter(part, torch.tensor(reference.merged(NAMES.index(name))))
            moved = drift(name, round_, received)
            displacement[NAMES.index(name)] = (received.vector.double() - moved.vector.double()).tolist()
        play(strategy, present, round_)
        reference.round(displacement)
        torch.testing.assert_close(
            strategy.logits[rows], torch.tensor(reference.logits, dtype=torch.float64), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(strategy.theta, torch.tensor(reference.theta), rtol=0, atol=2e-5)


def test_trained_a_is_averaged_as_fedavg_does_and_the_rest_is_merged() -> None:
    strategy = fedmerge(models=3, variant="trained-a", jitter=0.5)
    strategy.logits = draw(4, 3, seed=7)
    sent = {name: personal(strategy, name) for name in NAMES}
    before, logits = strategy.theta.double(), strategy.logits.clone()
    play(strategy, NAMES, 1)
    trained = {name: drift(name, 1, sent[name]) for name in NAMES}
    p = [count / sum(COUNTS) for count in COUNTS]
    for name in NAMES:
        delivered = personal(strategy, name)
        for module in LAYOUT.lora_modules:
            expected = sum(p_i * trained[n][module, Factor.A].double() for p_i, n in zip(p, NAMES, strict=True))
            torch.testing.assert_close(delivered[module, Factor.A].double(), expected, rtol=0, atol=1e-6)
    part = LAYOUT.select(NOT_A)
    w = torch.softmax(strategy.logits, dim=1)
    for j in range(3):
        c = torch.stack([p_i * w[strategy.rows[name], j] for p_i, name in zip(p, NAMES, strict=True)])
        moved = torch.stack([(sent[n].part(part).vector - trained[n].part(part).vector).double() for n in NAMES])
        torch.testing.assert_close(strategy.theta[j].double(), before[j] - (c / c.sum()) @ moved, rtol=0, atol=1e-6)
    assert not torch.equal(strategy.logits, logits)


@pytest.mark.parametrize("init", ["jitter", "cluster"])
@pytest.mark.parametrize("theta_norm", ["column", "none"])
@pytest.mark.parametrize("w_step", ["maxnorm", "maxnorm-per-row", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_combination_of_options_runs(variant: str, w_step: str, theta_norm: str, init: str) -> None:
    strategy = fedmerge(models=3, variant=variant, w_step=w_step, theta_norm=theta_norm, init=init)
    start = personal(strategy, "ada").vector.clone()
    for round_ in (1, 2, 3):
        record = play(strategy, NAMES, round_)
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert set(record["weights"]) == set(NAMES)
        for weights in record["weights"].values():
            assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in strategy.state().tensors.values())
    assert strategy.logits.abs().max() > 0
    assert not torch.equal(personal(strategy, "ada").vector, start)
    assert all(personal(strategy, name).is_finite for name in NAMES)


def test_zero_displacements_change_nothing() -> None:
    for w_step in ("maxnorm", "maxnorm-per-row", "adam"):
        strategy = fedmerge(models=3, w_step=w_step)
        state = strategy.state()
        play(strategy, NAMES, 1, lambda name, round_, received: received)
        assert torch.equal(strategy.theta, state.tensors["theta"])
        assert torch.equal(strategy.logits, state.tensors["logits"])


def test_the_order_of_arrival_changes_no_bit() -> None:
    first, second = fedmerge(models=3, w_step="adam", jitter=0.1), fedmerge(models=3, w_step="adam", jitter=0.1)
    for round_ in (1, 2):
        play(first, NAMES, round_)
        play(second, NAMES[::-1], round_)
    for name, tensor in first.state().tensors.items():
        assert torch.equal(tensor, second.state().tensors[name])


def test_the_first_adam_step_of_a_row_is_the_rate_however_late_it_comes() -> None:
    strategy = fedmerge(names=NAMES[:2], models=3, w_step="adam", jitter=0.5, lr_w=0.01)
    for round_ in range(1, 30):
        play(strategy, NAMES[:2], round_)
    strategy.enrol(client_of("late", LAYOUT))
    before = strategy.logits[2].clone()
    play(strategy, ["ada", "late"], 30)
    assert (strategy.logits[2] - before).abs().tolist() == pytest.approx([0.01] * 3, rel=1e-6)


# ---------------------------------------------------------------------------------------------- initialisation, joining


def test_the_start_is_the_base_model_with_tiny_differences_between_the_models() -> None:
    strategy = fedmerge(models=5, variant="factors", jitter=1e-3)
    for entry in LAYOUT.entries:
        models = strategy.theta[:, LAYOUT.slice_of(entry.name)].double()
        spread = float((models - models.mean(dim=0)).norm() / (5 * entry.size) ** 0.5)
        if entry.factor in (Factor.B, Factor.WEIGHT):
            assert spread == pytest.approx(1e-3 / entry.shape[0] ** 0.5, rel=0.5)
        else:
            assert spread == 0
    initial = Adapter.initial(LAYOUT, 3)
    torch.testing.assert_close(personal(strategy, "ada").vector, initial.vector, rtol=0, atol=1e-7)
    assert torch.equal(fedmerge(models=1).theta[0], initial.select(NOT_A).vector)


def test_frozen_a_is_drawn_at_the_client_and_stays() -> None:
    strategy = fedmerge(models=2)
    node = FakeNode("ada", LAYOUT)
    for round_ in (1, 2):
        dispatch = dispatch_of(strategy, "ada", round_)
        blobs = {slot: array.data for slot, array in dispatch.content["adapters"].items()}  # type: ignore[union-attr]
        node.run(dispatch.plan, blobs)
        (held,) = node.slots.values()
        assert torch.equal(held.select([Factor.A]).vector, Adapter.initial(LAYOUT, 3).select([Factor.A]).vector)
        assert held[("q_proj", Factor.B)].abs().max() > 0.1


def test_a_client_that_joins_late_gets_the_mean_of_the_others_weights() -> None:
    strategy = fedmerge(models=3)
    play(strategy, NAMES, 1)
    strategy.logits = torch.tensor([[30.0, -30, 0], [-30, 30, 0], [30, -30, 0], [30, -30, 0]], dtype=torch.float64)
    strategy.enrol(client_of("late", LAYOUT))
    weights = torch.softmax(strategy.logits[strategy.rows["late"]], dim=0)
    assert weights.tolist() == pytest.approx([0.75, 0.25, 0.0], abs=1e-9)
    logits = strategy.logits.clone()
    strategy.enrol(client_of("ben", LAYOUT, 30))  # again: after a restart of its machine, say
    assert torch.equal(strategy.logits, logits)


def test_clusters_start_from_the_mean_upload_of_each_group() -> None:
    strategy = fedmerge(models=2, init="cluster")

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        sign = 1 if name in ("ada", "dan") else -1
        return Adapter(
            received.layout, sign * torch.ones(received.layout.size) + 0.01 * noise(name, 1, received.layout).vector
        )

    part = LAYOUT.select(NOT_A)
    uploads = {name: move(name, 1, Adapter.zeros(part)).vector for name in NAMES}
    record = play(strategy, NAMES, 1, move)
    centres = {
        ("ada", "dan"): (uploads["ada"] + uploads["dan"]) / 2,
        ("ben", "cyd"): (uploads["ben"] + uploads["cyd"]) / 2,
    }
    for members, centre in centres.items():
        for name in members:
            weights = record["weights"][name]
            favourite = max(range(2), key=lambda j, found=weights: found[j])  # type: ignore[misc]
            torch.testing.assert_close(strategy.theta[favourite], centre, rtol=0, atol=1e-5)
            assert weights[favourite] > 0.9
    assert strategy.logits.sum(dim=1).abs().max() < 1e-9
    before = strategy.theta.clone()
    play(strategy, NAMES, 2)
    assert not torch.equal(strategy.theta, before)


def test_cluster_logits_are_minus_the_scaled_squared_distances() -> None:
    uploads = draw(6, 20, seed=3)
    centres, logits = cluster(uploads, 3, 0.25, seed=1)
    distances = torch.tensor([[float(((u - c) ** 2).sum()) for c in centres] for u in uploads], dtype=torch.float64)
    expected = -distances / (0.25 * distances.mean())
    torch.testing.assert_close(logits, expected - expected.mean(dim=1, keepdim=True), rtol=0, atol=1e-9)
    nearest = distances.argmin(dim=1)
    for j in range(3):  # Lloyd's fixed point
        torch.testing.assert_close(centres[j], uploads[nearest == j].mean(dim=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_models_than_clients_can_be_clustered(variant: str) -> None:
    strategy = fedmerge(models=7, init="cluster", variant=variant)
    for round_ in (1, 2, 3):
        play(strategy, NAMES if round_ > 1 else NAMES[:2], round_)
    assert strategy.theta.shape[0] == 7
    assert all(bool(torch.isfinite(tensor).all()) for tensor in strategy.state().tensors.values())


def test_a_client_that_missed_the_clustering_has_the_mean_weights() -> None:
    strategy = fedmerge(models=2, init="cluster")
    weights = play(strategy, ["ada", "ben", "cyd"], 1)["weights"]
    expected = [sum(weights[name][j] for name in ("ada", "ben", "cyd")) / 3 for j in range(2)]
    assert weights["dan"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("uploads", [torch.zeros(3, 8), torch.ones(1, 8), torch.ones(4, 8)])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clusters_of_equal_uploads_are_finite(uploads: Tensor) -> None:
    centres, logits = cluster(uploads, 3, 0.25, seed=2**62)
    assert centres.shape == (3, 8)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(centres, uploads[:1].expand(3, 8))


# ------------------------------------------------------------------------------------------------------------ transport


@pytest.mark.parametrize("variant", VARIANTS)
def test_displacements_are_measured_from_what_the_client_received(variant: str) -> None:
    """With a lossy downlink, a client that does not move changes nothing: the encoding's loss is no displacement."""
    strategy = fedmerge(models=2, variant=variant, training=Training(downlink_encoding="int8"))
    strategy.theta = draw(*strategy.theta.shape, seed=4).float()
    theta, logits = strategy.theta.clone(), strategy.logits.clone()
    for name in NAMES:
        dispatch = dispatch_of(strategy, name)
        ((slot, received),) = dispatch.received.items()
        ((_, sent),) = strategy.brief(1, strategy.clients[name]).adapters.items()
        assert (received.vector - sent.vector).abs().max() > 1e-4
        strategy.absorb(
            1, strategy.clients[name], Answer({slot: received}, {slot: received}, {}, 10, report_pb2.Report())
        )
    strategy.settle(1)
    assert torch.equal(strategy.theta, theta)
    assert torch.equal(strategy.logits, logits)


def test_the_pull_is_to_what_was_received_and_frozen_a_is_not_trained() -> None:
    for variant, mu in itertools.product(VARIANTS, (0.0, 0.02)):
        strategy = fedmerge(models=2, variant=variant, mu=mu)
        brief = strategy.brief(1, strategy.clients["ada"])
        kinds = [step.WhichOneof("kind") for step in brief.steps]
        assert kinds == ["initialise"] * (variant == "frozen-a") + ["evaluate", "train", "send"]
        train = brief.steps[-2].train
        assert train.HasField("proximal") == (mu > 0)
        assert (train.proximal.slot, train.proximal.mu) == ((next(iter(brief.adapters)), mu) if mu else ("", 0.0))
        assert list(train.part.factors) == list(send_step(brief).part.factors)
        assert bool(train.part.factors) == (variant == "frozen-a")


# ---------------------------------------------------------------------------------------------------------------- state


def through_the_disk(state: State) -> State:
    return State(load(save(state.tensors)), json.loads(json.dumps(state.values, allow_nan=False)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"w_step": "adam"},
        {"w_step": "maxnorm-per-row", "variant": "trained-a"},
        {"init": "cluster", "variant": "factors"},
        {"init": "cluster", "w_step": "adam"},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any]) -> None:
    straight = fedmerge(models=3, **options)
    for round_ in (1, 2, 3, 4, 5):
        play(straight, NAMES if round_ != 2 else NAMES[:3], round_)
    for stop in (0, 1, 3):
        first = fedmerge(models=3, **options)
        for round_ in range(1, stop + 1):
            play(first, NAMES if round_ != 2 else NAMES[:3], round_)
        state = first.state()
        saved = through_the_disk(state)
        for round_ in range(stop + 1, 6):  # the first run goes on; what was saved must not follow it
            play(first, NAMES if round_ != 2 else NAMES[:3], round_)
        for name, tensor in saved.tensors.items():
            assert torch.equal(tensor, state.tensors[name]), f"the saved {name} changed afterwards"
        second = fedmerge(names=NAMES[::-1], models=3, **options)  # registered in another order
        for name, count in zip(NAMES, COUNTS, strict=True):
            second.clients[name] = client_of(name, LAYOUT, count)
        second.load_state(saved)
        for round_ in range(stop + 1, 6):
            play(second, NAMES if round_ != 2 else NAMES[:3], round_)
        for other in (first, second):
            for name in NAMES:
                assert torch.equal(personal(other, name).vector, personal(straight, name).vector)
            for name, tensor in straight.state().tensors.items():
                assert torch.equal(tensor, other.state().tensors[name])


def test_a_client_that_the_saved_state_does_not_know_is_new() -> None:
    first = fedmerge(names=NAMES[:2], models=3)
    play(first, NAMES[:2], 1)
    second = fedmerge(names=("zoe", *NAMES[:2]), models=3)
    second.load_state(through_the_disk(first.state()))
    for name in NAMES[:2]:
        assert torch.equal(personal(second, name).vector, personal(first, name).vector)
    weights = play(second, ["zoe", *NAMES[:2]], 2)["weights"]
    assert sum(weights["zoe"]) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------------- errors


def test_w_layers_that_match_nothing_refuse_every_client_and_leave_nothing_behind() -> None:
    strategy = FedMerge(FedMergeOptions(models=5, init="jitter", w_layers="head.*, k_proj.*"))
    for _ in range(2):
        with pytest.raises(
            StrategyError, match=r"w-layers: 'k_proj\.\*' matches none of the tensors head\.bias, head\.wei"
        ):
            strategy.enrol(client_of("ada", LAYOUT))
        assert not strategy.clients
    with pytest.raises(StrategyError, match="matches none"):
        FedMerge(FedMergeOptions(w_layers="*.A")).enrol(client_of("ada", LAYOUT))  # A is not merged with a frozen A
    FedMerge(FedMergeOptions(w_layers="*.A", variant="factors")).enrol(client_of("ada", LAYOUT))


def test_w_layers_choose_what_the_logits_see() -> None:
    """Clients that train only the classifier: the default patterns see no difference, ``head.*`` does."""

    def move(name: str, round_: int, received: Adapter) -> Adapter:
        moved = received.clone()
        moved["head", Factor.WEIGHT].add_(noise(name, round_, received.layout)["head", Factor.WEIGHT])
        return moved

    blind, seeing = fedmerge(models=2, jitter=0.5), fedmerge(models=2, jitter=0.5, w_layers="head.weight")
    for strategy in (blind, seeing):
        play(strategy, NAMES, 1, move)
    assert not blind.logits.any()
    assert float(seeing.logits.abs().max()) == pytest.approx(0.05)


def test_nothing_can_be_asked_before_a_client_is_enrolled() -> None:
    strategy: AlloyStrategy = FedMerge()
    with pytest.raises(StrategyError, match="no client is enrolled"):
        strategy.state()
    with pytest.raises(StrategyError, match="no client is enrolled"):
        strategy.load_state(fedmerge().state())


def test_the_gradient_is_that_of_its_definition() -> None:
    theta, logits, moved = draw(3, 5000), draw(5, 3, seed=1), draw(5, 5000, seed=2)
    weights = torch.softmax(logits.double(), dim=1)
    merged = weights @ theta.double()
    expected = torch.stack([weights[i] * ((theta.double() - merged[i]) @ moved[i].double()) for i in range(5)])
    torch.testing.assert_close(logit_gradient(theta, logits, moved), expected, rtol=0, atol=1e-10)


def test_random_adapters_are_not_all_alike() -> None:
    """The helpers that everything above rests on."""
    assert not torch.equal(noise("ada", 1, LAYOUT).vector, noise("ada", 2, LAYOUT).vector)
    assert not torch.equal(noise("ada", 1, LAYOUT).vector, noise("ben", 1, LAYOUT).vector)
    assert torch.equal(random_adapter(LAYOUT, 4).vector, random_adapter(LAYOUT, 4).vector)
