"""Clients with two adapters, or one in two parts: what is trained together, and what the client's model is."""

from __future__ import annotations

import pytest
import torch

from proto.fedalloy.v1 import plan_pb2
from strategies import STRATEGIES
from strategies.framework.exchange import StrategyError
from strategies.framework.options import OptionError
from tests.strategies.conftest import client_of, layout_of
from tests.strategies.fleet import LAYOUT, NAMES, Fleet


def trains(fleet: Fleet, name: str = "ada") -> list[plan_pb2.TrainStep]:
    return [step.train for step in fleet.brief(name).steps if step.HasField("train")]


def coefficients(mixture: plan_pb2.Mixture) -> dict[str, float]:
    return {term.slot: term.scalar for term in mixture.terms}


def test_ditto_pulls_its_own_adapter_to_what_was_received() -> None:
    own, shared = trains(Fleet("ditto", pull=0.5))
    assert (list(own.slots), own.proximal.slot, own.proximal.mu) == (["local"], "global", 0.5)
    assert (list(shared.slots), shared.HasField("proximal")) == (["global"], False)
    alone, _ = trains(Fleet("ditto", pull=0.0))
    (local,) = trains(Fleet("local"))
    assert alone == local


def test_ditto_shares_what_fedavg_shares_and_keeps_its_own() -> None:
    ditto, fedavg = Fleet("ditto"), Fleet("fedavg")
    for fleet in (ditto, fedavg):
        fleet.play()
        fleet.play()
    assert torch.equal(ditto.strategy.state().tensors["model"], fedavg.strategy.state().tensors["model"])
    saved = ditto.deliver()
    assert len({adapter.digest for adapter in saved.values()}) == 3
    assert saved["ada"].digest == ditto["ada"].slots["local"].digest


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, "global"), (1.0, "local")])
def test_apfl_at_its_ends_is_one_of_the_two(alpha: float, expected: str) -> None:
    fleet = Fleet("apfl", adaptive=False, alpha=alpha)
    fleet.play()
    for who, adapter in fleet.deliver().items():
        assert torch.equal(adapter.vector, fleet[who].slots[expected].vector)


def test_apfl_learns_its_coefficient_with_its_own_adapter() -> None:
    inside, alone = trains(Fleet("apfl"))
    assert list(inside.slots) == ["local", "gates"]
    assert [(term.slot, term.gate.complement) for term in inside.mixture.terms] == [("local", False), ("global", True)]
    assert (list(alone.slots), coefficients(alone.mixture)) == (["global"], {"global": 1.0})


def test_feddpa_trains_its_own_beside_the_global_adapter_from_the_second_round_on() -> None:
    fleet = Fleet("feddpa", local_share=0.25)
    assert [list(train.slots) for train in trains(fleet)] == [["global"]]
    fleet.play()
    first = fleet.deliver()["ada"]
    assert torch.equal(first.vector, fleet.strategy.state().tensors["model"])  # nobody has one of its own
    fleet = Fleet("feddpa", local_share=0.25)
    fleet.play()
    own, shared = trains(fleet)
    assert (list(own.slots), coefficients(own.mixture)) == (["local"], {"global": 0.75, "local": 0.25})
    assert (list(shared.slots), coefficients(shared.mixture)) == (["global"], {"global": 1.0})
    fleet.play()
    assert coefficients(fleet.strategy.deliver(fleet.strategy.clients["ada"]).steps[-2].save.mixture) == {
        "global": 0.75,
        "local": 0.25,
    }


def test_feddpa_f_sends_the_global_adapter_once_more_and_then_nothing() -> None:
    fleet = Fleet("feddpa", variant="f", federated_rounds=1)
    fleet.play()
    model = fleet.strategy.state().tensors["model"]
    brief = fleet.brief("ada")
    assert set(brief.adapters) == {"global"}
    assert [step.WhichOneof("kind") for step in brief.steps] == ["initialise", "evaluate", "train"]
    fleet.play()
    assert not fleet.brief("ada").adapters
    fleet.play()
    assert torch.equal(fleet.strategy.state().tensors["model"], model)


