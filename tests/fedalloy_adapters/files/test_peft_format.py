"""Against the real thing: PEFT's own model, state dict and loader on a small transformers ViT."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from client_app.model.personal import PersonalModel
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack
from fedalloy_adapters.files.peft_format import (
    peft_config,
    peft_key,
    to_peft_state,
    write_peft_directory,
)
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from tests.fedalloy_adapters.files.peft_reading import from_peft_state, read_peft_directory
from tests.fedalloy_adapters.samples import bits, examples, random_adapter
from tests.fedalloy_adapters.tiny_vit import (
    FINGERPRINT,
    assert_same_logits,
    base_of,
    build,
    heads_of,
    linear_names,
    logits_of,
    peft_model,
)

# transformers about itself, whenever PEFT saves or wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BASE = build()
TARGETS = linear_names(BASE, "q_proj", "v_proj")
HEADS = heads_of(BASE)


def layout_with(ranks: dict[str, int], scalings: dict[str, float], head: bool = True) -> Layout:
    entries = []
    for module in ranks:
        linear = BASE.get_submodule(module)
        d_in, d_out = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
        entries += [Entry(module, Factor.A, (ranks[module], d_in)), Entry(module, Factor.B, (d_out, ranks[module]))]
    if head:
        entries += [Entry("classifier", Factor.WEIGHT, (3, 16)), Entry("classifier", Factor.BIAS, (3,))]
    return Layout(tuple(entries), scalings, FINGERPRINT)


UNIFORM = layout_with(dict.fromkeys(TARGETS, 4), dict.fromkeys(TARGETS, 2.0))
# Every module of its own: ranks 1 to 4, scalings that are neither powers of two nor alpha / rank for an integer alpha.
MIXED = layout_with(
    {module: index + 1 for index, module in enumerate(TARGETS)},
    {module: (12.5 / 8, 0.1, 2.0, 1 / 3)[index] for index, module in enumerate(TARGETS)},
)


def test_the_base_has_the_modules_that_these_tests_are_about() -> None:
    assert len(TARGETS) == 4
    assert all(name.endswith(("q_proj", "v_proj")) and ".attention." in name for name in TARGETS)


def test_state_dict_of_peft_becomes_an_adapter_and_back_to_the_bit() -> None:
    state = get_peft_model_state_dict(peft_model(TARGETS))
    assert {peft_key(entry) for entry in UNIFORM.entries} == set(state)
    adapter = from_peft_state(state, UNIFORM, HEADS)
    for module in TARGETS:
        key = f"base_model.model.{module}.lora_A.weight"
        assert bits(adapter[module, Factor.A]) == bits(state[key])
    expected = state["base_model.model.classifier.bias"] - HEADS["classifier.bias"]
    assert torch.equal(adapter["classifier", Factor.BIAS], expected)
    again = to_peft_state(adapter, HEADS)
    assert set(again) == set(state)
    for key, tensor in state.items():
        assert again[key].dtype == torch.float32
        if "lora_" in key:
            assert bits(again[key]) == bits(tensor)
        else:  # base + (trained - base) is rounded twice
            assert torch.allclose(again[key], tensor, rtol=0, atol=1e-6)


def test_adapter_becomes_a_state_dict_and_back() -> None:
    adapter = random_adapter(MIXED, 0, scale=0.2)
    back = from_peft_state(to_peft_state(adapter, HEADS), MIXED, HEADS)
    assert torch.allclose(back.vector, adapter.vector, rtol=0, atol=1e-6)
    for module in TARGETS:
        assert bits(back[module, Factor.B]) == bits(adapter[module, Factor.B])


def test_state_is_a_copy() -> None:
    adapter = random_adapter(UNIFORM, 0)
    heads = {name: tensor.clone() for name, tensor in HEADS.items()}
    before = bits(adapter.vector)
    for tensor in to_peft_state(adapter, heads).values():
        tensor.fill_(9)
    assert bits(adapter.vector) == before
    assert all(torch.equal(heads[name], HEADS[name]) for name in HEADS)


def test_base_without_the_head_or_with_another_is_refused() -> None:
    adapter = random_adapter(UNIFORM, 0)
    without = {"classifier.weight": HEADS["classifier.weight"]}
    other = HEADS | {"classifier.bias": torch.zeros(1)}
    for heads, text in ((without, "no parameter 'classifier.bias'"), (other, r"shape \(1,\), expected \(3,\)")):
        with pytest.raises(LayoutError, match=text):
            to_peft_state(adapter, heads)


def loaded(folder: Path) -> PeftModel:
    """What a user of PEFT gets; a warning (keys missing, patterns that match nothing) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # transformers about itself
        return PeftModel.from_pretrained(build(), folder).eval()


def personal_logits(adapter: Adapter) -> Tensor:
    model = PersonalModel(base_of(), rank=4, alpha=8.0)
    model.load("mine", adapter)
    model.activate({"mine": 1.0})
    return logits_of(model.module)


