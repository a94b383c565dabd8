"""Potara's options: what they decide, and which cannot be combined."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.algorithms.potara import LOCAL, Potara
from strategies.algorithms.potara_options import PotaraOptions
from strategies.framework.options import OptionError
from strategies.framework.steps import Training
from tests.strategies.algorithms.test_potara import potara, weighed


@pytest.mark.parametrize(
    ("rounds", "local_steps", "federated", "own"),
    [(600, 1, 400, 300), (10, 10, 7, 51), (6, 10, 4, 30), (3, 10, 2, 15), (2, 10, 1, 10)],
)
def test_by_default_the_branches_have_the_papers_budgets(
    rounds: int, local_steps: int, federated: int, own: int
) -> None:
    """For 600 steps the paper's branches have 400 and 300; here as nearly as whole rounds and steps allow."""
    strategy = Potara(training=Training(local_steps=local_steps), rounds=rounds)
    assert strategy.federated_rounds == federated
    assert strategy.steps == -(-own // (rounds - federated))
    endless = Potara(training=Training(local_steps=local_steps))  # Flower does not tell how many rounds there are
    assert (endless.federated_rounds, endless.steps) == (1, local_steps)


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"weight": "fisher"}, r"potara.weight = 'fisher'.*expected one of client-fisher"),
        ({"weight": "plugin", "granularity": "parameter"}, "potara.granularity = 'parameter' with weight 'plugin'"),
        ({"dampings": "0.1,x"}, "potara.dampings = '0.1,x', expected numbers with commas"),
        ({"dampings": "0.1,-1"}, "potara.dampings = -1"),
        ({"dampings": "1,1"}, "all different"),
        ({"dampings": "0.1", "weight": "plugin"}, "potara.dampings = '0.1' with weight 'plugin'"),
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
    finding = r"num-server-rounds = 4 with potara.federated-rounds = 4, expected at least 5 rounds"
    with pytest.raises(OptionError, match=finding):
        Potara(PotaraOptions(federated_rounds=4), rounds=4)
    with pytest.raises(OptionError, match=r"num-server-rounds = 1 .*expected at least 2 rounds"):
        Potara(rounds=1)
    with pytest.raises(OptionError, match=r"potara.local-steps, in all rounds, = 4294967294"):
        Potara(PotaraOptions(local_steps=2**31 - 1), rounds=2)


def test_it_says_which_examples_it_learns_from() -> None:
    assert potara().learns_from == ("train", "validation")
    assert potara(calibration="train").learns_from == ("train",)
    assert potara(calibration="train", search_points=5).learns_from == ("train",)  # for the record
    assert potara(calibration="train", weight="line-search").learns_from == ("train", "validation")
    assert potara(weight="half").learns_from == ("train",)


def test_options_reach_the_steps() -> None:
    strategy = potara(calibration="validation", trace_space="delta", damping=0.1, fisher_samples=7)
    plan = strategy.brief(4, strategy.clients["ada"]).steps
    (found,) = [step.fisher for step in plan if step.HasField("fisher")]
    assert (found.first, found.second) == ("global", LOCAL)
    assert (found.split, found.in_delta_space, found.relative_damping, found.samples) == ("validation", True, 0.1, 7)
    truncated = potara(space="delta-truncated")
    weighed(truncated, "ada", 0.25)
    merges = [step.merge for step in truncated.deliver(truncated.clients["ada"]).steps if step.HasField("merge")]
    assert {merge.truncate_rank for merge in merges} == {4}
    weighed(strategy, "ada", 0.3)
    shown = [step.evaluate.split for step in strategy.deliver(strategy.clients["ada"]).steps if step.evaluate.label]
    assert shown == ["test"] * 5