def test_feddpa_weighs_by_example_what_it_trains_with_a_fixed_share() -> None:
    fleet = Fleet("feddpa", weights="example", local_share=0.25, references=7)
    assert [step.WhichOneof("kind") for step in fleet.brief("ada").steps] == ["initialise", "evaluate", "train", "send"]
    fleet.play()
    fleet.play()
    plan = fleet.brief("ada").steps
    assert [step.WhichOneof("kind") for step in plan] == [
        "initialise", "likeness", "evaluate", "train", "train", "send"
    ]  # fmt: skip
    asked, mix = plan[1].likeness, plan[2].evaluate.mixture
    assert (asked.source, asked.samples, asked.most, asked.split) == ("local", 7, 0.25, "train")
    assert ([term.slot for term in mix.terms], mix.likeness) == (["local", "global"], asked.slot)
    assert coefficients(trains(fleet)[0].mixture) == {"global": 0.75, "local": 0.25}
    delivered = fleet.strategy.deliver(fleet.strategy.clients["ada"]).steps
    assert [step.WhichOneof("kind") for step in delivered] == ["initialise", "likeness", "save", "evaluate"]
    assert delivered[2].save.mixture == delivered[3].evaluate.mixture == mix


def test_fedrep_divides_adapter_and_steps() -> None:
    head, body = trains(Fleet("fedrep", own_steps=0.4))
    assert (list(head.part.modules), head.steps) == (["head"], 12)
    assert (list(body.part.modules), body.steps) == (["q_proj", "v_proj"], 18)
    (both,) = trains(Fleet("fedrep", joint=True))
    assert not both.part.modules
    assert both.steps == 30
    head, body = trains(Fleet("fedrep", own="v_*,head"))
    assert list(head.part.modules) == ["v_proj", "head"]
    for wrong, layout in (("head", layout_of(head=0)), ("none-*", LAYOUT), ("*", LAYOUT)):
        strategy = STRATEGIES["fedrep"](STRATEGIES["fedrep"].Options(own=wrong))
        with pytest.raises(StrategyError, match="expected some and not all"):
            strategy.enrol(client_of("ada", layout))
        assert not strategy.clients


def test_fedrep_keeps_heads_and_shares_the_rest() -> None:
    fleet = Fleet("fedrep")
    fleet.play()
    heads = {who: fleet[who].slots["global"].select(modules=["head"]).digest for who in NAMES}
    assert len(set(heads.values())) == 3
    saved = fleet.deliver()
    assert {who: saved[who].select(modules=["head"]).digest for who in NAMES} == heads
    assert len({saved[who].select(modules=["q_proj", "v_proj"]).digest for who in NAMES}) == 1


def test_fedalt_gives_everybody_the_mean_of_the_others() -> None:
    fleet = Fleet("fedalt")
    assert not fleet.brief("ada").adapters
    fleet.play(only=("ada", "ben"))
    own = {who: fleet[who].slots["local"] for who in ("ada", "ben")}
    assert fleet.brief("ada").adapters["rest"].digest == own["ben"].digest
    assert fleet.brief("ben").adapters["rest"].digest == own["ada"].digest
    both = fleet.strategy.weigh(["ada", "ben", "cyd"])  # type: ignore[attr-defined]
    assert both.tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    (step,) = trains(fleet)
    assert (list(step.slots), [term.slot for term in step.mixture.terms]) == (["local", "gates"], ["local", "rest"])


