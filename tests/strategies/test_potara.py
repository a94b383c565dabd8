"""Potara's protocol: two branches that never touch, and one merge per client, wherever it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.adapter import Adapter
from adapters.algebra import stack, truncate, weighted_sum
from proto.fedalloy.v1 import plan_pb2
from strategies.base import Brief
from strategies.fedavg import FedAvg
from strategies.options import OptionError
from strategies.potara import LOCAL, MERGED, Potara, PotaraOptions
from strategies.weighting import Evidence, Weight
from tests.strategies.conftest import client_of, layout_of, play, random_adapter

NAMES = ("ada", "ben", "cyd")
COUNTS = (10, 35, 5)
LAYOUT = layout_of()


def potara(rounds: int = 4, **options: Any) -> Potara:
    strategy = Potara(PotaraOptions(**options), seed=5, rounds=rounds)
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
    third, fourth = (strategy.brief(round_, strategy.clients["ada"]) for round_ in (3, 4))
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
            merged = server.deliver(server.clients["ada"]).adapters[MERGED]
            assert merged is (federated if value else local)


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


@pytest.mark.parametrize(("rounds", "federated"), [(5, 2), (4, 2), (3, 1), (2, 1), (0, 1)])
def test_by_default_half_of_the_rounds_are_federated(rounds: int, federated: int) -> None:
    assert Potara(rounds=rounds).federated_rounds == federated


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


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"weight": "fisher"}, r"potara.weight = 'fisher'.*expected one of client-fisher"),
        ({"weight": "plugin", "granularity": "parameter"}, "potara.granularity = 'parameter' with weight 'plugin'"),
        ({"weight": "line-search", "search_points": 0}, "search-points = 0"),
        ({"weight": "line-search", "granularity": "module"}, "granularity 'module'"),
        ({"search_points": 2}, "potara.search-points = 2, expected a finite number of at least 3"),
        ({"fisher_samples": 0}, "potara.fisher-samples = 0"),
        ({"damping": -1.0}, "potara.damping = -1.0"),
        ({"merge_at": "both"}, "potara.merge-at = 'both'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], finding: str) -> None:
    with pytest.raises(OptionError, match=finding):
        PotaraOptions(**options)


def test_a_run_that_would_end_before_the_merge_is_refused() -> None:
    with pytest.raises(OptionError, match="federated-rounds = 4 of num-server-rounds = 4, expected at least one round"):
        Potara(PotaraOptions(federated_rounds=4), rounds=4)
    with pytest.raises(OptionError, match="federated-rounds = 1 of num-server-rounds = 1"):
        Potara(rounds=1)
