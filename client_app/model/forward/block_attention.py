"""Causal attention for training in bfloat16 on CPUs: the same numbers as PyTorch's, to rounding, in less time.

PyTorch's fused attention for CPUs has a fast forward and a slow backward pass. This one is made of matrix products over
blocks of queries and the keys that they may see, so that nothing above the diagonal is computed; keys are not repeated
for the heads that share them. The backward pass keeps the output and one number for each query, and computes a block's
probabilities again from these (Dao et al. 2022, algorithm 4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 64
"""Queries at once: a block's scores stay in the processor's cache."""
_HIDDEN = -1e30
"""The score of what must not be seen. With minus infinity, a row that sees nothing would become NaN."""
_MARK = "fedalloy_blocks"


def use_blocks(model: nn.Module) -> int:
    """Compute a model's causal attention in blocks where that pays; returns how many such modules it has.

    It pays for a training step in bfloat16 on a CPU; otherwise, and in modules that give attention anything unusual
    (dropout, sinks, a mask of scores), PyTorch's own is used.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    found = [module for module in model.modules() if getattr(module, "is_causal", False) is True]
    for module in found:
        setattr(module, _MARK, True)
    return len(found)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: heads ``[b, h, L, d]``, ``[b, g, L, d]`` to ``[b, L, h, d]``."""
    if not (getattr(module, _MARK, False) and _fits(query, key, value, attention_mask, dropout, is_causal)):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return block_attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


def _fits(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, is_causal: bool | None
) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype is torch.bfloat16
        and torch.is_grad_enabled()
        and query.requires_grad
        and key.shape == value.shape
        and query.shape[2] == key.shape[2] > 1
        and query.shape[-1] == key.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and not dropout
        and is_causal is not False
        and (mask is None or (mask.dtype is torch.bool and mask.shape[-2:] == (query.shape[2],) * 2))
    )


def block_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k') v over what a query may see, with gradients.

    Args:
        query: ``[b, h, L, d]``.
        key: ``[b, g, L, d]``; h is a multiple of g, and neighbouring heads share keys.
        value: as ``key``.
        mask: whether a query sees a key, ``[b or 1, 1, L, L]``; None: it sees itself and those before it.
        scale: the factor on scores.

    Returns:
        ``[b, h, L, d]``.
    """
    length = query.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    found: Tensor = _Blocks.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return found


def _spans(mask: Tensor) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys from the first to the last that a query of the block sees."""
    seen = mask.flatten(0, 1).any(dim=0)
    length = len(seen)
    blocks = [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    found = []
    for block in blocks:
        places = seen[block].any(dim=0).nonzero().flatten()
        keys = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 1)
        found.append((block, keys))
    return found


class _Blocks(torch.autograd.Function):
    """See :func:`block_attention`. ``bmm`` gets ``[b g, ...]``: heads that share keys become more queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        output = torch.empty_like(query)
        norms = query.new_empty(query.shape[:3], dtype=torch.float32)[..., None]
        spans = _spans(mask)
        for block, keys in spans:
            scores = _scores(query, key, mask, scale, block, keys)
            norms[:, :, block] = scores.logsumexp(dim=-1, keepdim=True)
            shares = scores.sub_(norms[:, :, block]).exp_().to(value.dtype)
            found = torch.bmm(_grouped(shares, key), value[:, :, keys].flatten(0, 1))
            output[:, :, block] = found.view(output[:, :, block].shape)
        ctx.save_for_backward(query, key, value, mask, output, norms)
        ctx.scale, ctx.spans = scale, spans
        return output

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, norms = ctx.saved_tensors
        (above,) = outer
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(key.shape, device=key.device).flatten(0, 1) for _ in range(2))
        meant = (above * output).sum(dim=-1, keepdim=True, dtype=torch.float32)
        for block, keys in ctx.spans:
            shares = _scores(query, key, mask, ctx.scale, block, keys).sub_(norms[:, :, block]).exp_()
            asked = _grouped(above[:, :, block], key)
            of_value[:, keys] += torch.bmm(_grouped(shares.to(value.dtype), key).transpose(1, 2), asked)
            of_shares = torch.bmm(asked, value[:, :, keys].flatten(0, 1).transpose(1, 2)).float().view(shares.shape)
            of_scores = of_shares.sub_(meant[:, :, block]).mul_(shares).mul_(ctx.scale).to(query.dtype)
            found = torch.bmm(_grouped(of_scores, key), key[:, :, keys].flatten(0, 1))
            of_query[:, :, block] = found.view(query[:, :, block].shape)
            of_key[:, keys] += torch.bmm(_grouped(of_scores, key).transpose(1, 2), _grouped(query[:, :, block], key))
        return of_query, of_key.view(key.shape).to(key.dtype), of_value.view(key.shape).to(value.dtype), None, None


def _grouped(of_heads: Tensor, key: Tensor) -> Tensor:
    """``[b, h, l, m]`` to ``[b g, (h / g) l, m]``: one row of queries for each head of ``key [b, g, L, d]``."""
    return of_heads.reshape(key.shape[0] * key.shape[1], -1, of_heads.shape[-1])


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float, block: slice, keys: slice) -> Tensor:
    """A block's scores ``[b, h, l, keys]``, float32."""
    of_block = query[:, :, block]
    scores = torch.bmm(_grouped(of_block, key), key[:, :, keys].flatten(0, 1).transpose(1, 2)).float()
    scores = scores.view(*of_block.shape[:3], -1).mul_(scale)
    return scores.masked_fill_(~mask[:, :, block, keys], _HIDDEN)
