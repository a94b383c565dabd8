"""Small models with slots, and what they should compute, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.model.personal import PersonalModel
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient
from fedalloy_adapters.layout import Entry, Factor, Layout
from tests.fedalloy_adapters.samples import dense, random_adapter
from tests.fedalloy_adapters.tiny_vit import (
    CLASSES,
    base_of,
    build,
    images,
    logits_of,
)


def model_of(rank: int = 4, alpha: float = 8.0, dropout: float = 0.0) -> PersonalModel:
    return PersonalModel(base_of(), rank, alpha, dropout)


def resized(layout: Layout, ranks: list[int], scalings: list[float]) -> Layout:
    """The layout with ranks and scalings of its own for every LoRA module, cyclically."""
    own = {module: ranks[i % len(ranks)] for i, module in enumerate(layout.lora_modules)}
    entries = []
    for entry in layout.entries:
        shape = entry.shape
        if entry.factor is Factor.A:
            shape = (own[entry.module], shape[1])
        elif entry.factor is Factor.B:
            shape = (shape[0], own[entry.module])
        entries.append(Entry(entry.module, entry.factor, shape))
    by_module = {module: scalings[i % len(scalings)] for i, module in enumerate(layout.lora_modules)}
    return Layout(tuple(entries), by_module, layout.base_fingerprint)


def dense_logits(adapters: list[Adapter], coefficients: list[Coefficient]) -> Tensor:
    """The base with coefficient x scaling x B A added to its weights: no PEFT, no parametrization."""
    model = build()
    with torch.no_grad():
        for adapter, coefficient in zip(adapters, coefficients, strict=True):
            for name, delta in dense(adapter).items():
                module, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
                factor = coefficient[module] if isinstance(coefficient, Mapping) else coefficient
                parameter = model.get_submodule(module).get_parameter(kind)
                parameter.add_((factor * delta).float())
    return logits_of(model)


LAYOUT = model_of().layout
SLOTS = {
    "global": random_adapter(LAYOUT, 1, scale=0.2),
    "local": random_adapter(resized(LAYOUT, [1, 6, 2, 3], [0.5, 2.0, 12.5 / 3]), 2, scale=0.2),
    "third": random_adapter(resized(LAYOUT, [8], [1.0]), 3, scale=0.2),
}


def with_slots(**options: float) -> PersonalModel:
    model = model_of(**options)  # type: ignore[arg-type]
    for slot, adapter in SLOTS.items():
        model.load(slot, adapter)
    return model


def train_a_little(model: PersonalModel, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=0.05)
    model.module.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model.logits({"pixel_values": images()}), torch.arange(6) % CLASSES)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.module.eval()