@pytest.mark.parametrize(
    ("mixer", "kind"),
    [
        ("token", plan_pb2.GATE_KIND_TOKEN),
        ("input", plan_pb2.GATE_KIND_INPUT),
        ("scalar", plan_pb2.GATE_KIND_SCALAR),
    ],
)
def test_fedalts_mixer_looks_at_tokens_at_examples_or_at_nothing(mixer: str, kind: plan_pb2.GateKind) -> None:
    assert STRATEGIES["fedalt"].Options().mixer == "token"  # the paper's
    brief = Fleet("fedalt", mixer=mixer).brief("ada")
    assert [step.initialise.gate for step in brief.steps if step.initialise.gate] == [kind]
    (step,) = [step.train for step in brief.steps if step.HasField("train")]
    ((scale,),) = [[rate.scale for rate in step.rate_scales]]
    assert (scale == 1.0) == (mixer != "scalar")  # one number has to move far


def test_fml_takes_turns_in_teaching() -> None:
    fleet = Fleet("fml", alpha=0.8, beta=0.5, turns=3, temperature=2.0)
    found = [step.distill for step in fleet.brief("ada").steps if step.HasField("distill")]
    lessons = [
        (d.train.slots[0], d.train.steps, d.teacher.terms[0].slot, [(t.task, t.weight) for t in d.tasks]) for d in found
    ]
    private = ("local", 10, "global", [("toy", pytest.approx(0.25))])
    assert lessons == [private, ("global", 10, "local", [("toy", pytest.approx(1.0))])] * 3
    assert {d.temperature for d in found} == {2.0}
    silent = Fleet("fml", alpha=1.0, beta=1.0, turns=1).brief("ada").steps
    assert [step.WhichOneof("kind") for step in silent].count("train") == 2


def test_options() -> None:
    for name, options, message in (
        ("apfl", {"alpha": 1.5}, "alpha = 1.5, expected a finite number of at least 0 and at most 1"),
        ("feddpa", {"variant": "x"}, "variant = 'x', expected one of t, f"),
        ("feddpa", {"weights": "x"}, "weights = 'x', expected one of fixed, example"),
        ("fedalt", {"mixer": "inputs"}, r"mixer = 'inputs' \(did you mean 'input'\?\)"),
        ("ties", {"density": 0.0}, "density = 0.0, expected above 0 and at most 1"),
        ("dare", {"drop": 1.0}, "drop = 1.0, expected at least 0 and below 1"),
    ):
        with pytest.raises(OptionError, match=message):
            STRATEGIES[name].Options(**options)


def test_controls_fit_a_head_train_on_alone_and_average_two_runs() -> None:
    fleet = Fleet("fedavg-head", steps=7)
    fleet.play()
    fit, *_ = fleet.strategy.deliver(fleet.strategy.clients["ada"]).steps
    assert (list(fit.train.part.modules), fit.train.steps) == (["head"], 7)
    saved = fleet.deliver()
    assert len({adapter.select(modules=["q_proj", "v_proj"]).digest for adapter in saved.values()}) == 1
    assert len({adapter.select(modules=["head"]).digest for adapter in saved.values()}) == 3
    headless = Fleet("fedavg-head", [layout_of(head=0)] * 3)
    assert len(headless.strategy.deliver(headless.strategy.clients["ada"]).steps) == 2

    fleet = Fleet("fedavg-tuned", federated_rounds=1)
    fleet.play()
    model = fleet.strategy.state().tensors["model"]
    assert set(fleet.brief("ada").adapters) == {"global"}
    fleet.play()
    brief = fleet.brief("ada")
    assert not brief.adapters
    assert [step.WhichOneof("kind") for step in brief.steps] == ["evaluate", "train"]
    fleet.play()
    assert torch.equal(fleet.strategy.state().tensors["model"], model)
    saved = fleet.deliver()
    assert saved["ada"].digest == fleet["ada"].slots["global"].digest
    assert len({adapter.digest for adapter in saved.values()}) == 3

    fleet = Fleet("local-twice")
    assert [list(train.slots) for train in trains(fleet)] == [["first"], ["second"]]
    fleet.play()
    both = fleet.strategy.deliver(fleet.strategy.clients["ada"]).steps[-1].evaluate.mixture
    assert coefficients(both) == {"first": 0.5, "second": 0.5}
