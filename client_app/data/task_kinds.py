"""Kinds of tasks: what a model's logits are scored against. One place for every loss.

Classification: ``logits [b, C]`` and ``labels [b]``. Text generation: ``labels [b, L]``, where position t predicts the
label at t + 1 and -100 is not a target, and logits everywhere, ``[b, L, V]``, or of the n targets alone, ``[n, V]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import Dataset

IGNORED = -100
"""The label of a token that is not a target: prompt and padding. PyTorch's default ``ignore_index``."""

SCORES = ("f1", "auroc", "ece")
"""What classifications are scored by beside their loss and accuracy (:mod:`client_app.plan.class_metrics`)."""


class TaskError(ValueError):
    """There is no such kind of task, or data and model are of different kinds."""


@dataclass(frozen=True)
class Kind:
    """What tasks of one kind have in common.

    ``auto_model`` is the class of transformers that loads a base model for it; ``columns`` are what one example has;
    ``evaluation_batch`` bounds how many are evaluated at once (logits over a vocabulary are large).
    """

    name: str
    auto_model: str
    columns: tuple[str, ...]
    generative: bool
    evaluation_batch: int

    @property
    def has_text(self) -> bool:
        """Whether examples have text, for which a tokenizer is needed."""
        return self.columns != ("image", "label")

    @property
    def has_image(self) -> bool:
        """Whether examples have an image, for which an image processor is needed."""
        return "image" in self.columns


KINDS = {
    kind.name: kind
    for kind in (
        Kind("text-classification", "AutoModelForSequenceClassification", ("text", "label"), False, 64),
        Kind("image-classification", "AutoModelForImageClassification", ("image", "label"), False, 256),
        Kind("causal-lm", "AutoModelForCausalLM", ("prompt", "completion"), True, 16),
        Kind("image-text-classification", "AutoModelForVisualQuestionAnswering", ("image", "text", "label"), False, 32),
        Kind("image-text-to-text", "AutoModelForImageTextToText", ("image", "prompt", "completion"), True, 8),
    )
}


def kind_of(name: str) -> Kind:
    """The kind with this name.

    Raises:
        TaskError: there is none; names those that there are.
    """
    if name not in KINDS:
        raise TaskError(f"task {name!r} is unknown, expected one of {', '.join(KINDS)}")
    return KINDS[name]


def mean_loss(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """What training minimises: the mean over a batch's examples, or over its target tokens where texts are generated.

    Args:
        kind: a key of :data:`KINDS`.
        logits: ``[b, C]``; ``[n, V]`` or ``[b, L, V]``.
        labels: ``[b]`` or ``[b, L]``, on the same device.
    """
    if not kind_of(kind).generative:
        return functional.cross_entropy(logits, labels)
    return mean_of(_at_labels(logits, labels), labels)


def example_losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """One loss for each example ``[b]``: its cross-entropy, or the mean over its target tokens.

    Args:
        kind: a key of :data:`KINDS`.
        logits: ``[b, C]``; ``[n, V]`` or ``[b, L, V]``.
        labels: ``[b]`` or ``[b, L]``, on the same device.
    """
    if not kind_of(kind).generative:
        return functional.cross_entropy(logits, labels, reduction="none")
    return means_of(_at_labels(logits, labels), labels)


def targets_in(batch: Dataset) -> int:
    """How many labels :func:`mean_loss` averages over: the weight of a part of a batch in the whole."""
    if not kind_of(batch.kind).generative:
        return len(batch)
    return int(target_mask(batch.labels).sum())


def target_mask(labels: Tensor) -> Tensor:
    """Positions ``[b, L - 1]`` of ``labels [b, L]`` that predict a target: position t predicts the label at t + 1."""
    return labels[:, 1:] != IGNORED


def at_targets(everywhere: Tensor, labels: Tensor) -> Tensor:
    """Of something at all positions ``[b, L', d]`` what lies before a target, ``[n, d]``, row by row.

    L' may exceed the L of ``labels [b, L]``: a prefix may have been put before the tokens (images), never after them.
    """
    return everywhere[:, -labels.shape[1] :][:, :-1][target_mask(labels)]


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropies ``[n]`` of logits ``[n, V]`` at the targets ``tokens [n]``, float32."""
    return functional.cross_entropy(logits.float(), tokens, reduction="none")


def by_example(losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of target losses and number of targets for each example, ``[b]`` both.

    Args:
        losses: ``[n]``, row by row.
        labels: ``[b, L]``, on the same device.
    """
    mask = target_mask(labels)
    rows = mask.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, rows, losses), mask.sum(dim=1).to(losses.dtype)


def mean_of(losses: Tensor, labels: Tensor) -> Tensor:
    """What :func:`mean_loss` is, from the target losses ``[n]``."""
    total, count = by_example(losses, labels)
    return total.sum() / count.sum().clamp_min(1)


def means_of(losses: Tensor, labels: Tensor) -> Tensor:
    """What :func:`example_losses` is, from the target losses ``[n]``."""
    total, count = by_example(losses, labels)
    return total / count.clamp_min(1)


def _at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Target losses ``[n]`` from logits at targets, or everywhere."""
    if logits.dim() == 3:
        logits = at_targets(logits, labels)
    return token_losses(logits, labels[:, 1:][target_mask(labels)])
