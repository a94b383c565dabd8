"""A language model's losses at its targets, a few at a time, so that logits never need much memory.

The body runs once, and its head is given nothing. Then the model's own forward pass runs again for each chunk of hidden
states, with a stand-in for the body that answers with the chunk: head, soft caps and scales are the model's own. A
token's loss depends on its own hidden state only, so the gradient with respect to that state is computed together with
the loss, and the backward pass only multiplies it: no logits are kept or computed twice. (Fused losses such as Liger's
do the same for heads that they know; Hsu et al. 2024, section 3.2.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from client_app.data.targets import at_targets, target_mask, token_losses
from client_app.model.forward.target_logits import TargetLogits

Forward = Callable[[], Tensor]
OutputOf = Callable[[Tensor], Any]
"""Makes a body's output from hidden states."""
_TRIED = 16
"""Number of targets on which the model's parts are compared with the whole model."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference of logits that rounding explains, as a share of the largest; 0.03 for shorter numbers."""


class AtTargets:
    """A model's output at the n targets of one batch: losses, and logits on request.

    Args:
        tokens: the targets ``[n]``.
        hidden: the head's inputs ``[n, d]``.
        tail: makes logits ``[m, V]`` of some of ``hidden``, ``[m, d]``.
        rows: the most rows of ``hidden`` at once.
    """

    def __init__(self, tokens: Tensor, hidden: Tensor, tail: Callable[[Tensor], Tensor], rows: int) -> None:
        self.tokens, self._hidden, self._tail, self._rows = tokens, hidden, tail, max(rows, 1)

    def losses(self) -> Tensor:
        """Cross-entropies ``[n]``, float32."""
        found: Tensor = _Losses.apply(self._hidden, self.tokens, self._tail, self._rows)  # type: ignore[no-untyped-call]
        return found

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[m, V]`` at some targets."""
        return self._tail(self._hidden[rows])


class AtTargetsWhole(AtTargets):
    """The same, from logits ``[n, V]`` that exist already."""

    def __init__(self, tokens: Tensor, logits: Tensor) -> None:
        super().__init__(tokens, logits, lambda some: some, len(logits))

    def losses(self) -> Tensor:
        """See :meth:`AtTargets.losses`."""
        return token_losses(self._hidden, self.tokens)


class TargetLosses:
    """Computes one model's losses at targets with few logits at a time.

    Args:
        logits: the model, and the way to its logits at targets.
        chunk_bytes: most bytes of float32 logits at once; 0: all at once.
    """

    def __init__(self, logits: TargetLogits, chunk_bytes: int = 0) -> None:
        self.at_once, self.chunk_bytes = logits, chunk_bytes
        self.body: tuple[nn.Module, OutputOf] | None = None
        self.vocabulary = 0
        self._tried = False
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why this model computes more logits than it should; empty if it does not."""
        return self.at_once.reason or self._reason

    def __call__(self, forward: Forward, labels: Tensor) -> AtTargets:
        """The model's answer at the targets of ``labels [b, L]``; ``forward`` is its forward pass on the batch."""
        tokens = labels[:, 1:][target_mask(labels)]
        if not self._tried and len(tokens):
            self._try(forward, labels)
        if self.body is None or not len(tokens):
            return AtTargetsWhole(tokens, self.at_once(forward, labels))
        assert self.at_once.head is not None
        seen = _Seen()
        with _watched(self.at_once.head, seen, labels, 0):
            forward()
        body, output_of = self.body

        def tail(hidden: Tensor) -> Tensor:
            with _standing_in(body, output_of(hidden[None])):
                return forward()[0]

        rows = self.chunk_bytes // (4 * self.vocabulary) if self.chunk_bytes else len(tokens)
        assert seen.hidden is not None
        return AtTargets(tokens, seen.hidden, tail, rows)

    @torch.no_grad()
    def _try(self, forward: Forward, labels: Tensor) -> None:
        """Find the body, and check that the head and what follows it give the same from its hidden states alone."""
        self._tried = True
        device = labels.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            head = self.at_once.head
            if head is None:
                return
            if any(parameter.requires_grad for parameter in head.parameters()):
                self._reason = "the head is trained"
                return
            seen = _Seen()
            with _watched(head, seen, labels, _TRIED, self.at_once.module):
                whole = forward()
            if seen.calls != 1 or seen.hidden is None or whole.shape[:2] != (1, min(len(seen.hidden), _TRIED)):
                self.at_once(forward, labels)  # finds out why
                self._reason = "its head does not see all hidden states once"
                return
            if seen.body is None or seen.output_of is None:
                self._reason = "no module of the model gives what its head gets"
                return
            found = []
            some = seen.hidden[:_TRIED]
            for part in torch.split(some, -(-len(some) // 2)):
                with _standing_in(seen.body, seen.output_of(part[None])):
                    found.append(forward())
            if any(logits.dim() != 3 for logits in found):
                self._reason = "it has no logits of parts of its hidden states"
                return
            difference = float((torch.cat(found, dim=1).float() - whole.float()).abs().max())
            if not difference <= _TOLERANCE.get(whole.dtype, 0.03) * max(1.0, float(whole.abs().max())):
                self._reason = f"logits of parts of its hidden states differ from the whole's by {difference:.1e}"
                return
            self.body, self.vocabulary = (seen.body, seen.output_of), whole.shape[-1]


class _Seen:
    """What was seen in one forward pass: the head's input at targets, and the body that gave it."""

    def __init__(self) -> None:
        self.calls = 0
        self.body: nn.Module | None = None
        self.output_of: OutputOf | None = None
        self.hidden: Tensor | None = None


@contextmanager
def _watched(
    head: nn.Module, seen: _Seen, labels: Tensor, shown: int, whole: nn.Module | None = None
) -> Iterator[None]:
    """Hooks that fill :class:`_Seen`, and give the head the first ``shown`` targets only.

    The body is looked for in ``whole``: it is the module that last gave the head's input.
    """
    given: list[tuple[nn.Module, Callable[[], Tensor | None], OutputOf]] = []

    def gave(module: nn.Module, _: Any, output: Any) -> None:
        tensor, output_of = _hidden_in(output)
        if tensor is not None and tensor.dim() == 3:
            given.append((module, weakref.ref(tensor), output_of))

    def pick(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen.calls += 1
        hidden, *others = arguments or (None,)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(labels):
            return None
        if hidden.shape[1] < labels.shape[1]:
            return None
        for module, reference, output_of in given:
            tensor = reference()
            if tensor is not None and tensor.data_ptr() == hidden.data_ptr() and tensor.shape == hidden.shape:
                seen.body, seen.output_of = module, output_of
        seen.hidden = at_targets(hidden, labels)
        return (seen.hidden[None, :shown], *others)

    inside = [] if whole is None else [module for module in whole.modules() if module not in (head, whole)]
    handles = [module.register_forward_hook(gave) for module in inside]
    handles.append(head.register_forward_pre_hook(pick))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_in(body: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block, ``body`` returns ``output`` for any input."""
    body.__dict__["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del body.__dict__["forward"]


def _hidden_in(output: Any) -> tuple[Tensor | None, OutputOf]:
    """A module's hidden states, if that is what it gave, and a function that makes such an output of others."""
    kind = type(output)
    if isinstance(output, ModelOutput):
        return getattr(output, "last_hidden_state", None), lambda hidden: kind(last_hidden_state=hidden)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        others = [None] * (len(output) - 1)
        return output[0], lambda hidden: (hidden, *others)
    return output if isinstance(output, Tensor) else None, lambda hidden: hidden


class _Losses(torch.autograd.Function):
    """Cross-entropies ``[n]`` of hidden states ``[n, d]``, a few at a time, together with their gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, tail: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        losses, gradients = [], []
        for some, wanted in zip(torch.split(hidden, rows), torch.split(tokens, rows), strict=True):
            if not ctx.needs_input_grad[0]:
                losses.append(token_losses(tail(some), wanted))
                continue
            with torch.enable_grad():
                part = some.detach().requires_grad_()
                found = token_losses(tail(part), wanted)
                gradients.append(torch.autograd.grad(found.sum(), part)[0])
                losses.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(gradients.dtype), None, None, None
