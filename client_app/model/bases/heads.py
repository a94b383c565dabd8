"""Heads: their rows follow the names of labels; what a checkpoint lacks is drawn from the names of parameters."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from client_app.model.co_lora import ModuleGate
from client_app.settings import canonical_label
from fedalloy_adapters.layout import Entry, Factor

_HEAD_STD = 0.02
_UNNAMED = re.compile(r"LABEL_(\d+)")
"""transformers' names for the classes of a head without names."""


def labels_of(config: Any) -> list[str]:
    """Names of a checkpoint's classes, in the order of its head's rows."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)] if config.id2label else []


def name_labels(config: Any, labels: Sequence[str]) -> None:
    """Give a configuration's head these classes."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}


def rows_by_name(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """For each of the new labels, the row that an existing head has for it; None if it has none.

    Names are compared like labels (NFC), then without case if that is unambiguous. The rows of a head without names
    belong to numbers.
    """
    exact = {canonical_label(_UNNAMED.sub(r"\1", name)): row for row, name in enumerate(old)}
    folded: dict[str, list[int]] = {}
    for name, row in exact.items():
        folded.setdefault(name.casefold(), []).append(row)
    found: list[int | None] = []
    for name in new:
        key = canonical_label(_UNNAMED.sub(r"\1", name))
        rows = folded.get(key.casefold(), [])
        found.append(exact.get(key, rows[0] if len(rows) == 1 else None))
    taken = [row for row in found if row is not None]
    return found if len(set(taken)) == len(taken) else [exact.get(canonical_label(name)) for name in new]


def label_parameters(auto_model: Any, config: Any) -> list[str]:
    """Names of the parameters whose first axis is the number of labels."""
    shapes: list[dict[str, torch.Size]] = []
    for more in (0, 1):
        probed = copy.deepcopy(config)
        name_labels(probed, [str(number) for number in range(max(len(labels_of(config)), 2) + more)])
        with torch.device("meta"):
            shapes.append({name: p.shape for name, p in auto_model.from_config(probed).named_parameters()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1][name]]


def rename_rows(model: Any, names: Iterable[str], rows: Sequence[int | None], labels: Sequence[str]) -> None:
    """Give a head its rows in the order of the new labels; rows that it lacks are drawn.

    Args:
        model: with the checkpoint's own head.
        names: those of the parameters to change, from :func:`label_parameters`.
        rows: the row of each new label, from :func:`rows_by_name`.
        labels: the new labels, in order.
    """
    for name in names:
        parent, kind = name.rsplit(".", 1)
        module, old = model.get_submodule(parent), model.get_parameter(name)
        new = drawn(name, torch.Size([len(labels), *old.shape[1:]])).to(old)
        for number, row in enumerate(rows):
            if row is not None:
                new[number] = old.detach()[row]
        setattr(module, kind, nn.Parameter(new))
        if isinstance(module, nn.Linear):
            module.out_features = len(labels)
    name_labels(model.config, labels)
    model.num_labels = len(labels)


def draw_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Draw parameters that the checkpoint lacks, from their names alone, so that all clients agree."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    for name in sorted(set(names)):
        if name in parameters:
            with torch.no_grad():
                parameters[name].copy_(drawn(name, parameters[name].shape))


def drawn(name: str, shape: torch.Size) -> Tensor:
    """Numbers of a parameter with this name, float32: normal for a matrix, zero for a bias, one for a scale."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    seed = int.from_bytes(hashlib.sha256(f"{name}:{tuple(shape)}".encode()).digest()[:7], "little")
    return _HEAD_STD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def head_modules(model: Any) -> tuple[str, ...]:
    """Linear modules outside the body. If the model does not name its body (CLIP), that is its largest part."""
    body = model.base_model
    if body is model:
        body = max(model.children(), key=lambda child: sum(p.numel() for p in child.parameters()), default=model)
    inside = {id(module) for module in body.modules()}
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside
    )


class Differences(nn.Module):
    """Parametrization of a head's parameter: base + sum of coefficient x difference over the active slots."""

    def __init__(self) -> None:
        super().__init__()
        self.by_slot = nn.ParameterDict()
        self.coefficients: dict[str, float | ModuleGate] = {}

    def forward(self, base: Tensor) -> Tensor:
        """The parameter as the active slots make it."""
        for slot, coefficient in self.coefficients.items():
            weight = coefficient(base) if isinstance(coefficient, ModuleGate) else coefficient
            base = base + (weight * self.by_slot[slot]).to(base.dtype)
        return base


def head_entries(modules: Mapping[str, nn.Module], heads: Iterable[str]) -> list[Entry]:
    """A layout's entries of these modules' weights and biases."""
    return [
        Entry(name, Factor(kind), tuple(parameter.shape))
        for name in heads
        for kind, parameter in modules[name].named_parameters(recurse=False)
    ]
