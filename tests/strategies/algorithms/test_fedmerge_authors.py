"""FedMerge with the authors' settings, as in docs/paper-settings.md, against their round computed a second way."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, Layout
from proto.fedalloy.v1 import plan_pb2
from server_app.run.options import read_run_options
from server_app.run.run_directory import dotted
from strategies import strategy_from_run_config
from strategies.algorithms.fedmerge import FedMerge, FedMergeOptions
from strategies.framework.exchange import StrategyError
from tests.strategies.conftest import client_of, drift, play
from tests.strategies.toys import COUNTS, LAYOUT, NAMES, NOT_A, draw, fedmerge

PAGE = Path(__file__).parents[3] / "docs" / "paper-settings.md"
HEAD = (Factor.WEIGHT, Factor.BIAS)


def settings() -> dict[str, dict[str, Any]]:
    """The run-config of every block of the page, by strategy."""
    texts = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    blocks = [dict(dotted(tomllib.loads(text))) for text in texts]
    return {block["strategy"]: block for block in blocks}


@pytest.mark.parametrize("name", ["fedmerge", "fedmosaic", "tap"])
def test_the_pages_blocks_are_run_config(name: str) -> None:
    config = settings()[name]
    read_run_options(config)
    assert strategy_from_run_config(config).name == name


def authors_logits(theta: Tensor, logits: Tensor, moved: Tensor, shares: Tensor, rate: float, seen: Tensor) -> Tensor:
    """Their loop: a small fixed step, again and again, until the logits have moved by more than ``rate``."""
    weights = torch.softmax(logits, dim=1)
    away = theta[None] - (weights @ theta)[:, None]  # [K, d, P]
    gradient = weights * (away * moved[:, None] * seen).sum(dim=2)
    gradient = gradient / gradient.abs().sum()
    now = logits.clone()
    for _ in range(10_001):
        now -= 0.01 * shares[:, None] * gradient
        if (now - logits).abs().max() > rate:
            break
    return now


def test_a_round_with_the_authors_settings_is_theirs() -> None:
    found = strategy_from_run_config(settings()["fedmerge"])
    assert isinstance(found, FedMerge)
    for name, count in zip(NAMES, COUNTS, strict=True):
        found.enrol(client_of(name, LAYOUT, count))
    part, shares = LAYOUT.select(NOT_A), torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    seen = torch.cat([torch.full((e.size,), float(e.factor in HEAD), dtype=torch.float64) for e in part.entries])
    assert 0 < seen.sum() < len(seen)
    for round_ in range(1, 5):
        theta, logits = found.theta.double(), found.logits.clone()
        received = torch.softmax(logits, dim=1) @ theta
        moved = torch.stack([received[i] - _trained(name, round_, received[i], part) for i, name in enumerate(NAMES)])
        expected = authors_logits(theta, logits, moved, shares, found.options.lr_w, seen)
        play(found, NAMES, round_)
        step, theirs = found.logits - logits, expected - logits
        assert float(step.abs().max()) == pytest.approx(0.01)
        # Their loop stops one small step late; the direction is the same.
        torch.testing.assert_close(step / step.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=1e-3)
        torch.testing.assert_close(step, theirs, rtol=0, atol=0.0015)
        carried = shares[:, None] * torch.softmax(found.logits, dim=1)  # of the new logits
        after = theta - (carried / carried.sum(dim=0)).T @ moved
        torch.testing.assert_close(found.theta.double(), after, rtol=0, atol=1e-5)


def _trained(name: str, round_: int, received: Tensor, part: Layout) -> Tensor:
    return drift(name, round_, Adapter(part, received.float())).vector.double()


def test_the_clients_take_plain_steps_with_the_authors_pull_and_train_a_too() -> None:
    strategy = strategy_from_run_config(settings()["fedmerge"])
    strategy.enrol(client_of("ada", LAYOUT))
    (train,) = [s.train for s in strategy.brief(1, strategy.clients["ada"]).steps if s.HasField("train")]
    assert (train.optimizer, train.momentum, train.weight_decay, train.max_grad_norm) == (
        plan_pb2.OPTIMIZER_SGD, 0, 0, 0,
    )  # fmt: skip
    assert (train.learning_rate, train.proximal.mu) == pytest.approx((0.01, 0.02))
    assert not train.part.factors


def test_w_layers_may_name_the_head_whatever_its_name_is() -> None:
    named, by_word = fedmerge(models=2, jitter=0.5, w_layers="head.*"), fedmerge(models=2, jitter=0.5, w_layers="head")
    everything = fedmerge(models=2, jitter=0.5, w_layers="head,*.B")
    for strategy in (named, by_word, everything):
        strategy.logits = draw(4, 2, seed=7)
        play(strategy, NAMES, 1)
    assert torch.equal(by_word.logits, named.logits)
    assert not torch.equal(by_word.logits, everything.logits)


def test_w_layers_that_name_a_head_that_is_not_shared_are_refused() -> None:
    without = LAYOUT.select([Factor.A, Factor.B])
    with pytest.raises(StrategyError, match=r"'head' is the head that clients share, but they share none.*'labels'"):
        FedMerge(FedMergeOptions(w_layers="head")).enrol(client_of("ada", without))
