"""A of LoRA over a base in bfloat16: PEFT's numbers without its copies of the input."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from client_app.model.forward.narrow_input import NarrowInputLinear, keep_narrow

WIDTH, TOKENS = 24, 10


class QueryAndValue(nn.Module):
    """Two linear modules that read one input, as those of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).tanh() * self.v(x)


def adapted(dropout: float = 0.0, slots: tuple[str, ...] = ("a",)) -> nn.Module:
    """The base in bfloat16 with float32 adapters, as PEFT computes it."""
    torch.manual_seed(0)
    model = QueryAndValue().bfloat16()
    for slot in slots:
        inject_adapter_in_model(LoraConfig(r=3, target_modules=["q", "v"], lora_dropout=dropout), model, slot)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    return model


def layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def narrow(model: nn.Module, slots: tuple[str, ...] = ("a",)) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in layers(model):
        for slot in slots:
            keep_narrow(layer, slot)
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """The output, all gradients, and the bytes of float32 copies of the input that the backward pass keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.shape[-1] == WIDTH and tensor.numel() == x.numel():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), {"x": x.grad, **found}, sum(kept.values())


@pytest.mark.parametrize("shape", [(2, TOKENS, WIDTH), (TOKENS, WIDTH)])
def test_the_numbers_are_peft_s_and_the_copies_are_gone(shape: tuple[int, ...]) -> None:
    model = adapted()
    x = torch.randn(shape).bfloat16()
    before, after = gradients(model, x), gradients(narrow(model), x)
    assert torch.equal(before[0], after[0])
    assert before[1].keys() == after[1].keys()
    for name, found in before[1].items():
        torch.testing.assert_close(after[1][name], found, rtol=1e-6, atol=1e-6)
    assert before[2] == 2 * 4 * x.numel(), "one for q, one for v"
    assert after[2] == 0


def test_several_slots_share_the_input() -> None:
    model = adapted(slots=("a", "b"))
    for layer in layers(model):
        layer.set_adapter(["a", "b"])
    x = torch.randn(2, TOKENS, WIDTH).bfloat16()
    before, after = gradients(model, x), gradients(narrow(model, ("a", "b")), x)
    assert torch.equal(before[0], after[0])
    assert after[2] == 0


def test_a_frozen_slot_keeps_nothing_and_passes_the_gradient_on() -> None:
    model = narrow(adapted())
    model.requires_grad_(False)
    x = torch.randn(2, TOKENS, WIDTH).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layers(model)[0](x).float().sum().backward()
    assert all(tensor.shape != x.shape for tensor in kept)
    assert x.grad is not None


def test_with_dropout_the_input_is_scaled_in_float32() -> None:
    model = adapted(dropout=0.5)
    thrifty = narrow(model)
    x = torch.randn(2, TOKENS, WIDTH).bfloat16()
    found = []
    for one in (model, thrifty):
        torch.manual_seed(3)
        found.append(one(x))
    assert torch.equal(*found)


def test_autocast_chooses_the_dtype() -> None:
    linear = NarrowInputLinear(WIDTH, 3, bias=False)
    x = torch.randn(2, WIDTH).bfloat16()
    assert linear(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