STACKED = stack([random_adapter(UNIFORM, 1, scale=0.2), random_adapter(UNIFORM, 2, scale=0.2)], [0.7, -0.4])
ADAPTERS = {
    "uniform": random_adapter(UNIFORM, 1, scale=0.2),
    "ranks and scalings of their own": random_adapter(MIXED, 1, scale=0.2),
    "stacked": STACKED,
    "stacked from several ranks": stack(
        [random_adapter(MIXED, 1, scale=0.2), STACKED], [2.0, dict.fromkeys(MIXED.modules, 0.5)]
    ),
    "alpha not an integer": random_adapter(
        layout_with(dict.fromkeys(TARGETS, 4), dict.fromkeys(TARGETS, 12.5 / 4)), 1, scale=0.2
    ),
    "no head": random_adapter(UNIFORM.select(modules=TARGETS), 1, scale=0.2),
    "one module": random_adapter(UNIFORM.select(modules=TARGETS[1:2]), 1, scale=0.2),
    "only the head": random_adapter(UNIFORM.select(modules=["classifier"]), 1, scale=0.2),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_directory_loads_in_peft_and_gives_the_logits_of_our_own_model(case: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[case]
    write_peft_directory(tmp_path / "adapter", adapter, "tiny-vit", HEADS)
    model = loaded(tmp_path / "adapter")
    found = logits_of(model)
    assert_same_logits(found, personal_logits(adapter), 1e-6)
    assert float((found - logits_of(BASE)).abs().max()) > 0.01, "an adapter that changes nothing tests nothing"
    for name, module in model.get_submodule("base_model.model").named_modules():
        if hasattr(module, "lora_A"):
            assert module.r["default"] == adapter.layout.ranks[name]
            assert module.scaling["default"] == pytest.approx(adapter.layout.scalings[name], rel=1e-12)
    again = read_peft_directory(tmp_path / "adapter", adapter.layout, HEADS)
    assert torch.allclose(again.vector, adapter.vector, rtol=0, atol=1e-6)


def test_directory_that_peft_wrote_is_read(tmp_path: Path) -> None:
    original = peft_model(TARGETS)
    original.save_pretrained(str(tmp_path))
    adapter = read_peft_directory(tmp_path, UNIFORM, HEADS)
    assert_same_logits(personal_logits(adapter), logits_of(original), 1e-6)


def test_directory_with_patterns_that_peft_wrote_is_read(tmp_path: Path) -> None:
    ranks = dict(zip(TARGETS, (4, 2, 4, 4), strict=True))
    scalings = dict(zip(TARGETS, (2.0, 4.0, 12.5 / 4, 2.0), strict=True))
    original = peft_model(TARGETS, rank_pattern={TARGETS[1]: 2}, alpha_pattern={TARGETS[2]: 12.5})
    original.save_pretrained(str(tmp_path))
    adapter = read_peft_directory(tmp_path, layout_with(ranks, scalings), HEADS)
    assert_same_logits(personal_logits(adapter), logits_of(original), 1e-6)


@examples(300)
@given(st.floats(1e-6, 1e6), st.integers(1, 300))
def test_every_scaling_survives_the_config(scaling: float, rank: int) -> None:
    """PEFT keeps alpha, not alpha / rank; (scaling * rank) / rank is not always scaling."""
    layout = Layout((Entry("m", Factor.A, (rank, 1)),), {"m": scaling}, "base")
    config = peft_config(layout, "base")
    assert math.isclose(config["lora_alpha"] / config["r"], scaling, rel_tol=1e-15)


@pytest.mark.parametrize("scaling", [0.1, 1 / 3, 0.7, 12.5 / 3, 16 / 7])
def test_directory_is_read_back_whatever_the_scaling(scaling: float, tmp_path: Path) -> None:
    for rank in range(1, 17):
        layout = layout_with(dict.fromkeys(TARGETS, rank), dict.fromkeys(TARGETS, scaling))
        adapter = random_adapter(layout, rank)
        write_peft_directory(tmp_path / str(rank), adapter, "tiny-vit", HEADS)
        assert read_peft_directory(tmp_path / str(rank), layout, HEADS).layout == layout


def test_config_is_what_peft_expects_and_patterns_name_one_module_each() -> None:
    config = peft_config(UNIFORM, "tiny-vit")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    assert config["target_modules"] == list(TARGETS)
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "tiny-vit"
    assert json.loads(json.dumps(config)) == config


def test_patterns_do_not_leak_to_modules_whose_names_end_alike(tmp_path: Path) -> None:
    """Module "b" is the end of "a.b", and "." matches any letter in PEFT's patterns: "a.b" against "axb"."""
    sizes = {"b": 1, "a.b": 2, "axb": 3}
    entries = tuple(Entry(name, Factor.A, (rank, 4)) for name, rank in sizes.items())
    layout = Layout(entries, {"b": 1.0, "a.b": 0.5, "axb": 0.25}, "base")
    config = peft_config(layout, "base")

    from peft.utils.other import get_pattern_key

    for name, rank in sizes.items():
        key = get_pattern_key(list(config["rank_pattern"]), name)
        assert config["rank_pattern"].get(key, config["r"]) == rank
        key = get_pattern_key(list(config["alpha_pattern"]), name)
        assert config["alpha_pattern"].get(key, config["lora_alpha"]) == rank * layout.scalings[name]


def test_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    write_peft_directory(tmp_path / "a", random_adapter(UNIFORM, 0), "tiny-vit", HEADS)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        write_peft_directory(tmp_path / "a", random_adapter(UNIFORM, 1), "tiny-vit", HEADS)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_files_hold_what_the_state_holds(tmp_path: Path) -> None:
    adapter = random_adapter(MIXED, 0)
    write_peft_directory(tmp_path / "a", adapter, "tiny-vit", HEADS)
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    expected = to_peft_state(adapter, HEADS)
    assert {key: bits(tensor) for key, tensor in state.items()} == {
        key: bits(tensor) for key, tensor in expected.items()
    }
