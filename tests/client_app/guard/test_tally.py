"""What runs have used of a client's bounds in all; and that no two measurements together reveal an example."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_app.guard.policy import Policy, PolicyError, shown_of
from client_app.guard.tally import Tally, TallyError
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training

MIX = steps.mixture("global")
TRAINING = Training(local_steps=10, batch_size=4)


def plan_of(*found: plan_pb2.Step, run: str = "run") -> plan_pb2.Plan:
    return plan_pb2.Plan(version=1, run_name=run, client_id="ada", round=1, steps=found)


def parts_of(split: str) -> list[int]:
    return [50]


def measure(examples: int) -> plan_pb2.Plan:
    step = steps.evaluate(TRAINING, MIX)
    step.evaluate.examples = examples
    return plan_of(step)


def test_bounds_are_over_all_plans_of_a_run_and_over_all_runs(tmp_path: Path) -> None:
    plan, other = (plan_of(steps.train(TRAINING, MIX, ["global"]), run=run) for run in ("a", "b"))
    policy = Policy(max_run_steps=20, max_total_steps=30)
    Tally(tmp_path, "ada").begin(plan, policy, parts_of)
    Tally(tmp_path, "ada").begin(plan, policy, parts_of)
    with pytest.raises(PolicyError, match=r"30 for this run with this plan, its client\.max-run-steps is 20"):
        Tally(tmp_path, "ada").begin(plan, policy, parts_of)
    Tally(tmp_path, "ada").begin(other, policy, parts_of)
    with pytest.raises(PolicyError, match=r"40 for all runs together .*max-total-steps is 30"):
        Tally(tmp_path, "ada").begin(other, policy, parts_of)
    assert Tally(tmp_path, "ada").of("a")["steps"] == 20  # what was refused is not counted
    assert Tally(tmp_path, "ben").of("a") == {}


def test_bytes_and_statistics_are_bounded(tmp_path: Path) -> None:
    tally, plan = Tally(tmp_path, "ada"), plan_of(steps.gram(TRAINING, "gram", MIX))
    tally.leave(plan, {"x": bytes(600)}, Policy(max_run_upload_mb=0.001))
    with pytest.raises(PolicyError, match=r"0\.0012 for this run .*max-run-upload-mb is 0\.001"):
        tally.leave(plan, {"x": bytes(600)}, Policy(max_run_upload_mb=0.001))
    tally.begin(plan, Policy(max_run_statistics=1), parts_of)
    with pytest.raises(PolicyError, match="max-run-statistics is 1"):
        tally.begin(plan, Policy(max_run_statistics=1), parts_of)


def test_uploads_of_all_runs_and_evaluations_of_one_are_bounded(tmp_path: Path) -> None:
    tally, policy = Tally(tmp_path, "ada"), Policy(max_total_upload_mb=0.001, max_run_evaluations=1)
    tally.leave(plan_of(run="a"), {"x": bytes(600)}, policy)
    with pytest.raises(PolicyError, match=r"0\.0012 for all runs together .*max-total-upload-mb is 0\.001"):
        tally.leave(plan_of(run="b"), {"x": bytes(600)}, policy)
    tally.begin(measure(0), policy, parts_of)
    with pytest.raises(PolicyError, match="max-run-evaluations is 1"):
        tally.begin(measure(0), policy, parts_of)


def test_a_damaged_tally_lets_nothing_through(tmp_path: Path) -> None:
    tally = Tally(tmp_path, "ada")
    tally.begin(measure(0), Policy(), parts_of)
    tally.path.write_bytes(tally.path.read_bytes().replace(b'"evaluations": 1', b'"evaluations": 0'))
    with pytest.raises(TallyError, match="is damaged"):
        tally.begin(measure(0), Policy(), parts_of)


def test_measurements_that_differ_by_one_example_are_refused_in_one_plan_and_over_plans(tmp_path: Path) -> None:
    policy, words = Policy(min_examples=5), r"11 examples of 'test', and this run has measured 10"
    tally = Tally(tmp_path, "ada")
    tally.begin(measure(10), policy, parts_of)
    tally.begin(measure(10), policy, parts_of)
    tally.begin(measure(15), policy, parts_of)
    with pytest.raises(PolicyError, match=words):
        tally.begin(measure(11), policy, parts_of)
    both = plan_of(*measure(10).steps, *measure(11).steps, run="other")
    with pytest.raises(PolicyError, match=words):
        tally.begin(both, policy, parts_of)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 12), st.integers(1, 60))
def test_no_two_accepted_measurements_tell_of_few(asked: list[int], least: int, size: int) -> None:
    """The sets are nested: their differences are those of the counts."""
    policy, seen, counts = Policy(min_examples=least), {}, {0}
    for examples in asked:
        try:
            policy.require_examples(measure(examples), lambda split: size)
            seen = policy.require_apart(measure(examples), lambda split: [size], seen)
        except PolicyError:
            continue
        counts.add(shown_of(size, examples, least))
    ordered = sorted(counts)
    assert all(more - less >= least for less, more in itertools.pairwise(ordered))
