"""A plan's draws: seeds made from names and numbers, and the batches that a seed draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from proto.fedalloy.v1 import plan_pb2


def seed_of(*parts: object) -> int:
    """A 63-bit seed that differs wherever any part differs."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_of_step(plan: plan_pb2.Plan, index: int, step: plan_pb2.TrainStep, *, replaced: bool = False) -> int:
    """The seed of a train step's batches and dropout.

    Args:
        plan: the plan that the step belongs to.
        index: its number.
        step: may ask for the draws of another step, or name a seed.
        replaced: whether a replace step before it has copied something.
    """
    draw = step.draw_after_replace if replaced and step.HasField("draw_after_replace") else step.draw
    if draw.WhichOneof("kind") == "seed":
        return draw.seed & (2**63 - 1)
    number = draw.as_step if draw.WhichOneof("kind") == "as_step" else index
    return seed_of(plan.seed, plan.client_id, plan.round, number)


_WINDOW = 8
"""Batches whose examples are sorted by length together."""


def by_length(drawn: Iterable[Tensor], lengths: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches of similar lengths: each eight batches keep their examples, which are divided anew, in random order.

    Args:
        drawn: indices ``[b]`` of each batch.
        lengths: those of all examples, ``[n]``.
        seed: decides the order of the eight.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = iter(drawn)
    while window := list(islice(waiting, _WINDOW)):
        examples = torch.cat(window)
        examples = examples[torch.argsort(lengths[examples], stable=True)]
        parts = torch.split(examples, [len(batch) for batch in window])
        for place in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[place]


def batches(examples: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices ``[b]`` of ``steps`` batches: pass after pass over the examples, each in a new random order.

    The last batch of a pass may be smaller; with fewer examples than ``batch_size`` every batch has all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    position, order = examples, torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if position >= examples:
            position, order = 0, torch.randperm(examples, generator=generator)
        yield order[position : position + batch_size]
        position += batch_size
