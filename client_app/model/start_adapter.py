"""A client's slot can start from another adapter, trained with plain PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.files.peft_format import PREFIX, module_pattern
from fedalloy_adapters.layout import Entry, Factor, Layout

_UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` (their beginnings) that also change the base model; without that change the adapter
is useless."""


class StartAdapterError(ValueError):
    """The folder has no LoRA adapter that fits this client's model; the message names the first thing that does not."""


def read_start_adapter(path: str, layout: Layout, base_heads: Mapping[str, Tensor]) -> Adapter:
    """The LoRA adapter in a PEFT directory, in a client's own layout.

    Ranks may differ: a higher one is cut to the best approximation of its delta (truncated SVD), a lower one is filled
    with zeros. Modules of the layout that the folder lacks start at zero; modules that the layout lacks are an error.

    Args:
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: the client's layout.
        base_heads: the base model's own heads by entry name, from which PEFT's whole modules are differences.

    Raises:
        StartAdapterError: see the class.
    """
    folder = Path(path).expanduser()
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise StartAdapterError(f"start-adapter: {file} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise StartAdapterError(f"start-adapter: {folder} is a {kind!r} adapter, expected 'LORA'")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise StartAdapterError(f"start-adapter: {folder} was trained with {name}, which is not supported")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_OTHER_BASE):
        raise StartAdapterError(
            f"start-adapter: {folder} was trained with init_lora_weights = {init!r}, which changes the base model; "
            "save it converted to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    given = _as_adapter(state, config, layout, base_heads, folder)
    start = truncate(stack([given], [1.0]), layout)
    for module in layout.lora_modules:  # with the same rank, keep its own factors, not a rotation of them
        if given.layout.ranks[module] == layout.ranks[module]:
            start[module, Factor.A].copy_(given[module, Factor.A])
            ratio = given.layout.scalings[module] / layout.scalings[module]
            start[module, Factor.B].copy_(given[module, Factor.B] * ratio)
    return start


def _as_adapter(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layout: Layout,
    base_heads: Mapping[str, Tensor],
    folder: Path,
) -> Adapter:
    """The folder's adapter at its own ranks, with zeros for what the folder lacks."""
    found = {_entry_name(key): tensor.float() for key, tensor in state.items()}
    for name, tensor in found.items():
        if name not in layout.by_name:
            own = base_heads.get(name)
            if own is not None and own.shape == tensor.shape and torch.allclose(own.cpu().float(), tensor, atol=1e-6):
                continue  # what the checkpoint lacks, brought along by the run that saved it
            raise StartAdapterError(
                f"start-adapter: {folder} has {name!r}, which this client does not adapt (it adapts "
                f"{', '.join(layout.modules[:3])}, ...); is it for another base model, or other target-modules?"
            )
        wanted = layout.by_name[name]
        free = {Factor.A: 0, Factor.B: 1}.get(wanted.factor)
        sizes = [(a, b) for axis, (a, b) in enumerate(zip(tensor.shape, wanted.shape, strict=False)) if axis != free]
        if tensor.dim() != len(wanted.shape) or any(a != b for a, b in sizes):
            raise StartAdapterError(
                f"start-adapter: {folder} has {name!r} of shape {tuple(tensor.shape)}, expected {wanted.shape}"
            )
    entries, scalings = [], {}
    for entry in layout.entries:
        if entry.factor.is_lora:
            a = found.get(f"{entry.module}.{Factor.A}")
            rank = layout.ranks[entry.module] if a is None else a.shape[0]
            scalings[entry.module] = _scaling(config, entry.module, rank)
            shape = (rank, entry.shape[1]) if entry.factor is Factor.A else (entry.shape[0], rank)
            entries.append(Entry(entry.module, entry.factor, shape))
        else:
            entries.append(entry)
    given = Adapter.zeros(Layout(tuple(entries), scalings, layout.base_fingerprint))
    for entry, tensor in given.items():
        value = found.get(entry.name)
        if value is None:
            continue
        if value.shape != tensor.shape:
            raise StartAdapterError(
                f"start-adapter: {folder}: the ranks of A and B of {entry.module!r} differ "
                f"({tuple(value.shape)}, expected {tuple(tensor.shape)})"
            )
        tensor.copy_(value if entry.factor.is_lora else value - base_heads[entry.name].cpu().float())
    if not given.is_finite:
        raise StartAdapterError(f"start-adapter: {folder} has numbers that are not finite")
    return given


def _entry_name(key: str) -> str:
    """PEFT's name of a tensor to the layout's."""
    name = key.removeprefix(PREFIX)
    for factor, ending in ((Factor.A, ".lora_A.weight"), (Factor.B, ".lora_B.weight")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)}.{factor}"
    return name


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module) or pattern == module_pattern(module):
                alpha = value
                break
        scaling = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (re.error, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise StartAdapterError(f"start-adapter: adapter_config.json has no alpha for {module!r}: {error}") from None
    if not math.isfinite(scaling):
        raise StartAdapterError(f"start-adapter: the scaling of {module!r} is {scaling}, expected a finite number")
    return scaling
