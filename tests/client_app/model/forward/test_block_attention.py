"""Attention in blocks gives what the plain formula gives, and is used where it should be, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from client_app.model.forward import block_attention as blocks


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    repeated = [tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value)]
    return functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize("case", ["causal", "padded", "window", "prefix"])
@pytest.mark.parametrize("shared", [1, 3])
def test_equals_the_formula_with_gradients(case: str, shared: int) -> None:
    torch.manual_seed(0)
    length = 2 * blocks.BLOCK + 7
    query = torch.randn(2, 3, length, 8, requires_grad=True)
    key, value = (torch.randn(2, 3 // shared, length, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if case == "padded":
        mask[0] &= torch.arange(length) < length - 20
    if case == "window":
        mask &= ~torch.ones(length, length, dtype=torch.bool).tril(-9)
    if case == "prefix":  # an image's tokens see each other
        mask[1, :, :90, :90] = True
    outer = torch.randn(2, 3, length, 8)
    found = blocks.block_attention(query, key, value, None if case == "causal" else mask, 0.3)
    expected = naive(query, key, value, mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, (query, key, value), outer),
        torch.autograd.grad(expected, (query, key, value), outer),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def llama(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gradient(model: Any, *, padded: bool) -> Tensor:
    ids = torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 60:] = 0 if padded else 1
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    found: Tensor = model.model.layers[0].self_attn.k_proj.weight.grad.float()
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_trains_the_same(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradient(llama(torch.float32), padded=padded)
    model = llama(torch.bfloat16)
    plain = gradient(model, padded=padded)
    calls = []
    whole = blocks.block_attention
    monkeypatch.setattr(blocks, "block_attention", lambda *given: calls.append(1) or whole(*given))
    assert blocks.use_blocks(model) == 2
    found = gradient(model, padded=padded)
    assert len(calls) == 2
    assert float((found - exact).norm()) <= 1.2 * float((plain - exact).norm()) < 0.1 * float(exact.norm())
    with torch.no_grad():  # evaluation is PyTorch's
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    gradient(llama(torch.bfloat16), padded=padded)  # and so is a model that nobody has changed
    assert len(calls) == 2
