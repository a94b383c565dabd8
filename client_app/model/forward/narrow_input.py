"""Factor A of a LoRA term, in float32, over a base model that computes in less.

PEFT casts a module's input to float32 for each of its adapters, and the backward pass of A keeps that copy: with LoRA
on the query and the value, two of them for one input, 8 bytes a number beside the input's own 2. Here A keeps the input
as it is, which all adapters of a layer's modules share, and casts it again in the backward pass. The numbers are the
same.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


class _Projection(torch.autograd.Function):
    """``x A^T`` in A's dtype, for an input of another one."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, weight = inputs
        ctx.narrow = x.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = None if weight is None else (above @ weight).to(ctx.narrow)
        if x is None:
            return of_x, None
        wide = x.reshape(-1, x.shape[-1]).to(above.dtype)
        return of_x, above.reshape(-1, above.shape[-1]).T @ wide


class NarrowInputLinear(nn.Linear):
    """A linear module without bias whose input may be of another dtype than its weight; the output has the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        """``[.., d_in]`` to ``[.., r]``."""
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):  # autocast chooses the dtype
            return functional.linear(x, self.weight)
        projected: Tensor = _Projection.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return projected


def keep_narrow(layer: LoraLayer, slot: str) -> None:
    """Let a slot's A at one of PEFT's layers read the layer's input without a wider copy of it.

    With dropout PEFT's cast stays, so that what is dropped is scaled in float32.
    """
    own = cast(nn.Linear, layer.lora_A[slot])
    linear = NarrowInputLinear(own.in_features, own.out_features, bias=False, device="meta")
    linear.weight = own.weight
    linear.train(own.training)
    layer.lora_A[slot] = linear
    layer.cast_input_dtype_enabled = not isinstance(layer.lora_dropout[slot], nn.Identity)
