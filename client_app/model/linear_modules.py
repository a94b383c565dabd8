"""Linear modules of a model: what LoRA can adapt."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of inputs and outputs of a linear module, GPT-2's ``Conv1D`` included; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.weight.shape[0], module.weight.shape[1]) if isinstance(module, Conv1D) else None


def modules_ending_with(model: nn.Module, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Names of linear modules whose last part is one of ``suffixes``, in the model's order."""
    wanted = set(suffixes)
    return tuple(
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in wanted and isinstance(module, nn.Linear)
    )
