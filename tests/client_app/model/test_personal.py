from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.dataset import Base
from client_app.model.linear_modules import modules_ending_with
from client_app.model.personal import ModelError, PersonalModel
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient, stack, weighted_sum
from fedalloy_adapters.layout import Factor, LayoutError
from tests.client_app.model.personal_toys import LAYOUT, SLOTS, dense_logits, model_of, train_a_little, with_slots
from tests.fedalloy_adapters.samples import bits, dense, random_adapter
from tests.fedalloy_adapters.tiny_vit import (
    CLASSES,
    FINGERPRINT,
    assert_same_logits,
    build,
    images,
    linear_names,
    logits_of,
)

PER_MODULE = {module: 0.3 * (-1) ** i + 0.1 * i for i, module in enumerate(LAYOUT.modules)}
MIXTURES: dict[str, dict[str, Coefficient]] = {
    "one": {"global": 1.0},
    "one, scaled": {"local": -0.75},
    "two": {"global": 0.5, "local": 0.25},
    "three": {"third": 1.5, "global": -1.0, "local": 1 / 3},
    "per module": {"global": PER_MODULE, "local": {module: 1 - c for module, c in PER_MODULE.items()}},
    "constant and per module": {"local": 0.7, "third": PER_MODULE},
    "some zero": {"global": 0.0, "local": 1.0, "third": dict.fromkeys(LAYOUT.modules, 0.0)},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_is_the_stacked_adapter_and_the_dense_sum(name: str) -> None:
    mixture = MIXTURES[name]
    model = with_slots()
    model.activate(mixture)
    found = logits_of(model.module)
    adapters, coefficients = [SLOTS[slot] for slot in mixture], list(mixture.values())
    assert_same_logits(found, dense_logits(adapters, coefficients), 1e-5)
    assert torch.equal(model.logits({"pixel_values": images()}), found)

    alone = model_of()
    alone.load("stacked", stack(adapters, coefficients))
    alone.activate({"stacked": 1.0})
    assert_same_logits(logits_of(alone.module), found, 1e-5)
    assert float((found - logits_of(build())).abs().max()) > 0.01


def test_base_logits_without_slots_with_none_active_and_with_coefficients_zero() -> None:
    base = logits_of(build())
    empty = model_of()
    assert torch.equal(logits_of(empty.module), base)
    empty.activate({})
    assert torch.equal(logits_of(empty.module), base)
    model = with_slots()
    for mixture in ({}, dict.fromkeys(SLOTS, 0.0), {"global": dict.fromkeys(LAYOUT.modules, 0.0)}):
        model.activate({"third": 2.0})
        assert not torch.equal(logits_of(model.module), base)
        model.activate(mixture)
        assert torch.equal(logits_of(model.module), base)
    assert torch.equal(logits_of(build()), base)


def test_initial_adapter_is_the_base() -> None:
    model = model_of()
    model.load("new", Adapter.initial(LAYOUT, 0))
    model.activate({"new": 3.0})
    assert torch.equal(logits_of(model.module), logits_of(build()))


def test_activating_again_replaces_coefficients() -> None:
    """Scalings are set, never multiplied onto what was there."""
    model = with_slots()
    model.activate({"global": 1.0})
    expected = logits_of(model.module)
    for _ in range(3):
        model.activate({"global": 5.0, "local": PER_MODULE})
        model.activate({"global": 1.0})
    assert torch.equal(logits_of(model.module), expected)


@pytest.mark.parametrize("alpha", [12.5, 0.5, 8.0, 1 / 3])
def test_alpha_need_not_be_an_integer(alpha: float) -> None:
    """PEFT's lora_alpha is an int; 12.5 must not become 12, nor 0.5 become 0."""
    model = model_of(alpha=alpha)
    assert set(model.layout.scalings.values()) == {alpha / 4}
    adapter = random_adapter(model.layout, 1, scale=0.2)
    model.load("mine", adapter)
    model.activate({"mine": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([adapter], [1.0]), 1e-5)


def test_layout_is_that_of_the_base() -> None:
    targets = linear_names(build(), "q_proj", "v_proj")
    assert LAYOUT.lora_modules == targets
    assert LAYOUT.modules == (*targets, "classifier")
    assert LAYOUT.base_fingerprint == FINGERPRINT
    assert LAYOUT.by_name["classifier.weight"].shape == (CLASSES, 16)
    assert LAYOUT.by_name[f"{targets[0]}.A"].shape == (4, 16)
    assert model_of().heads["classifier.bias"].tolist() == pytest.approx([0.1, -0.2, 0.3])
    assert modules_ending_with(build(), ["q_proj", "v_proj"]) == targets
    assert modules_ending_with(build(), ["layernorm_before", "attention"]) == ()


def test_what_is_loaded_is_read_back_to_the_bit() -> None:
    model = with_slots()
    for mixture in MIXTURES.values():
        model.activate(mixture)
        logits_of(model.module)
    for slot, adapter in SLOTS.items():
        found = model.read(slot)
        assert found.layout == adapter.layout
        assert bits(found.vector) == bits(adapter.vector)
        found.vector.zero_()
        assert bits(model.read(slot).vector) == bits(adapter.vector)


def test_training_one_slot_in_a_mixture_leaves_everything_else_to_the_bit() -> None:
    model = with_slots()
    frozen = {
        name: parameter.detach().clone() for name, parameter in model.module.named_parameters() if "local" not in name
    }
    model.activate({"global": 0.5, "local": PER_MODULE, "third": 1.0})
    train_a_little(model, list(model.trainable("local", SLOTS["local"].layout).values()))
    assert bits(model.read("global").vector) == bits(SLOTS["global"].vector)
    assert bits(model.read("third").vector) == bits(SLOTS["third"].vector)
    for entry, tensor in model.read("local").items():
        assert not torch.equal(tensor, SLOTS["local"][entry.module, entry.factor]), entry.name
    after = dict(model.module.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    model.activate({})
    assert torch.equal(logits_of(model.module), logits_of(build()))


PARTS = {
    "B": LAYOUT.select([Factor.B]),
    "A": LAYOUT.select([Factor.A]),
    "head": LAYOUT.select([Factor.WEIGHT, Factor.BIAS]),
    "B and bias": LAYOUT.select([Factor.B, Factor.BIAS]),
    "one module": LAYOUT.select(modules=LAYOUT.modules[1:2]),
    "all": LAYOUT,
}


@pytest.mark.parametrize("name", PARTS)
def test_only_the_chosen_part_gets_gradients_and_moves(name: str) -> None:
    part = PARTS[name]
    model = with_slots()
    model.activate({"global": 1.0, "local": 1.0})
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    parameters = model.trainable("global", part)
    assert set(parameters) == {entry.name for entry in part.entries}
    train_a_little(model, list(parameters.values()))
    trained = {id(parameter) for parameter in parameters.values()}
    for full_name, parameter in model.module.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), full_name
        assert (parameter.grad is not None) == (id(parameter) in trained), full_name
    for entry, tensor in model.read("global").items():
        moved = not torch.equal(tensor, SLOTS["global"][entry.module, entry.factor])
        assert moved == (entry.name in parameters), entry.name
    model.activate({"global": 1.0})
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_gradients_in_a_mixture_are_those_of_the_dense_model() -> None:
    """d loss / d B = coefficient x scaling x G A^T, with G the gradient of the module's dense weight."""
    module, coefficient = LAYOUT.lora_modules[2], 0.6
    model = with_slots()
    model.activate({"global": coefficient, "third": -0.5})
    parameters = model.trainable("global", LAYOUT)
    labels = torch.arange(6) % CLASSES
    functional.cross_entropy(model.logits({"pixel_values": images()}), labels).backward()  # type: ignore[no-untyped-call]

    plain = build()
    with torch.no_grad():
        for slot, c in (("global", coefficient), ("third", -0.5)):
            for name, delta in dense(SLOTS[slot]).items():
                key = name if name.startswith("classifier.") else f"{name}.weight"
                plain.get_parameter(key).add_((c * delta).float())
    functional.cross_entropy(plain(pixel_values=images()).logits, labels).backward()  # type: ignore[no-untyped-call]
    gradient = plain.get_parameter(f"{module}.weight").grad
    assert gradient is not None
    factor = coefficient * LAYOUT.scalings[module]
    for kind, expected in (
        (Factor.B, factor * gradient @ SLOTS["global"][module, Factor.A].T),
        (Factor.A, factor * SLOTS["global"][module, Factor.B].T @ gradient),
    ):
        found = parameters[f"{module}.{kind}"].grad
        assert found is not None
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)
    head = plain.get_parameter("classifier.weight").grad
    found = parameters["classifier.weight"].grad
    assert head is not None
    assert found is not None
    assert torch.allclose(found, coefficient * head, rtol=1e-3, atol=1e-6)


def test_heads_are_base_plus_the_sum_of_differences() -> None:
    model = with_slots()
    model.activate({"global": 0.5, "local": PER_MODULE})
    head = model.module.get_submodule("classifier")
    for kind, factor in (("weight", Factor.WEIGHT), ("bias", Factor.BIAS)):
        expected = (
            model.heads[f"classifier.{kind}"]
            + 0.5 * SLOTS["global"]["classifier", factor]
            + PER_MODULE["classifier"] * SLOTS["local"]["classifier", factor]
        )
        assert torch.allclose(getattr(head, kind), expected, atol=1e-7)
    model.activate({})
    assert torch.equal(head.weight, model.heads["classifier.weight"])  # type: ignore[arg-type]


def test_coefficients_for_a_module_must_be_there_and_finite() -> None:
    model = with_slots()
    missing = {module: 1.0 for module in LAYOUT.modules if module != LAYOUT.lora_modules[1]}
    with pytest.raises(LayoutError, match=LAYOUT.lora_modules[1]):
        model.activate({"global": missing})
    with pytest.raises(LayoutError, match="classifier"):
        model.activate({"global": dict.fromkeys(LAYOUT.lora_modules, 1.0)})
    for bad in (math.nan, math.inf):
        with pytest.raises(LayoutError, match="finite"):
            model.activate({"global": bad})


def test_a_mixture_of_a_slot_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(ModelError, match=r"slot 'local' is not loaded; loaded: none"):
        model_of().activate({"local": 1.0})


class TwoNames(nn.Module):
    """Module "q" and module "block.q": PEFT takes a target for the end of a name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.block["q"](self.q(x))))


def test_targets_are_these_modules_and_not_all_whose_names_end_alike() -> None:
    torch.manual_seed(0)
    module = TwoNames()
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    model = PersonalModel(Base("two-names", module, "f" * 64, ("q",), ("head",)), rank=2, alpha=4.0)
    assert [entry.name for entry in model.layout.entries] == ["q.A", "q.B", "head.weight"]
    adapter = random_adapter(model.layout, 0)
    model.load("mine", adapter)
    model.activate({"mine": 1.0})
    x = torch.randn(5, 4)
    delta = dense(adapter)
    hidden = x @ (expected["q.weight"] + delta["q"].float()).T + expected["q.bias"]
    hidden = hidden @ expected["block.q.weight"].T + expected["block.q.bias"]
    assert torch.allclose(
        model.logits({"x": x}), hidden @ (expected["head.weight"] + delta["head.weight"].float()).T, atol=1e-5
    )
    assert isinstance(module.block["q"], nn.Linear), "only q was to be adapted"


@pytest.mark.parametrize(
    ("targets", "heads", "text"),
    [
        (("vit.nothing",), (), "no linear module 'vit.nothing'"),
        (("vit.layernorm",), (), "no linear module 'vit.layernorm'"),
        ((), ("vit",), "no linear module 'vit'"),
        (("classifier",), ("classifier",), "'classifier' is a target and a head"),
    ],
)
def test_base_that_cannot_be_adapted_is_refused(targets: tuple[str, ...], heads: tuple[str, ...], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        PersonalModel(Base("tiny-vit", build(), FINGERPRINT, targets, heads), 4, 8.0)


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    model = with_slots(dropout=0.5)
    model.activate({"global": 1.0})
    assert_same_logits(logits_of(model.module), dense_logits([SLOTS["global"]], [1.0]), 1e-5)
    model.module.train()
    assert not torch.equal(logits_of(model.module), logits_of(model.module))
    model.module.eval()


def test_slots_of_one_layout_mix_like_their_factor_sum_when_a_is_shared() -> None:
    """Ties the model to the other merge: with a common A, sums of factors are sums of deltas."""
    first = SLOTS["global"]
    second = random_adapter(LAYOUT, 8, scale=0.2).with_part(first.select([Factor.A]))
    model = model_of()
    model.load("first", first)
    model.load("second", second)
    model.activate({"first": 0.25, "second": 0.75})
    found = logits_of(model.module)
    model.load("sum", weighted_sum([first, second], [0.25, 0.75]))
    model.activate({"sum": 1.0})
    assert_same_logits(logits_of(model.module), found, 1e-5)
