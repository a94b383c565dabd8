"""Over sixty kinds of hostile reports against every strategy: refused by name, as if the client had not answered.

The short form has all of them against the main strategies, and against each of the others two for every liar, other
ones each time.
"""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from proto.fedalloy.v1 import plan_pb2
from server_app.run.run_directory import RunDirectory
from strategies import STRATEGIES
from tests.faults.killing import LONG, MAIN
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses
from tests.faults.reports import KINDS, Answer

HONEST, LIARS = ("ada", "ben"), ("cyd", "dan", "eve", "flo", "gus")
BOUND = 96 * 2**20
"""Bytes: no report here has more than 4 MiB, whatever it claims."""


def silent(plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
    return [Message(Error(2, "no"), reply_to=message)]


class Liar:
    """One kind of lie a round, in order; honest in the delivery."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds
        self.before: Message | None = None

    def __call__(self, plan: plan_pb2.Plan, message: Message, honest: Message) -> list[Message]:
        if plan.round > len(self.kinds):
            return [honest]
        answer = Answer.of(message, honest, self.before)
        self.before = Answer.of(message, honest, None).reply()
        return [KINDS[self.kinds[plan.round - 1]](answer)]


def lies_for(strategy: str) -> dict[int, list[str]]:
    """Kinds by liar; each lies anew in each round."""
    kinds = list(KINDS)
    if not LONG and strategy not in MAIN:
        first = 2 * len(LIARS) * list(STRATEGIES).index(strategy)
        kinds = [kinds[(first + number) % len(kinds)] for number in range(2 * len(LIARS))]
    return {number: kinds[number - 3 :: len(LIARS)] for number in range(3, 3 + len(LIARS))}


def state_of(directory: RunDirectory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    found = directory.newest_checkpoint()
    assert found is not None
    return found.state.tensors, found.state.values


def test_every_kind_is_told_to_the_main_strategies() -> None:
    assert len(KINDS) >= 40
    for strategy in MAIN:
        assert sorted(kind for kinds in lies_for(strategy).values() for kind in kinds) == sorted(KINDS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_lie_counts_and_nobody_else_notices(strategy: str, tmp_path: Path) -> None:
    """The run ends as one in which the liars said that they could not, to the bit."""
    kinds = lies_for(strategy)
    rounds = len(kinds[3])
    config: dict[str, Any] = {"strategy": strategy, "num_server_rounds": rounds, "strikes": 0}
    config["on_divergence"] = "last"  # or whoever became worse is given two deliveries
    honest, lied = nodes(*HONEST, *LIARS), nodes(*HONEST, *LIARS)
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    directory = run_nodes(
        tmp_path, NodeGrid(lied, {number: Liar(lies) for number, lies in kinds.items()}), run_name="lied", **config
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    expected = run_nodes(tmp_path, NodeGrid(honest, dict.fromkeys(kinds, silent)), run_name="silent", **config)
    found = statuses(directory)
    assert len(found) == rounds
    for number, name in enumerate(LIARS, start=3):
        for kind, round_ in zip(kinds[number], found, strict=False):
            assert round_[name] in ("rejected", "failed"), kind
    assert all((round_["ada"], round_["ben"]) == ("ok", "ok") for round_ in found)
    tensors, values = state_of(directory)
    expected_tensors, expected_values = state_of(expected)
    assert values == expected_values
    assert set(tensors) == set(expected_tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected_tensors.items())
    for number in (1, 2):  # what the others were sent, hold and were given
        assert len(lied[number].plans) == rounds + 1
        assert [p.steps for p in lied[number].plans] == [p.steps for p in honest[number].plans]
        assert {s: a.digest for s, a in lied[number].slots.items()} == {
            s: a.digest for s, a in honest[number].slots.items()
        }
    assert not (tmp_path / "etc").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"lied", "silent"}
    assert peak < BOUND
    assert grown < 4 * BOUND
