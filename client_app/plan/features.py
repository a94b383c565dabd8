"""What the base model sees in an example: a few numbers, and Gaussians over them.

The features z of an example are ``directions @ x`` ``[d]``, where x ``[d_in]`` is the input of the last module with a
LoRA factor while the base model reads the example without any adapter, averaged over tokens that are not padding. Of
a text with targets, only what is before the first target is read: features may not know the answer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import MASK, Dataset, mean_of_tokens
from client_app.data.targets import target_mask
from client_app.kinds import kind_of
from client_app.model.personal import PersonalModel
from client_app.plan.progress import tick
from client_app.plan.training import autocast, logits_of
from fedalloy_adapters.layout import Factor

_AT_ONCE = 32
"""How many examples of a split are read together."""


class FeaturesError(ValueError):
    """The examples of this task, or this base model, have no features."""

    @property
    def told(self) -> str:
        """The whole message: it is about the kind of task."""
        return str(self)


def directions(model: PersonalModel, dimensions: int, seed: int) -> Tensor:
    """The same ``[dimensions, d_in]`` for all clients of a run: normal numbers with variance 1 / d_in.

    Raises:
        FeaturesError: no module has a LoRA factor.
    """
    if not model.layout.lora_modules:
        raise FeaturesError("no module has a LoRA factor: there are no features of its inputs")
    widths = {entry.module: entry.shape[1] for entry in model.layout.entries if entry.factor is Factor.A}
    width = widths[model.layout.lora_modules[-1]]
    draw = torch.Generator().manual_seed(seed % 2**63)
    return torch.randn(dimensions, width, generator=draw, dtype=torch.float64) / math.sqrt(width)


@torch.no_grad()
def features(model: PersonalModel, batch: Dataset, along: Tensor | None = None, slot: str = "") -> Tensor:
    """z ``[b, d]`` float64 of a batch along the directions ``[d, d_in]`` (None: x itself, ``[b, d_in]``).

    The base model reads the batch, with a loaded ``slot`` if one is named; that is what is active afterwards.

    Raises:
        FeaturesError: an example is several texts, or its mask is not about the module's tokens.
    """
    rows: list[Tensor] = []
    mask: list[Tensor | None] = []

    def begin(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = keywords.get(MASK)
        mask.append(given if isinstance(given, Tensor) and given.ndim == 2 else None)

    def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
        del rows[len(mask) - 1 :]  # a module that a pass uses several times: its last use counts
        rows.append(_mean(inputs[0].detach().double(), mask[-1]))

    last = model.module.get_submodule(model.layout.lora_modules[-1])
    handles = [
        model.module.register_forward_pre_hook(begin, with_kwargs=True),
        last.register_forward_pre_hook(look),
    ]
    model.module.eval()
    model.activate({slot: 1.0} if slot else {})
    try:
        with autocast(model.device):
            logits_of(model, _unanswered(batch))
    finally:
        for handle in handles:
            handle.remove()
    found = torch.cat(rows)
    if len(found) != len(batch):
        raise FeaturesError(f"an example of a {batch.kind!r} is several texts, expected one to have features")
    return found.cpu() if along is None else found.cpu() @ along.T


def features_of(model: PersonalModel, data: Dataset, along: Tensor | None = None, slot: str = "") -> Tensor:
    """:func:`features` of a whole split, a few examples at a time."""
    found = []
    for some in torch.split(torch.arange(len(data)), _AT_ONCE):
        tick("features", int(some[0]), len(data))
        found.append(features(model, data.batch(some), along, slot))
    return torch.cat(found)


def log_densities(z: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """``log N(z_n; mean_m, diag(variance_m))``: ``[n, M]`` of ``z [n, d]``, ``means`` and ``variances [M, d]``.

    >>> log_densities(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)).exp() * 2 * math.pi
    tensor([[1.]])
    """
    squares = (z[:, None] - means).square() / variances
    return -0.5 * (squares + variances.log() + math.log(2 * math.pi)).sum(dim=-1)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Means ``[b, d_in]`` of ``x [b, ..., d_in]`` over the tokens that ``mask [b, T]`` does not leave out."""
    tokens = x.reshape(len(x), -1, x.shape[-1])
    if mask is None or x.ndim == 2:
        return tokens.mean(dim=1)
    if mask.shape != tokens.shape[:2]:
        shapes = f"{tuple(tokens.shape[:2])} (examples, tokens), and the attention mask is {tuple(mask.shape)}"
        raise FeaturesError(f"the module's input is {shapes}")
    return mean_of_tokens(tokens, mask)


def _unanswered(batch: Dataset) -> Dataset:
    """The batch, whose texts end before the first target where the model writes them."""
    if not kind_of(batch.kind).generative or MASK not in batch.inputs:
        return batch
    before = torch.ones_like(batch.inputs[MASK])
    before[:, 1:] = target_mask(batch.labels).cumsum(dim=1) == 0
    inputs = {**batch.inputs, MASK: batch.inputs[MASK] * before}
    return Dataset(inputs, batch.labels, batch.kind, batch.task, rows=batch.rows)
