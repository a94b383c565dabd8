"""A language model's logits at its targets only.

With today's vocabularies the head is a large part of a step, and logits at all positions take gigabytes. But only
positions before a target have a loss. So a hook selects their hidden states just before the head, and the head and
everything after it (soft caps, scales) see only these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from client_app.data.targets import at_targets, target_mask


class TargetLogits:
    """Computes one model's logits at targets only.

    Args:
        module: a model of transformers. One that hides its head, or does not call it exactly once in each forward pass,
            computes logits everywhere; ``reason`` then says why.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        find: Callable[[], Any] = getattr(module, "get_output_embeddings", lambda: None)
        try:
            head = find()
        except (AttributeError, NotImplementedError):
            head = None
        self.head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self.reason = "" if self.head is not None else "the model names no output embeddings"

    def __call__(self, forward: Callable[[], Tensor], labels: Tensor) -> Tensor:
        """Logits ``[n, V]`` of the batch's targets, row by row.

        Args:
            forward: the model's forward pass on the batch, giving ``[b, L', V]``.
            labels: ``[b, L]``, on the model's device.
        """
        if self.head is None:
            return at_targets(forward(), labels)
        picked: list[bool] = []

        def pick(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden, *others = given or (None,)
            fits = isinstance(hidden, Tensor) and hidden.dim() == 3 and len(hidden) == len(labels)
            picked.append(fits and hidden.shape[1] >= labels.shape[1])
            return (at_targets(hidden, labels)[None], *others) if picked[-1] else None

        handle = self.head.register_forward_pre_hook(pick)
        try:
            logits = forward()
        finally:
            handle.remove()
        wanted = int(target_mask(labels).sum())
        if picked == [True] and logits.shape[:-1] == (1, wanted):
            return logits[0]
        self.head = None
        self.reason = f"one forward pass calls its head {len(picked)} times, expected once with all hidden states"
        return at_targets(forward(), labels)
