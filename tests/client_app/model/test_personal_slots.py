"""Slots of a personal model: loaded, loaded again, unloaded, and refused."""

from __future__ import annotations

import pytest
import torch

from client_app.model.personal import ModelError
from fedalloy_adapters.algebra import Coefficient
from fedalloy_adapters.layout import Entry, Factor, Layout
from tests.client_app.model.personal_toys import (
    LAYOUT,
    SLOTS,
    dense_logits,
    model_of,
    resized,
    train_a_little,
    with_slots,
)
from tests.fedalloy_adapters.samples import bits, random_adapter
from tests.fedalloy_adapters.tiny_vit import (
    CLASSES,
    FINGERPRINT,
    assert_same_logits,
    build,
    logits_of,
)


def test_reloading_with_another_rank_replaces_the_slot() -> None:
    model = with_slots()
    model.activate({"global": 1.0, "local": 0.5})
    wider = random_adapter(resized(LAYOUT, [9, 2], [0.25]), 7, scale=0.2)
    model.load("global", wider)
    assert bits(model.read("global").vector) == bits(wider.vector)
    model.activate({"global": 1.0, "local": 0.5})
    assert_same_logits(logits_of(model.module), dense_logits([wider, SLOTS["local"]], [1.0, 0.5]), 1e-5)
    model.load("global", SLOTS["global"])
    model.activate({"global": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["global"]], [1.0]), 1e-5)


def test_loading_again_copies_numbers_and_does_not_move_the_random_generator() -> None:
    model = with_slots()
    state = torch.get_rng_state()
    adapter = random_adapter(LAYOUT, 9, scale=0.2)
    model.load("global", adapter)
    assert torch.equal(torch.get_rng_state(), state)
    adapter.vector.zero_()
    assert model.read("global").vector.any()


def test_unloaded_slot_is_gone_and_the_others_stay() -> None:
    model = with_slots()
    model.activate({"global": 1.0, "local": 1.0})
    model.unload("local")
    with pytest.raises(ModelError, match=r"'local' is not loaded; loaded: global, third"):
        model.read("local")
    with pytest.raises(ModelError, match="'local'"):
        model.activate({"global": 1.0, "local": 1.0})
    with pytest.raises(ModelError, match="'local'"):
        model.unload("local")
    assert not any("local" in name for name, _ in model.module.named_parameters())
    model.activate({"global": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["global"]], [1.0]), 1e-5)
    model.load("local", SLOTS["local"])
    model.activate({"local": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["local"]], [1.0]), 1e-5)


def test_unloading_an_active_slot_takes_it_out_of_the_mixture() -> None:
    model = with_slots()
    model.activate({"global": 1.0, "local": 1.0})
    model.unload("local")
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["global"]], [1.0]), 1e-5)
    model.unload("global")
    assert torch.equal(logits_of(model.module), logits_of(build())), "nothing that was not asked for becomes active"


def test_loading_a_slot_does_not_activate_it() -> None:
    model = model_of()
    model.load("global", SLOTS["global"])
    assert torch.equal(logits_of(model.module), logits_of(build()))
    model.activate({"global": 1.0})
    model.load("third", SLOTS["third"])
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["global"]], [1.0]), 1e-5)


def test_slot_without_a_head_or_with_only_a_head() -> None:
    """Coefficients are needed for the modules of the slot, and for no other."""
    bodies = random_adapter(LAYOUT.select(modules=LAYOUT.lora_modules), 4, scale=0.2)
    heads = random_adapter(LAYOUT.select(modules=["classifier"]), 5, scale=0.2)
    model = model_of()
    model.load("body", bodies)
    model.load("head", heads)
    body_coefficients: Coefficient = dict.fromkeys(LAYOUT.lora_modules, 0.5)
    model.activate({"body": body_coefficients, "head": {"classifier": 2.0}})
    assert_same_logits(logits_of(model.module), dense_logits([bodies, heads], [0.5, 2.0]), 1e-5)
    assert bits(model.read("body").vector) == bits(bodies.vector)
    assert bits(model.read("head").vector) == bits(heads.vector)
    train_a_little(model, list(model.trainable("head", heads.layout).values()))
    assert bits(model.read("body").vector) == bits(bodies.vector)
    model.unload("head")
    model.unload("body")
    assert torch.equal(logits_of(model.module), logits_of(build()))


FIRST = LAYOUT.modules[0]
UNFIT = {
    "another base": (Layout(LAYOUT.entries, LAYOUT.scalings, "other"), "base model other"),
    "unknown module": (
        Layout((*LAYOUT.entries, Entry("pooler", Factor.A, (1, 16))), {**LAYOUT.scalings, "pooler": 1.0}, FINGERPRINT),
        "unknown tensor 'pooler.A'",
    ),
    "linear module that is no target": (
        Layout((Entry("vit.layers.0.mlp.fc1", Factor.A, (1, 16)),), {"vit.layers.0.mlp.fc1": 1.0}, FINGERPRINT),
        "unknown tensor 'vit.layers.0.mlp.fc1.A'",
    ),
    "head of another size": (
        Layout((Entry("classifier", Factor.BIAS, (CLASSES + 1,)),), {}, FINGERPRINT),
        r"shape \(4,\) for 'classifier.bias'",
    ),
    "head that would broadcast": (
        Layout((Entry("classifier", Factor.BIAS, (1,)),), {}, FINGERPRINT),
        r"shape \(1,\) for 'classifier.bias'",
    ),
    "LoRA that would broadcast": (
        Layout((Entry(FIRST, Factor.B, (1, 4)),), {FIRST: 1.0}, FINGERPRINT), r"shape \(1, 4\)"
    ),
    "LoRA of another input size": (
        Layout((Entry(FIRST, Factor.A, (4, 17)),), {FIRST: 1.0}, FINGERPRINT), r"shape \(4, 17\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_adapter_that_does_not_fit_the_base_is_refused_and_the_model_stays(case: str) -> None:
    layout, text = UNFIT[case]
    model = with_slots()
    model.activate({"global": 1.0})
    before = logits_of(model.module)
    for slot in ("new", "global"):
        with pytest.raises(ModelError, match=text):
            model.load(slot, random_adapter(layout, 0))
        assert torch.equal(logits_of(model.module), before)
        assert bits(model.read("global").vector) == bits(SLOTS["global"].vector)
    with pytest.raises(ModelError, match="not loaded"):
        model.read("new")


@pytest.mark.parametrize(
    "slot", ["default", "train", "float", "type", "keys", "lora_A", "forward", "a-b", "0", "weight"]
)
def test_every_slot_name_that_a_plan_may_use_works(slot: str) -> None:
    """PyTorch's containers reserve the names of their own methods, PEFT some prefixes."""
    model = model_of()
    model.load(slot, SLOTS["local"])
    model.load("other", SLOTS["third"])
    model.activate({slot: 1.0, "other": 0.5})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["local"], SLOTS["third"]], [1.0, 0.5]), 1e-5)
    train_a_little(model, list(model.trainable(slot, SLOTS["local"].layout).values()))
    model.unload(slot)
    model.activate({"other": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["third"]], [1.0]), 1e-5)
