"""Co-LoRA at the client: groups 1 to 4 of the specification's invariants, and folding into one PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.model.co_lora import Gate
from client_app.model.forward.narrow_input import NarrowInputLinear
from client_app.model.module_roles import RoleError, block_ends, last_down_projection, role_of
from client_app.model.personal import ModelError, PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import distance, fold, stack, truncate
from fedalloy_adapters.co_lora_names import shared_layout
from fedalloy_adapters.files.peft_format import write_peft_directory
from fedalloy_adapters.layout import Factor, Layout
from proto.fedalloy.v1 import plan_pb2
from server_app.tools.handover.export import is_in_parts
from strategies.framework import steps
from tests.client_app.model.co_lora_toys import llama, slots_of
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import assert_same_logits, base_of, build, heads_of, images, logits_of

SUFFIXES = ("q_proj", "v_proj", "fc2")
KINDS = ("scalar", "input", "token")


def model_of(blocks: int = 1, rank: int = 3, dropout: float = 0.0) -> PersonalModel:
    return PersonalModel(base_of(SUFFIXES), rank, 6.0, dropout, blocks)


def gates_of(model: PersonalModel, kind: str, seed: int = 9) -> Adapter:
    layout = model.gate_layout(looks_at_input=kind != "scalar", per_token=kind == "token")
    return random_adapter(layout, seed, scale=1.5)


def gated(model: PersonalModel, kind: str, gates: Adapter | None = None) -> PersonalModel:
    for name, adapter in slots_of(model).items():
        model.load(name, adapter)
    model.load("gates", gates or gates_of(model, kind))
    model.activate({"global": Gate("gates"), "local": Gate("gates", complement=True)})
    return model


@pytest.mark.parametrize(
    ("depth", "ends"),
    [
        (16, (3, 7, 11, 15)),
        (24, (5, 11, 17, 23)),
        (28, (6, 13, 20, 27)),
        (32, (7, 15, 23, 31)),
        (36, (8, 17, 26, 35)),
    ],
)
def test_block_ends_are_those_of_the_authors_code(depth: int, ends: tuple[int, ...]) -> None:
    assert block_ends(depth, 4) == ends


def test_block_ends_rise_to_the_last_layer_and_more_blocks_than_layers_are_refused() -> None:
    for depth in range(1, 40):
        for blocks in range(1, depth + 1):
            ends = block_ends(depth, blocks)
            assert len(ends) == blocks
            assert ends[-1] == depth - 1
            assert list(ends) == sorted(set(ends))
            assert ends[0] >= 0
    with pytest.raises(RoleError, match="5 blocks of 4 layers"):
        block_ends(4, 5)
    with pytest.raises(ModelError, match="3 blocks of 2 layers"):
        model_of(blocks=3)


def bert() -> nn.Module:
    config = BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config)


def test_families_widths_and_depths_share_the_same_tensors() -> None:
    found = []
    for model, suffixes in (
        (llama(), ("q_proj", "v_proj", "up_proj", "down_proj")),
        (llama(32, 5), ("q_proj", "v_proj", "up_proj", "down_proj")),
        (bert(), ("query", "value", "intermediate.dense", "output.dense")),
    ):
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(suffixes)]
        targets = tuple(n for n in names if "attention.output" not in n)
        personal = PersonalModel(Base("m", model, "f" * 64, targets, ()), 3, 6.0, blocks=2)
        assert all(personal.layout.by_name[f"{m}.P"].shape == (3, 3) for m in personal.layout.shared_names)
        assert all(personal.layout.by_name[f"{m}.Q"].shape == (3,) for m in personal.layout.shared_names)
        found.append(shared_layout(personal.layout))
    assert found[0] is not None
    assert found[0].size == 2 * 4 * (3 * 3 + 3)
    assert {layout.digest for layout in found if layout is not None} == {found[0].digest}
    assert last_down_projection(llama()) == "model.layers.2.mlp.down_proj"
    assert last_down_projection(bert()) == "bert.encoder.layer.3.output.dense"
    with pytest.raises(RoleError, match="'score' has no known role"):
        role_of("score")


def test_families_name_the_same_part_in_their_own_ways() -> None:
    layers = {
        "q": (
            "model.layers.0.self_attn.q_proj",
            "bert.encoder.layer.0.attention.self.query",
            "layer.0.attention.q_lin",
        ),
        "o": (
            "bert.encoder.layer.0.attention.output.dense",
            "gpt_neox.layers.0.attention.dense",
            "layers.0.attn.Wo",
            "transformer.h.0.attn.c_proj",
        ),
        "down": (
            "model.layers.0.mlp.down_proj",
            "bert.encoder.layer.0.output.dense",
            "transformer.h.0.mlp.c_proj",
            "gpt_neox.layers.0.mlp.dense_4h_to_h",
            "layers.0.mlp.Wo",
            "transformer.layer.0.ffn.lin2",
        ),
        "qkv": ("model.layers.0.self_attn.qkv_proj", "gpt_neox.layers.0.attention.query_key_value", "h.0.attn.c_attn"),
        "gate_up": ("model.layers.0.mlp.gate_up_proj",),
    }
    for role, names in layers.items():
        assert [role_of(name) for name in names] == [role] * len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_model_is_the_base_for_any_gate_and_only_p_and_q_of_the_local_slot_learn(kind: str) -> None:
    model = model_of()
    start = model.initial(1)
    for name in ("global", "local"):
        model.load(name, start)
    model.load("gates", gates_of(model, kind))
    model.activate({"global": Gate("gates"), "local": Gate("gates", complement=True)})
    assert_same_logits(logits_of(model.module), logits_of(build()), 1e-6)
    parameters = model.trainable("local", model.layout.select(without_basis=True))
    model.logits({"pixel_values": images()}).square().sum().backward()  # type: ignore[no-untyped-call]
    shared = [name for name in parameters if name.endswith((".P", ".Q"))]
    assert shared
    for name in shared:
        gradient = parameters[name].grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0
    learning = {id(parameter) for parameter in parameters.values()}
    others = [parameter for parameter in model.module.parameters() if id(parameter) not in learning]
    assert all(parameter.grad is None for parameter in others)


def by_hand(model: PersonalModel, slots: dict[str, Adapter], gates: Adapter, kind: str) -> Tensor:
    """The closed formula in float64, module by module, with hooks on a plain base model."""
    base = build().double()
    coefficient: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, g = inputs[0], gates[name, Factor.GATE].double()
            if kind == "scalar":
                beta = torch.sigmoid(g)
            elif kind == "token":
                beta = torch.stack([torch.stack([torch.sigmoid(t @ g[0]) for t in sample]) for sample in x])[..., None]
            else:
                beta = torch.sigmoid(torch.stack([sum(t @ g for t in sample) / len(sample) for sample in x]))
                beta = beta[:, None, None]
            coefficient[name] = beta
            for slot, weight in (("global", beta), ("local", 1 - beta)):
                adapter = slots[slot].to(torch.float64)
                hidden = x @ adapter[name, Factor.A].T
                if f"{name}.P" in adapter.layout.by_name:
                    hidden = hidden @ adapter[name, Factor.P] + adapter[name, Factor.Q]
                scaling = adapter.layout.scalings[name]
                output = output + weight * scaling * (hidden @ adapter[name, Factor.B].T)
            return output

        return add

    for name in model.layout.lora_modules:
        base.get_submodule(name).register_forward_hook(hook(name))
    beta = torch.sigmoid(gates["classifier", Factor.GATE].double())
    with torch.no_grad():
        for key in ("weight", "bias"):
            factor = Factor(key)
            change = beta * slots["global"]["classifier", factor] + (1 - beta) * slots["local"]["classifier", factor]
            base.get_parameter(f"classifier.{key}").add_(change)
        return base(pixel_values=images().double()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_gated_model_is_the_closed_formula(kind: str) -> None:
    model = model_of()
    slots, gates = slots_of(model), gates_of(model, kind)
    gated(model, kind, gates)
    model.module.double()
    for parameters in model._gates.values():
        for parameter in parameters.values():
            parameter.data = parameter.data.double()
    found = model.logits({"pixel_values": images().double()})
    torch.testing.assert_close(found, by_hand(model, slots, gates, kind), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("logit", "slot"), [(-80.0, "local"), (80.0, "global")])
def test_extreme_gates_leave_one_slot(logit: float, slot: str) -> None:
    model = model_of()
    layout = model.gate_layout(looks_at_input=False)
    gated(model, "scalar", Adapter(layout, torch.full((layout.size,), logit)))
    found = logits_of(model.module)
    model.activate({slot: 1.0})
    assert_same_logits(found, logits_of(model.module), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_slots_make_the_gate_irrelevant(kind: str) -> None:
    model = model_of()
    slots = slots_of(model)
    found = []
    for seed in (1, 2):
        model.load("global", slots["local"])
        model.load("local", slots["local"])
        model.load("gates", gates_of(model, kind, seed))
        model.activate({"global": Gate("gates"), "local": Gate("gates", complement=True)})
        found.append(logits_of(model.module))
    assert_same_logits(found[0], found[1], 1e-5)


@pytest.mark.parametrize("kind", ["input", "token"])
def test_gates_learn(kind: str) -> None:
    model = gated(model_of(), kind)
    parameters = model.trainable("gates", gates_of(model, kind).layout)
    model.logits({"pixel_values": images()}).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_personal_model_has_the_clients_logits_whether_it_folds_or_not(tmp_path: Path, kind: str) -> None:
    model = model_of()
    slots, gates = slots_of(model), gates_of(model, kind)
    expected = logits_of(gated(model, kind, gates).module)
    model.unload_all()
    data = ClientData("toy", "image-classification", {"train": Dataset({"pixel_values": images()}, torch.zeros(6))})
    store = SlotStore(tmp_path, "tiny-vit", lambda: model.heads)
    plan = plan_pb2.Plan(version=1, client_id="ada", steps=[steps.save(steps.gated("global", "local", "gates"))])
    with store.transaction(1) as held:
        for name, adapter in {**slots, "gates": gates}.items():
            held[name] = adapter
        report, _ = Interpreter("ada", model, data, held).run(plan, {})
    folder = tmp_path / "adapter"
    assert report.results[0].save.in_parts is is_in_parts(folder) is (kind != "scalar")
    if kind == "scalar":
        assert_same_logits(logits_of(PeftModel.from_pretrained(build(), folder)), expected, 1e-5)
        return
    kept = load_file(folder / "gates.safetensors")
    for entry, tensor in gates.items():
        assert torch.equal(kept[f"gates/{entry.module}"], tensor)
    for name, adapter in slots.items():
        model.load(name, adapter)
        model.activate({name: 1.0})
        assert_same_logits(logits_of(PeftModel.from_pretrained(build(), folder / name)), logits_of(model.module), 1e-5)


def test_scalar_gates_fold_into_one_peft_adapter_with_the_same_logits(tmp_path: Path) -> None:
    model = model_of()
    slots, gates = slots_of(model), gates_of(model, "scalar")
    found = logits_of(gated(model, "scalar", gates).module)
    weights = {entry.module: float(torch.sigmoid(value)) for entry, value in gates.items()}
    folded = stack(
        [slots["global"], slots["local"]], [weights, {module: 1 - weight for module, weight in weights.items()}]
    )
    assert not any(entry.factor is Factor.P for entry in folded.layout.entries)
    write_peft_directory(tmp_path / "adapter", folded, "tiny-vit", heads_of(build()))
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert_same_logits(logits_of(loaded), found, 1e-5)
    model.load("folded", folded)
    model.activate({"folded": 1.0})
    assert_same_logits(logits_of(model.module), found, 1e-5)


def test_delta_algebra_covers_p_and_q() -> None:
    model = model_of()
    first, second = (adapter.to(torch.float64) for adapter in slots_of(model).values())
    assert distance(first, fold(first)) < 1e-9
    assert distance(first, second) > 0.1
    without_q = first.clone()
    for entry, tensor in without_q.items():
        if entry.factor is Factor.Q:
            tensor.zero_()
    assert distance(first, without_q) > 0.1
    both = stack([first, second], [0.5, 0.5])
    wide = Layout(
        tuple(entry for entry in both.layout.entries), dict(both.layout.scalings), both.layout.base_fingerprint
    )
    assert distance(truncate(both, wide), both) < 1e-9


def test_p_and_q_of_a_slot_go_when_it_is_unloaded() -> None:
    model = gated(model_of(), "scalar")
    model.unload("global")
    assert not any("slot-global" in name for name, _ in model.module.named_parameters())
    model.unload("gates")
    with pytest.raises(ModelError, match="slot 'gates' is not loaded"):
        model.activate({"local": Gate("gates")})


def test_a_slot_reads_back_as_it_was_loaded() -> None:
    model = gated(model_of(), "input")
    for name, adapter in {**slots_of(model), "gates": gates_of(model, "input")}.items():
        assert torch.equal(model.read(name).vector, adapter.vector)


def test_p_and_q_are_float32_over_a_base_of_less() -> None:
    base = base_of(SUFFIXES)
    base.model.to(torch.bfloat16)
    model = PersonalModel(base, 3, 6.0, blocks=1)
    model.load("local", slots_of(model)["local"])
    model.activate({"local": 1.0})
    parameters = model.trainable("local", model.layout.select(without_basis=True))
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert model.logits({"pixel_values": images().bfloat16()}).isfinite().all()
    inputs = [module for module in model.module.modules() if isinstance(module, NarrowInputLinear)]
    assert len(inputs) == len(model.layout.lora_modules), "no A keeps a float32 copy of its input"
