from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.dataset import Base
from client_app.model.personal import ModelError, PersonalModel, modules_ending_with
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient, stack, weighted_sum
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from tests.fedalloy_adapters.samples import bits, dense, random_adapter
from tests.fedalloy_adapters.tiny_vit import (
    CLASSES,
    FINGERPRINT,
    assert_same_logits,
    base_of,
    build,
    images,
    linear_names,
    logits_of,
)


def model_of(rank: int = 4, alpha: float = 8.0, dropout: float = 0.0) -> PersonalModel:
    return PersonalModel(base_of(), rank, alpha, dropout)


def resized(layout: Layout, ranks: list[int], scalings: list[float]) -> Layout:
    """The layout with ranks and scalings of its own for every LoRA module, cyclically."""
    own = {module: ranks[i % len(ranks)] for i, module in enumerate(layout.lora_modules)}
    entries = []
    for entry in layout.entries:
        shape = entry.shape
        if entry.factor is Factor.A:
            shape = (own[entry.module], shape[1])
        elif entry.factor is Factor.B:
            shape = (shape[0], own[entry.module])
        entries.append(Entry(entry.module, entry.factor, shape))
    by_module = {module: scalings[i % len(scalings)] for i, module in enumerate(layout.lora_modules)}
    return Layout(tuple(entries), by_module, layout.base_fingerprint)


def dense_logits(adapters: list[Adapter], coefficients: list[Coefficient]) -> Tensor:
    """The base with coefficient x scaling x B A added to its weights: no PEFT, no parametrization."""
    model = build()
    with torch.no_grad():
        for adapter, coefficient in zip(adapters, coefficients, strict=True):
            for name, delta in dense(adapter).items():
                module, _, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
                factor = coefficient[module] if isinstance(coefficient, Mapping) else coefficient
                parameter = model.get_submodule(module).get_parameter(kind)
                parameter.add_((factor * delta).float())
    return logits_of(model)


LAYOUT = model_of().layout
SLOTS = {
    "global": random_adapter(LAYOUT, 1, scale=0.2),
    "local": random_adapter(resized(LAYOUT, [1, 6, 2, 3], [0.5, 2.0, 12.5 / 3]), 2, scale=0.2),
    "third": random_adapter(resized(LAYOUT, [8], [1.0]), 3, scale=0.2),
}
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


def with_slots(**options: float) -> PersonalModel:
    model = model_of(**options)  # type: ignore[arg-type]
    for slot, adapter in SLOTS.items():
        model.load(slot, adapter)
    return model


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


def train_a_little(model: PersonalModel, parameters: list[nn.Parameter], steps: int = 3) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=0.05)
    model.module.train()
    for _ in range(steps):
        loss = functional.cross_entropy(model.logits({"pixel_values": images()}), torch.arange(6) % CLASSES)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.module.eval()


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
