"""Targets of generated texts: ``labels [b, L]``, where position t predicts the label at t + 1; -100 is not a target."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token that is not a target: prompt and padding. PyTorch's default ``ignore_index``."""


def target_mask(labels: Tensor) -> Tensor:
    """Positions ``[b, L - 1]`` of ``labels [b, L]`` that predict a target: position t predicts the label at t + 1."""
    return labels[:, 1:] != IGNORED


def at_targets(everywhere: Tensor, labels: Tensor) -> Tensor:
    """Of the values at all positions ``[b, L', d]``, select those before a target: ``[n, d]``, row by row.

    L' may exceed the L of ``labels [b, L]``: a prefix may have been put before the tokens (images), never after them.
    """
    return everywhere[:, -labels.shape[1] :][:, :-1][target_mask(labels)]


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropies ``[n]`` of logits ``[n, V]`` at the targets ``tokens [n]``, float32."""
    return functional.cross_entropy(logits.float(), tokens, reduction="none")


def by_example(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of target losses and number of targets for each example, both ``[b]``.

    Args:
        losses: ``[n]``, row by row.
        labels: ``[b, L]``, on the same device.
    """
    mask = target_mask(labels)
    rows = mask.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, rows, losses), mask.sum(dim=1).to(losses.dtype)


def mean_of(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch's target tokens, from their losses ``[n]``."""
    total, count = by_example(losses, labels)
    return total.sum() / count.sum().clamp_min(1)


def means_of(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean over each example's target tokens ``[b]``, from their losses ``[n]``."""
    total, count = by_example(losses, labels)
    return total / count.clamp_min(1)
