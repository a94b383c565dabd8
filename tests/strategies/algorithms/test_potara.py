"""Potara's protocol: two separate branches, and one merge per client, whichever side computes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate, weighted_sum
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms.fedavg import FedAvg
from strategies.algorithms.potara import LOCAL, MERGED, Potara
from strategies.algorithms.potara_options import PotaraOptions
from strategies.algorithms.potara_weights import Evidence, Weight
from strategies.framework.exchange import Answer, Brief, Client
from tests.strategies.conftest import client_of, layout_of, play, random_adapter

NAMES = ("ada", "ben", "cyd")
COUNTS = (10, 35, 5)
LAYOUT = layout_of()


def potara(rounds: int = 4, **options: Any) -> Potara:
    strategy = Potara(PotaraOptions(**({"federated_rounds": rounds // 2} | options)), seed=5, rounds=rounds)
    for name, count in zip(NAMES, COUNTS, strict=True):
        strategy.enrol(client_of(name, LAYOUT, count))
    return strategy


def evidence(examples: int = 10, modules: int = 3) -> Evidence:
    ones = [1.0] * modules
    return Evidence(examples, True, ones, ones, ones, ones, ones, ones, [3.0, 1.0, 2.0], samples=4)


def weighed(strategy: Potara, name: str, value: float | dict[str, float]) -> None:
    """Give a client a weight, as if it had been found."""
    by_module = value if isinstance(value, dict) else {"": value}
    strategy.weights[name] = {m: Weight(w, w, 1.0, 1.0, 0.0, 2.0) for m, w in by_module.items()}
    strategy.evidence[name] = evidence()


def answer(
    fisher: report_pb2.FisherResult | None = None,
    distances: Sequence[Sequence[float]] = (),
    losses: Sequence[float] = (),
) -> Answer:
    report = report_pb2.Report()
    for squared in distances:
        report.results.add().distance.squared.extend(squared)
    if fisher is not None:
        report.results.add().fisher.CopyFrom(fisher)
    points = [i / max(len(losses) - 1, 1) for i in range(len(losses))]
    metrics = {f"search-{point:.3f}": {"loss": loss} for point, loss in zip(points, losses, strict=True)}
    return Answer({}, {}, metrics, 10, report)


def kinds(brief: Brief) -> list[str]:
    return [step.WhichOneof("kind") or "" for step in brief.steps]


def terms(mixture: plan_pb2.Mixture) -> dict[str, float]:
    return {term.slot: term.scalar for term in mixture.terms}


def test_the_federated_branch_is_fedavg_to_the_bit() -> None:
    strategy, plain = potara(), FedAvg(seed=5)
    for name, count in zip(NAMES, COUNTS, strict=True):
        plain.enrol(client_of(name, LAYOUT, count))
    for round_ in (1, 2):
        for name in NAMES:
            ours, theirs = (s.brief(round_, s.clients[name]) for s in (strategy, plain))
            assert ours.steps == theirs.steps
        play(strategy, NAMES, round_)
        play(plain, NAMES, round_)
    assert torch.equal(strategy.federated.state().tensors["model"], plain.state().tensors["model"])
    strategy.settle(3)  # and later rounds leave it alone
    assert torch.equal(strategy.federated.state().tensors["model"], plain.state().tensors["model"])


def test_the_local_branch_starts_from_the_seed_and_is_never_sent_anything() -> None:
    strategy = potara(local_steps=17)
    play(strategy, NAMES, 1)
    play(strategy, NAMES, 2)
    third = strategy.brief(3, strategy.clients["ada"])
    strategy.absorb(3, strategy.clients["ada"], answer())
    fourth = strategy.brief(4, strategy.clients["ada"])
    assert third.adapters == {}
    assert kinds(third) == ["initialise", "evaluate", "train"]
    assert (third.steps[0].initialise.seed, third.steps[0].initialise.keep_existing) == (5, False)
    assert fourth.steps[0].initialise.keep_existing
    assert list(fourth.adapters) == ["global"]  # which is not in the mixture that is trained
    for brief in (third, fourth):
        train = brief.steps[2].train
        assert (terms(train.mixture), list(train.slots), train.steps) == ({LOCAL: 1.0}, [LOCAL], 17)
        assert "send" not in kinds(brief)
    for round_ in (1, 2):
        sends = [step.send.slot for step in strategy.brief(round_, strategy.clients["ada"]).steps if step.send.slot]
        assert sends == ["global"]


def test_halves_of_the_data_are_trained_where_a_rule_needs_the_variance() -> None:
    for options, trained in (
        ({"weight": "random-effects"}, 3),
        ({"weight": "plugin"}, 3),
        ({"weight": "plugin", "variance": "curvature"}, 1),
        ({"weight": "client-fisher"}, 1),
        ({"weight": "line-search"}, 1),
    ):
        strategy = potara(local_steps=10, **options)
        strategy.absorb(3, strategy.clients["ada"], answer())
        brief = strategy.brief(4, strategy.clients["ada"])
        trains = [step.train for step in brief.steps if step.HasField("train")]
        assert len(trains) == trained
        if trained == 3:  # as many steps as the local branch had in all its rounds
            assert [(train.fold.index, train.fold.count, train.steps) for train in trains[1:]] == [
                (0, 2, 20),
                (1, 2, 20),
            ]
    strategy.enrol(client_of("one", LAYOUT, 1))
    assert kinds(strategy.brief(4, strategy.clients["one"])).count("train") == 1


def test_an_endpoint_is_that_adapter_itself() -> None:
    for value, slot in ((1.0, "global"), (0.0, LOCAL)):
        for space in ("delta", "delta-truncated", "factor"):
            strategy = potara(space=space)
            weighed(strategy, "ada", value)
            brief = strategy.deliver(strategy.clients["ada"])
            assert terms(brief.steps[-2].save.mixture) == {slot: 1.0}
            assert brief.adapters == {}
            server = potara(space=space, merge_at="server")
            weighed(server, "ada", value)
            federated, local = random_adapter(LAYOUT, 1), random_adapter(LAYOUT, 2)
            server.federated.model, server.local["ada"] = federated, local
            assert server.deliver(server.clients["ada"]) == brief  # the client holds it: nothing is sent


def test_the_merge_is_the_mixture_with_the_weight_on_the_federated_adapter() -> None:
    strategy = potara()
    weighed(strategy, "ada", 0.3)
    brief = strategy.deliver(strategy.clients["ada"])
    assert terms(brief.steps[-2].save.mixture) == {"global": 0.3, LOCAL: 0.7}
    labels = {s.evaluate.label: terms(s.evaluate.mixture) for s in brief.steps if s.HasField("evaluate")}
    assert labels == {
        "local": {LOCAL: 1.0},
        "half": {"global": 0.5, LOCAL: 0.5},
        "federated": {"global": 1.0},
        "searched": labels["searched"],
        "personal": {"global": 0.3, LOCAL: 0.7},
    }
    assert 0.5 < labels["searched"][LOCAL] < 1 or 0.5 < labels["searched"]["global"] < 1


@pytest.mark.parametrize("space", ["delta", "delta-truncated", "factor"])
def test_merged_at_the_server_it_is_what_the_spaces_say(space: str) -> None:
    strategy = potara(space=space, merge_at="server", granularity="module", weight="plugin")
    weighed(strategy, "ada", {"q_proj": 0.2, "v_proj": 0.9, "head": 0.5})
    federated, local = random_adapter(LAYOUT, 1), random_adapter(LAYOUT, 2)
    strategy.federated.model, strategy.local["ada"] = federated, local
    merged = strategy.deliver(strategy.clients["ada"]).adapters[MERGED]
    fed, own = ({"q_proj": q, "v_proj": v, "head": 0.5} for q, v in ((0.2, 0.9), (0.8, 1.0 - 0.9)))
    exact = stack([federated, local], [fed, own])
    expected = {
        "delta": exact,
        "delta-truncated": truncate(exact, LAYOUT),
        "factor": weighted_sum([federated, local], [fed, own]),
    }[space]
    assert torch.equal(merged.vector, expected.vector)
    assert max(merged.layout.ranks.values()) == (8 if space == "delta" else 4)


def test_a_client_that_missed_the_last_round_gets_the_federated_adapter() -> None:
    strategy = potara()
    play(strategy, NAMES, 1)
    weighed(strategy, "ada", 0.3)
    brief = strategy.deliver(strategy.clients["ben"])
    assert list(brief.adapters) == ["global"]
    assert terms(brief.steps[-2].save.mixture) == {"global": 1.0}
    strategy.evidence = {"ada": evidence()}
    record = strategy.settle(4)
    assert record["weights"]["ben"] == {"weight": 1.0, "flag": "absent"}
    assert {"weight", "raw", "a", "b", "c", "D", "q"} <= set(record["weights"]["ada"])


def test_a_client_that_never_trained_the_federated_adapter_has_no_share_in_it() -> None:
    strategy = potara()
    play(strategy, ["ada", "ben"], 1)
    assert strategy.trained == {"ada", "ben"}


def test_state_holds_uploaded_local_adapters() -> None:
    strategy = potara(merge_at="server", space="factor")
    play(strategy, NAMES, 1)
    strategy.local["ada"] = random_adapter(LAYOUT, 3)
    strategy.evidence = {"ada": evidence()}
    strategy.settle(4)
    again = potara(merge_at="server", space="factor")
    again.load_state(strategy.state())
    merged = [s.deliver(s.clients["ada"]).adapters[MERGED] for s in (strategy, again)]
    assert torch.equal(merged[0].vector, merged[1].vector)
    assert isinstance(merged[0], Adapter)


def test_what_no_weight_is_made_of_is_not_computed() -> None:
    for options, fisher, searched in (
        ({}, 1, 0),
        ({"weight": "client-fisher-clipped"}, 1, 0),
        ({"weight": "server-scalar"}, 1, 0),
        ({"weight": "plugin"}, 0, 0),
        ({"weight": "random-effects", "variance": "curvature"}, 1, 0),
        ({"weight": "half"}, 0, 0),
        ({"weight": "line-search"}, 0, 21),
        ({"search_points": 5}, 1, 5),
    ):
        strategy = potara(**options)
        plan = strategy.brief(4, strategy.clients["ada"]).steps
        assert sum(step.HasField("fisher") for step in plan) == fisher, options
        searches = [step.evaluate for step in plan if step.evaluate.label.startswith("search-")]
        assert len(searches) == searched
        assert all(step.split == "validation" and step.loss_only for step in searches)


def test_other_dampings_are_asked_for_at_once_and_their_weights_are_recorded() -> None:
    strategy = potara(damping=1.0, dampings="0.1,0.001")
    (asked,) = [s.fisher for s in strategy.brief(4, strategy.clients["ada"]).steps if s.HasField("fisher")]
    assert list(asked.more_dampings) == [0.1, 0.001]
    play(strategy, NAMES, 1)
    reported = distinct()
    for damping, (fed, local) in ((0.1, (1.0, 3.0)), (0.001, (1.0, 9.0))):
        more = reported.more.add(relative_damping=damping)
        more.variance_first.extend([fed] * 3)
        more.variance_second.extend([local] * 3)
        more.covariance.extend([0.0] * 3)
    strategy.absorb(4, strategy.clients["ada"], answer(reported, [[1.0, 2.0, 3.0]]))
    record = strategy.settle(4)
    assert record["weights"]["ada"]["dampings"] == pytest.approx({"0.1": 0.75, "0.001": 0.9})
    again = potara(damping=1.0, dampings="0.1,0.001")
    again.load_state(strategy.state())
    for found in (strategy, again):
        labels = {s.evaluate.label: terms(s.evaluate.mixture) for s in found.deliver(found.clients["ada"]).steps}
        assert labels["damping-0.1"] == pytest.approx({"global": 0.75, LOCAL: 0.25})
        assert labels["damping-0.001"] == pytest.approx({"global": 0.9, LOCAL: 0.1})


def distinct() -> report_pb2.FisherResult:
    """A different number in every place."""
    found = report_pb2.FisherResult(samples=6, dropped=1)
    described = report_pb2.FisherResult.DESCRIPTOR.fields
    lists = [field.name for field in described if field.is_repeated and field.message_type is None]
    for index, name in enumerate(lists):
        getattr(found, name).extend([10.0 * (index + 1) + module for module in range(3)])
    return found


def test_evidence_is_what_the_client_reported() -> None:
    strategy = potara(weight="client-fisher", search_points=3)
    play(strategy, ["ada", "ben"], 1)
    for name in NAMES:
        strategy.absorb(4, strategy.clients[name], answer(distinct(), [[1.0, 2.0, 3.0]], [3.0, 1.0, 2.0]))
    found = strategy.evidence["ada"]
    assert (found.examples, found.samples, found.dropped, found.losses) == (10, 6, 1, [3.0, 1.0, 2.0])
    assert (found.variance_fed, found.variance_local) == ([30.0, 31.0, 32.0], [40.0, 41.0, 42.0])
    assert found.covariance == [50.0, 51.0, 52.0]
    assert (found.distance, found.q) == ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    halves = potara(weight="plugin")
    halves.absorb(4, halves.clients["ada"], answer(None, [[4.0, 8.0, 12.0], [1.0, 2.0, 3.0]]))
    assert halves.evidence["ada"].b == [1.0, 2.0, 3.0]  # of two halves: a quarter of their squared distance
    assert halves.evidence["ada"].distance == [1.0, 2.0, 3.0]
    assert [strategy.evidence[name].takes_part for name in NAMES] == [True, True, False]
    curved = potara(weight="plugin", variance="curvature", search_points=0)
    curved.absorb(4, curved.clients["ada"], answer(distinct(), [[1.0, 2.0, 3.0]]))
    assert curved.evidence["ada"].b == [7.0, 7.1, 7.2]  # effective dimension over 10 examples
    assert curved.evidence["ada"].q == [60.0, 61.0, 62.0]
    assert curved.evidence["ada"].distance == [1.0, 2.0, 3.0]
    for scale, expected in (("client", 123 / 216), ("total", 123 / (93 * 10 / 45 + 123))):
        total = potara(weight="client-fisher", fed_scale=scale, search_points=0)
        play(total, ["ada", "ben"], 1)
        total.absorb(4, total.clients["ada"], answer(distinct(), [[1.0, 2.0, 3.0]]))
        total.settle(4)
        assert total.weights["ada"][""].value == pytest.approx(expected)


def test_everyone_takes_part_in_the_local_branch_whatever_is_sampled() -> None:
    strategy = potara()
    assert [strategy.needs_everyone(round_) for round_ in (1, 2, 3, 4)] == [False, False, True, True]


def test_a_client_without_held_out_examples_is_calibrated_on_those_it_trains_on() -> None:
    strategy = potara()
    task = report_pb2.Task(name="toy", kind="toy", examples={"train": 10, "test": 5})
    bare = Client("bare", 7, LAYOUT, 10, "base", report_pb2.Registration(tasks=[task]))
    strategy.enrol(bare)
    (fisher,) = [step.fisher for step in strategy.brief(4, bare).steps if step.HasField("fisher")]
    assert fisher.split == "train"


def test_a_client_without_held_out_examples_gets_half_and_says_so() -> None:
    strategy = potara(weight="line-search")
    task = report_pb2.Task(name="toy", kind="toy", examples={"train": 10, "test": 5})
    bare = Client("bare", 7, LAYOUT, 10, "base", report_pb2.Registration(tasks=[task]))
    strategy.enrol(bare)
    plan = strategy.brief(4, bare).steps
    assert "validation" not in {step.evaluate.split for step in plan} | {step.fisher.split for step in plan}
    strategy.absorb(4, bare, answer(distinct(), [[1.0, 2.0, 3.0]]))
    record = strategy.settle(4)
    assert (record["weights"]["bare"]["weight"], record["weights"]["bare"]["flag"]) == (0.5, "no-held-out")
    labels = [step.evaluate.label for step in strategy.deliver(bare).steps if step.HasField("evaluate")]
    assert labels == ["local", "half", "federated", "personal"]


def test_resumed_without_a_client_and_with_one_that_comes_later() -> None:
    strategy = potara(merge_at="server", weight="half")
    play(strategy, NAMES, 1)
    for seed, name in enumerate(NAMES):
        strategy.local[name] = random_adapter(LAYOUT, seed)
        strategy.evidence[name] = evidence()
    state = strategy.state()
    again = Potara(PotaraOptions(merge_at="server", weight="half"), seed=5, rounds=4)
    again.enrol(client_of("ben", LAYOUT, 35))  # ada, who was first, is gone
    again.load_state(state)
    again.enrol(client_of("cyd", LAYOUT, 5))
    assert set(again.state().tensors) == set(state.tensors)
    assert {name: list(again.deliver(again.clients[name]).adapters) for name in ("ben", "cyd")} == {
        "ben": [MERGED],
        "cyd": [MERGED],
    }


def test_per_module_weights_that_agree_are_one_weight() -> None:
    strategy = potara(weight="plugin", granularity="module")
    weighed(strategy, "ada", {"q_proj": 1.0, "v_proj": 1.0, "head": 1.0})
    assert terms(strategy.deliver(strategy.clients["ada"]).steps[-2].save.mixture) == {"global": 1.0}
