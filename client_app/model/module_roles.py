"""The role of each module in a transformer, from its name; for Co-LoRA's correspondences and the sketch's gradient.

Families name the same linear layer differently: ``self_attn.q_proj``, ``attention.self.query``, ``attention.q_proj``
are all a query projection. Layers are numbered by the first number in a module's path. In a vision-language (LLaVA,
Qwen-VL) or audio model, they are those of its language model. The towers and projectors before it have their own
layers, which other clients may lack, and FedMosaic's authors leave them out, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_ROLES = (
    ("qkv", r"(qkv_proj|query_key_value|qkv|Wqkv|c_attn)"),
    ("q", r"(q_proj|query|query_proj|q_lin|wq)"),
    ("k", r"(k_proj|key|key_proj|k_lin|wk)"),
    ("v", r"(v_proj|value|value_proj|v_lin|wv)"),
    ("o", r"(o_proj|out_proj|out_lin|wo|attention\.output\.dense|attn\.c_proj|(self_)?attention\.dense|attn\.Wo)"),
    ("gate_up", r"(gate_up_proj|mlp\.Wi)"),
    ("gate", r"(gate_proj|w1)"),
    ("up", r"(up_proj|fc1|lin1|w3|intermediate\.dense|mlp\.c_fc|dense_h_to_4h)"),
    # BERT's output.dense follows its intermediate.dense; its attention.output.dense has been taken above.
    ("down", r"(down_proj|fc2|lin2|w2|output\.dense|mlp\.c_proj|dense_4h_to_h|mlp\.Wo)"),
)
_PATTERNS = tuple((role, re.compile(rf"(.*\.)?{pattern}")) for role, pattern in _ROLES)
_BETWEEN = "multi_modal_projector|mm_projector|embed_vision|embed_audio|connector|aligner"
_TOWER = re.compile(
    r"(?:.*\.)?(vision_tower|vision_model|vision_encoder|visual|image_tower|image_encoder|audio_tower|audio_encoder"
    rf"|{_BETWEEN})(?:\..*)?"
)
_PROJECTION = re.compile(rf"(?:.*\.)?({_BETWEEN}|merger)(?:\..*)?")
_OVER_TOWERS = re.compile(r"(?:.*[.:])?multimodal_model(?:\..*)?")
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


class RoleError(ValueError):
    """A module's role cannot be told from its name; the message names the module."""


def role_of(module: str) -> str:
    """One of ``q, k, v, o, gate, up, down``, or ``qkv`` and ``gate_up`` if a family has fused them.

    Raises:
        RoleError: the name fits none of them.
    """
    for role, pattern in _PATTERNS:
        if pattern.fullmatch(module):
            return role
    raise RoleError(f"module {module!r} has no known role; known are {', '.join(role for role, _ in _ROLES)}")


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in, from 0; None outside the layers."""
    found = _NUMBER.search(module)
    return int(found[1]) if found else None


def outside_towers(modules: Iterable[str]) -> list[str]:
    """A model's modules outside vision and audio towers and projectors; all modules if the model is itself a tower."""
    names = list(modules)
    over = [name for name in names if _OVER_TOWERS.fullmatch(name)]
    if any(layer_of(name) is not None for name in over):
        return over
    outside = [name for name in names if not _TOWER.fullmatch(name)]
    return outside if any(layer_of(name) is not None for name in outside) else names


def projections(modules: Iterable[str]) -> list[str]:
    """A model's modules between a tower and its language model."""
    return [name for name in modules if _PROJECTION.fullmatch(name)]


def depth_of(modules: Iterable[str]) -> int:
    """How many layers a model has, from the names of its modules."""
    return 1 + max((layer for layer in map(layer_of, modules) if layer is not None), default=-1)


def block_ends(depth: int, blocks: int) -> tuple[int, ...]:
    """The last layer of each of ``blocks`` blocks of equal relative depth (Co-LoRA): ``step = floor(depth / blocks)``.

    Raises:
        RoleError: there are more blocks than layers.
    """
    if not 1 <= blocks <= depth:
        raise RoleError(f"{blocks} blocks of {depth} layers, expected 1 to {depth}")
    step = depth // blocks
    return (*(index * step - 1 for index in range(1, blocks)), depth - 1)


def shared_names(targets: Iterable[str], modules: Iterable[str], blocks: int) -> dict[str, str]:
    """Names like ``blocks.0.q`` for those of ``targets`` that lie at block ends.

    Args:
        targets: modules that have adapters.
        modules: all of the model's.
        blocks: how many blocks its layers make, outside towers.

    Raises:
        RoleError: fewer layers than blocks, a module without a role, or two with the same.
    """
    stack = set(outside_towers(modules))
    ends = {layer: block for block, layer in enumerate(block_ends(depth_of(stack), blocks))}
    found: dict[str, str] = {}
    for module in targets:
        layer = layer_of(module)
        if module in stack and layer in ends:
            name = f"blocks.{ends[layer]}.{role_of(module)}"
            if name in found.values():
                raise RoleError(f"module {module!r} is a second {name!r} in its layer")
            found[module] = name
    return found


def last_down_projection(model: nn.Module) -> str:
    """The MLP down-projection of the last layer, whose gradient a sketch is.

    Raises:
        RoleError: there is none with a known name.
    """
    downs: list[str] = []
    modules = dict(model.named_modules())
    for name in outside_towers(modules):
        module = modules[name]
        base: str = name.removesuffix(".base_layer")  # PEFT wraps a module that has adapters
        if isinstance(module, nn.Linear) and layer_of(base) is not None and ".lora_" not in base:
            try:
                downs += [base] * (role_of(base) == "down")
            except RoleError:
                continue
    if not downs:
        raise RoleError("the model has no MLP down-projection by a known name (down_proj, fc2, output.dense, ...)")
    return max(downs, key=lambda name: layer_of(name) or 0)
