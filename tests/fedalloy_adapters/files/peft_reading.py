"""Reads PEFT's state dicts and directories back, strictly: the other half of a round trip.

The product itself reads such a directory only as a start for training (``client_app/model/start_adapter.py``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.peft_format import peft_key
from fedalloy_adapters.layout import Layout


def from_peft_state(state: Mapping[str, Tensor], layout: Layout, base_heads: Mapping[str, Tensor]) -> Adapter:
    """The adapter in PEFT's state dict; every tensor of the layout must be there, and no other."""
    wanted = {peft_key(entry): entry for entry in layout.entries}
    assert set(state) == set(wanted)
    adapter = Adapter.zeros(layout)
    for key, entry in wanted.items():
        assert tuple(state[key].shape) == entry.shape
        value = state[key].detach().to("cpu", torch.float32)
        if not entry.factor.is_lora:
            value = value - base_heads[entry.name].detach()
        adapter[entry.module, entry.factor].copy_(value)
    return adapter


def read_peft_directory(folder: Path, layout: Layout, base_heads: Mapping[str, Tensor]) -> Adapter:
    """The adapter in a PEFT directory; its config must give every module the layout's scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for module, rank in layout.ranks.items():
        # PEFT keeps alpha, and (scaling * rank) / rank is not always scaling to the last bit.
        assert _scaling_in(config, module, rank) == pytest.approx(layout.scalings[module], rel=1e-12)
    return from_peft_state(load_file(folder / "adapter_model.safetensors"), layout, base_heads)


def _scaling_in(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scaling that PEFT would give a module."""
    alpha = config["lora_alpha"]
    for pattern, value in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
