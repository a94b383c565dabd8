"""What an owner's policy refuses, what run-config may add to it, and that nothing private leaves by a detour."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client_app.guard.policy import Policy, PolicyError
from client_app.settings import SettingsError, read_settings
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training

MIX = steps.mixture("global", "local", coefficients=(0.5, 0.5))
TRAINING = Training(local_steps=10, batch_size=4)


def plan_of(*found: plan_pb2.Step, round_: int = 1) -> plan_pb2.Plan:
    return plan_pb2.Plan(version=1, run_name="run", client_id="ada", round=round_, steps=found)


def policy_of(node: dict[str, Any], run: dict[str, Any]) -> Policy:
    place = {"partition-id": 0, "num-partitions": 2}
    return read_settings(Context(1, 7, place | node, RecordDict(), run)).policy


def test_run_config_makes_a_bound_stricter_and_never_looser() -> None:
    default = Policy()
    for key, stricter, looser in (
        ("max-steps", 10, 10**9),
        ("max-download-mb", 1.0, 1e9),
        ("min-examples", 50, 0),
        ("max-seconds", 5.0, 0.0),
        ("min-sketch-noise", 0.5, 0.0),
    ):
        name, key = key.replace("-", "_"), f"client.{key}"
        assert getattr(policy_of({}, {key: stricter}), name) == stricter
        assert getattr(policy_of({}, {key: looser}), name) == getattr(default, name)
        assert getattr(policy_of({key: looser}, {key: stricter}), name) == looser  # the owner's word
    assert not policy_of({}, {"client.lend-adapter": True}).lend_adapter  # the owner's word alone
    assert policy_of({"client.lend-adapter": True}, {"client.lend-adapter": False}).lend_adapter
    assert not Policy(lend_adapter=True).stricter(Policy()).lend_adapter
    assert policy_of({"client.private-slots": "local"}, {"client.private-slots": ""}).private == {"local"}
    with pytest.raises(SettingsError, match=r"client\.max-steps = -1"):
        policy_of({"client.max-steps": -1}, {})


def test_the_owner_bounds_which_base_model_a_run_names() -> None:
    asked = {"base-model": "org/other"}
    policy_of({}, asked)  # any, by default
    policy_of({"client.base-models": "Qwen/*, org/*"}, asked)
    policy_of({"client.base-models": "Qwen/*", "base-model": "org/mine"}, asked)  # its own, whatever a run says
    policy_of({"client.base-models": "Qwen/*"}, {})
    for said in (asked, asked | {"client.base-models": "*"}):
        with pytest.raises(SettingsError, match=r"'org/other' is run-config's, .* client\.base-models is Qwen/\*$"):
            policy_of({"client.base-models": "Qwen/*"}, said)


def test_an_adapter_is_for_newcomers_only_where_its_owner_lends_it() -> None:
    mine = plan_of(steps.send(TRAINING, "lent", relative_to_received=False))
    lent = plan_of(steps.send(TRAINING, "lent", relative_to_received=False, for_newcomers=True))
    Policy().require_plan(mine, {})
    Policy(lend_adapter=True).require_plan(lent, {})
    with pytest.raises(PolicyError, match=r"'ada' refuses step 0 \(send\): .*client\.lend-adapter"):
        Policy().require_plan(lent, {})


BOUNDS: dict[str, tuple[Policy, plan_pb2.Plan, dict[str, bytes], str]] = {
    "steps": (Policy(max_steps=9), plan_of(steps.train(TRAINING, MIX, ["local"])), {}, "max-steps is 9, .* has 10"),
    "steps of a distillation": (
        Policy(max_steps=9),
        plan_of(steps.distill(steps.train(TRAINING, MIX, ["local"]), MIX, {})),
        {},
        "max-steps",
    ),
    "steps that look twice": (
        Policy(max_steps=19),
        plan_of(steps.train(TRAINING, MIX, ["local"], sharpness_radius=0.1)),
        {},
        "max-steps is 19, .* has 20",
    ),
    "evaluations": (
        Policy(max_evaluations=2),
        plan_of(steps.evaluate(TRAINING, MIX), steps.select("local", ["a", "b"], "best", split="train")),
        {},
        "max-evaluations is 2, .* has 3",
    ),
    "evaluations of a search": (
        Policy(max_evaluations=29),
        plan_of(steps.search("found", ["a"], split="train", samples=9, evaluations=30, penalty=0.0, bound=1.0)),
        {},
        "max-evaluations is 29, .* has 30",
    ),
    "evaluations that look at features": (
        Policy(max_evaluations=3),
        plan_of(
            steps.density(["a", "b"], "s", [], dimensions=2, seed=1), steps.likeness("l", "a", samples=2, most=0.5)
        ),
        {},
        "max-evaluations is 3, .* has 4",
    ),
    "slots": (Policy(max_slots=2), plan_of(steps.evaluate(TRAINING, MIX)), {"x": b""}, "max-slots is 2, .* has 3"),
    "bytes": (Policy(max_download_mb=0.001), plan_of(), {"x": bytes(1001)}, "max-download-mb is 0.001"),
    "rounds": (Policy(), plan_of(round_=10**6), {}, "max-rounds is 100000, .* has 1e\\+06"),
    "noise": (
        Policy(min_sketch_noise=0.1),
        plan_of(steps.sketch(TRAINING, "s", batches=1, rows=1, noise=0.05)),
        {},
        "noise 0.05, its client.min-sketch-noise is 0.1",
    ),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_plan_beyond_a_bound_is_refused_before_anything_is_done(bound: str) -> None:
    policy, plan, blobs, words = BOUNDS[bound]
    with pytest.raises(PolicyError, match=f"client 'ada' refuses .*{words}"):
        policy.require_plan(plan, blobs)
    Policy(max_rounds=0).require_plan(plan, blobs)


FEW: dict[str, plan_pb2.Step] = {
    "train": steps.train(Training(local_steps=1, batch_size=1), MIX, ["local"]),
    "train on a fold": steps.train(TRAINING, MIX, ["local"], fold=(0, 20)),
    "distill": steps.distill(steps.train(Training(local_steps=1, batch_size=1), MIX, ["local"]), MIX, {}),
    "fisher": steps.fisher("global", "local", split="train", samples=1, damping=0.1),
    "gram": steps.gram(TRAINING, "gram", MIX, samples=1),
    "select": steps.select("local", ["global"], "best", split="train", samples=1),
    "search": steps.search("x", ["global"], split="train", samples=1, evaluations=9, penalty=0.0, bound=1.0),
    "sketch": steps.sketch(Training(batch_size=1), "s", batches=1, rows=1),
}


@pytest.mark.parametrize("step", FEW)
def test_a_step_about_one_example_is_refused_by_default(step: str) -> None:
    with pytest.raises(PolicyError, match=r"1 examples, its client\.min-examples is 2"):
        Policy().require_examples(plan_of(FEW[step]), lambda split: 20)
    Policy(min_examples=1).require_examples(plan_of(FEW[step]), lambda split: 20)
    whole = plan_of(steps.train(TRAINING, MIX, ["local"]), steps.gram(TRAINING, "gram", MIX))
    with pytest.raises(PolicyError, match=r"20 examples, its client\.min-examples is 21"):
        Policy(min_examples=21).require_examples(whole, lambda split: 20)
    for divides in (steps.attribute(["a"], "s"), steps.density(["a"], "s", [], dimensions=2, seed=1)):
        with pytest.raises(PolicyError, match=r"20 examples, its client\.min-examples is 21"):
            Policy(min_examples=21).require_examples(plan_of(divides), lambda split: 20)


def send(slot: str) -> plan_pb2.Step:
    return steps.send(TRAINING, slot, relative_to_received=False)


TRAINED = steps.train(TRAINING, steps.mixture("x"), ["x"], proximal=("local", 1e9))
DETOURS: dict[str, list[plan_pb2.Step]] = {
    "itself": [send("local")],
    "a copy": [steps.copy("x", "local"), send("x")],
    "a merge": [steps.merge("x", MIX), send("x")],
    "a merge by precisions": [
        steps.merge("x", steps.precision_mixture({"global": "local"}), space="factor"),
        send("x"),
    ],
    "a copy of a merge": [steps.merge("x", MIX), steps.copy("y", "x"), send("y")],
    "groups of it": [steps.replace("x", "local", {"a": 1.0}, records=("r", "s")), send("x")],
    "the best sum": [
        steps.search("x", ["global", "local"], split="train", samples=9, evaluations=9, penalty=0.0, bound=1.0),
        send("x"),
    ],
    "the better of two": [steps.select("x", ["global", "local"], "best", split="train"), send("x")],
    "a pull to it": [TRAINED, send("x")],
    "what it taught": [
        steps.distill(steps.train(TRAINING, steps.mixture("x"), ["x"]), steps.mixture("local"), {}),
        send("x"),
    ],
    "how much each of its teachers counts": [
        steps.distill(steps.train(TRAINING, steps.mixture("x"), ["x"]), steps.ensemble(["global"], "local"), {}),
        send("x"),
    ],
    "what is known of it": [
        steps.fisher("global", "local", split="train", samples=9, damping=0.1, keep=("a", "b")),
        send("b"),
    ],
}


@pytest.mark.parametrize("detour", DETOURS)
def test_what_is_private_leaves_by_no_detour(detour: str) -> None:
    policy, asked = Policy(private_slots="local, mine"), DETOURS[detour]
    with pytest.raises(PolicyError, match="is private"):
        policy.require_private(plan_of(*asked), frozenset())
    Policy().require_private(plan_of(*asked), frozenset())
    hidden = policy.require_private(plan_of(*asked[:-1]), frozenset())  # and not in the next round
    with pytest.raises(PolicyError, match="is private"):
        policy.require_private(plan_of(asked[-1]), hidden)


def test_a_slot_that_holds_something_else_now_may_leave() -> None:
    policy = Policy(private_slots="local")
    again = plan_of(steps.merge("x", MIX), steps.initialise("x", 1, keep_existing=False), send("x"))
    assert policy.require_private(again, frozenset()) == {"local"}
    kept = plan_of(steps.merge("x", MIX), steps.initialise("x", 1), send("x"))
    with pytest.raises(PolicyError, match="is private"):
        policy.require_private(kept, frozenset())


def test_what_a_sketch_keeps_without_noise_never_leaves() -> None:
    taken = plan_of(steps.sketch(TRAINING, "sketch", batches=1, rows=1, noise=1.0))
    hidden = Policy().require_private(taken, frozenset())
    for later in (plan_of(send("sketch")), plan_of(steps.copy("x", "sketch"), send("x"))):
        with pytest.raises(PolicyError, match="is private"):
            Policy().require_private(later, hidden)
