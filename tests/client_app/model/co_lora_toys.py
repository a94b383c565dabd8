"""Small models for the tests of Co-LoRA."""

from __future__ import annotations

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
)

from client_app.model.personal import PersonalModel
from fedalloy_adapters.adapter import Adapter
from tests.fedalloy_adapters.samples import random_adapter


def slots_of(model: PersonalModel) -> dict[str, Adapter]:
    """Two adapters over one basis, as the protocol has them."""
    start = model.initial(4)
    part = model.layout.select(without_basis=True)
    return {
        name: start.with_part(random_adapter(part, seed, scale=0.3)) for seed, name in enumerate(("global", "local"))
    }


def llama(width: int = 16, depth: int = 3, family: type = LlamaForSequenceClassification) -> nn.Module:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * width,
        pad_token_id=0,
        initializer_range=0.4,
    )
    model: nn.Module = family(config)
    return model
