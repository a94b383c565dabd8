"""A ViT with random weights, small enough to build in milliseconds: what PEFT and our own model are compared on."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from client_app.data.dataset import Base

CLASSES = 3
FINGERPRINT = "0123456789abcdef" * 4


def build(seed: int = 0) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=CLASSES,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    with torch.no_grad():
        # transformers starts it at zero, which would hide errors
        model.get_parameter("classifier.bias").copy_(torch.tensor([0.1, -0.2, 0.3]))
    model.train(False)
    return model


def linear_names(model: nn.Module, *suffixes: str) -> tuple[str, ...]:
    """Full names of the linear modules whose last part is one of ``suffixes``."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in suffixes
    )


def base_of(suffixes: tuple[str, ...] = ("q_proj", "v_proj"), heads: tuple[str, ...] = ("classifier",)) -> Base:
    model = build()
    return Base("tiny-vit", model, FINGERPRINT, linear_names(model, *suffixes), heads)


def heads_of(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own head, by FedAlloy's entry names."""
    head = model.get_submodule("classifier")
    return {f"classifier.{name}": parameter.detach().clone() for name, parameter in head.named_parameters()}


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(pixel_values=images() if batch is None else batch).logits
    return output


def peft_model(targets: tuple[str, ...] | list[str], **options: Any) -> PeftModel:
    """PEFT's own model over a fresh base, every trainable number random (a fresh LoRA B is zero)."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]} | options
    model = get_peft_model(build(), LoraConfig(target_modules=list(targets), **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_same_logits(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))
