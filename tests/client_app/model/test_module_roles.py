"""Roles by name in models that look: layers, blocks and sketches are the language model's, never a tower's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from client_app.data.dataset import Base, Dataset
from client_app.model.module_roles import depth_of, last_down_projection, outside_towers, shared_names
from client_app.model.personal import PersonalModel
from client_app.plan.sketch import ReferenceModel
from proto.fedalloy.v1 import plan_pb2
from tests.toys.multi_task_toys import SPECS, TINY, base_of

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT))
    model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    return model


def qwen_vl() -> nn.Module:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": rope}, vision_config=vision | {"out_hidden_size": 32}
    )
    model: nn.Module = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model


def clip_tower() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    model: nn.Module = transformers.CLIPVisionModel(config)
    return model


def texts() -> Dataset:
    tokens = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(1))
    return Dataset({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tokens.clone(), "causal-lm")


@pytest.mark.parametrize("build", [llava, qwen_vl])
def test_layers_blocks_and_the_sketch_are_the_language_models(build: Any) -> None:
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    linear = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name
    )
    names = dict(model.named_modules())
    assert depth_of(outside_towers(names)) == 2
    assert depth_of(names) > 2, "or the towers make no difference here"
    shared = shared_names(linear, names, 2)
    assert len(shared) == 2 * 7
    assert all(".language_model.layers." in module for module in shared)
    assert last_down_projection(model) == "model.language_model.layers.1.mlp.down_proj"
    for targets in (linear, tuple(name for name in linear if name.endswith(("q_proj", "v_proj", "qkv")))):
        personal = PersonalModel(Base("looks", model, "f" * 64, targets, ()), 2, 4.0, blocks=2)
        assert set(personal.layout.shared_names) == set(targets) & set(shared)
    reference = ReferenceModel(personal)
    for kind in (plan_pb2.SKETCH_GRADIENT_EXACT, plan_pb2.SKETCH_GRADIENT_DIAGONAL):
        gradient = reference.gradient(texts(), kind)
        assert gradient.shape == (32, 64)
        assert float(gradient.norm()) > 0


def test_a_tower_by_itself_is_a_model() -> None:
    model = clip_tower()
    assert depth_of(outside_towers(dict(model.named_modules()))) == 3
    assert last_down_projection(model).endswith("layers.2.mlp.fc2")


def test_a_flavas_layers_are_those_over_both_towers() -> None:
    names = dict(base_of([SPECS["digit"], SPECS["number"]]).model.named_modules())
    over = outside_towers(names)
    assert all("multimodal_model" in name for name in over)
    assert depth_of(over) == TINY.layers
    found = last_down_projection(base_of([SPECS["caption"]]).model)
    assert found == f"backbone.multimodal_model.encoder.layer.{TINY.layers - 1}.output.dense"
