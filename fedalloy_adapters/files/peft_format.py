"""Adapters to PEFT: state dicts and directories.

PEFT names LoRA tensors ``base_model.model.<module>.lora_A.weight`` and stores a fully trained module ("modules to
save") as its whole parameter ``base_model.model.<module>.weight``; FedAlloy holds the difference from the base model's
own parameter, so conversions take the base model's heads: ``{"classifier.weight": tensor, ...}``. PEFT knows neither P
nor Q: P is multiplied into A, and Q becomes the bias that PEFT can give B (``lora_bias``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import fold
from fedalloy_adapters.files.atomic_files import private_folder, write_durably
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError

PREFIX = "base_model.model."
_LORA_NAMES = {Factor.A: "lora_A.weight", Factor.B: "lora_B.weight"}


def peft_key(entry: Entry) -> str:
    """The name of an entry in ``get_peft_model_state_dict``."""
    return f"{PREFIX}{entry.module}.{_LORA_NAMES.get(entry.factor, entry.factor)}"


def to_peft_state(adapter: Adapter, base_heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's state dict for an adapter; head differences are added to ``base_heads``.

    With Q anywhere, every LoRA module gets a ``lora_B.bias`` ``[d_out]``, because PEFT has one switch for all of them:
    ``B Q``, or zero.

    Raises:
        LayoutError: the base has no parameter for a head, or one of another shape.
    """
    state = {}
    adapter = fold(adapter)
    has_bias = _has_bias(adapter.layout)
    for entry, tensor in adapter.items():
        if entry.factor is Factor.Q:
            continue
        if entry.factor is Factor.B and has_bias:
            key = f"{PREFIX}{entry.module}.lora_B.bias"
            has_q = f"{entry.module}.{Factor.Q}" in adapter.layout.by_name
            bias = tensor @ adapter[entry.module, Factor.Q] if has_q else torch.zeros(entry.shape[0])
            state[key] = bias.detach().to("cpu", torch.float32)
        value = tensor.detach().to("cpu", copy=True)
        if not entry.factor.is_lora:
            value += _base_parameter(entry, base_heads)
        state[peft_key(entry)] = value
    return state


def peft_config(layout: Layout, base_model: str, drawn: Iterable[str] = ()) -> dict[str, Any]:
    """``adapter_config.json`` for a layout; ranks and scalings that differ become PEFT's patterns.

    ``drawn`` has parameters that are saved as they are. PEFT lists their modules as modules to save, like heads.
    """
    heads = list(dict.fromkeys(entry.module for entry in layout.entries if not entry.factor.is_lora))
    heads += [module for module in dict.fromkeys(name.rsplit(".", 1)[0] for name in drawn) if module not in heads]
    ranks = layout.ranks
    alphas = {module: layout.scalings[module] * rank for module, rank in ranks.items()}
    common_rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    common_alpha = Counter(alphas.values()).most_common(1)[0][0] if ranks else 1
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": common_rank,
        "lora_alpha": common_alpha,
        "rank_pattern": {module_pattern(module): rank for module, rank in ranks.items() if rank != common_rank},
        "alpha_pattern": {module_pattern(module): alpha for module, alpha in alphas.items() if alpha != common_alpha},
        # PEFT refuses an empty list; this is its own name for "none" (a layout of heads only).
        "target_modules": list(layout.lora_modules) or "dummy-target-modules",
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": _has_bias(layout),
        "fan_in_fan_out": False,
    }


def write_peft_directory(
    folder: Path,
    adapter: Adapter,
    base_model: str,
    base_heads: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a new folder that ``PeftModel.from_pretrained`` loads; files are flushed to the disk.

    ``drawn`` has parameters by name that the base model's checkpoint lacks: loading the base model would draw other
    values.

    Raises:
        FileExistsError: the folder exists.
    """
    private_folder(folder.parent)
    folder.mkdir(mode=0o700)
    state = {key: value.contiguous() for key, value in to_peft_state(adapter, base_heads).items()}
    state |= {f"{PREFIX}{name}": value.detach().to("cpu").contiguous() for name, value in (drawn or {}).items()}
    write_durably(folder / "adapter_model.safetensors", save(state, metadata={"format": "pt"}))
    config = json.dumps(peft_config(adapter.layout, base_model, drawn or ()), indent=2, sort_keys=True)
    write_durably(folder / "adapter_config.json", (config + "\n").encode())


def _has_bias(layout: Layout) -> bool:
    return any(entry.factor is Factor.Q for entry in layout.entries)


def _base_parameter(entry: Entry, base_heads: Mapping[str, Tensor]) -> Tensor:
    if entry.name not in base_heads:
        raise LayoutError(f"the base model has no parameter {entry.name!r}")
    parameter = base_heads[entry.name].detach().to("cpu", torch.float32)
    if tuple(parameter.shape) != entry.shape:
        raise LayoutError(f"base parameter {entry.name!r} has shape {tuple(parameter.shape)}, expected {entry.shape}")
    return parameter


def module_pattern(module: str) -> str:
    """A regular expression for this module alone: PEFT also matches a bare name at the end of a longer name."""
    return f"^{re.escape(module)}$"
