"""Sketches: groups 9 and 10 of the specification's invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from client_app.data.dataset import Base, ClientData, Dataset, MixedDataset
from client_app.guard.noise import gaussian
from client_app.model.personal import PersonalModel
from client_app.plan.interpreter import Interpreter
from client_app.plan.seeds import seed_of
from client_app.plan.sketch import ReferenceModel, SketchError, reference_layout, row_subset, take_sketch
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.parts import layout_of_sketch
from fedalloy_adapters.wire.codec import Encoding, decode, encoding_to_proto
from proto.fedalloy.v1 import plan_pb2
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import CLASSES, base_of, images, logits_of
from tests.fuzz.targets import Memory
from tests.toys.multi_task_toys import SPECS, data_of
from tests.toys.multi_task_toys import base_of as flava_of

QUIET = gaussian(0.0, b"")


def llama_personal() -> PersonalModel:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        pad_token_id=0,
        num_labels=CLASSES,  # type: ignore[call-arg]
    )
    torch.manual_seed(0)
    module = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        module.model.norm.weight.uniform_(0.5, 1.5)
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    targets = tuple(n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith("down_proj"))
    return PersonalModel(Base("llama", module, "f" * 64, targets, ()), 2, 4.0)


def text() -> Dataset:
    tokens = torch.randint(1, 20, (6, 5), generator=torch.Generator().manual_seed(1))
    return Dataset({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, torch.arange(6) % CLASSES)


def pictures() -> Dataset:
    return Dataset({"pixel_values": images()}, torch.arange(len(images())) % CLASSES)


def step(**options: Any) -> plan_pb2.SketchStep:
    found = plan_pb2.SketchStep(
        slot="sketch",
        split="train",
        batches=2,
        batch_size=3,
        gradient=plan_pb2.SKETCH_GRADIENT_EXACT,
        rows=plan_pb2.SKETCH_ROWS_RANDOM,
        row_count=5,
        new_weight=1.0,
    )
    for name, value in options.items():
        setattr(found, name, value)
    return found


def full_gradient(module: nn.Module, weight: nn.Parameter, data: Dataset) -> Tensor:
    weight.requires_grad_(True)
    loss = functional.cross_entropy(module(**data.inputs).logits, data.labels)
    found = torch.autograd.grad(loss, weight)[0]
    weight.requires_grad_(False)
    return found


def test_the_gradient_is_that_of_the_base_whatever_adapters_are_active_and_leaves_everything_as_it_was() -> None:
    personal = llama_personal()
    plain = llama_personal()
    expected = full_gradient(plain.module, plain.module.get_parameter("model.layers.1.mlp.down_proj.weight"), text())
    personal.load("local", random_adapter(personal.layout, 3, scale=0.5))
    personal.activate({"local": 1.0})
    personal.module.train()
    before = {name: tensor.clone() for name, tensor in personal.module.state_dict().items()}
    reference = ReferenceModel(personal)
    found = reference.gradient(text())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert personal.module.training
    assert not any(parameter.requires_grad for parameter in personal.module.parameters())
    after = personal.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert reference.layout.entries[0].shape == (16, 24)


def test_a_head_of_the_clients_own_takes_no_part_either() -> None:
    base = base_of(heads=())
    personal = PersonalModel(replace(base, own_heads=("classifier",)), 2, 4.0)
    reference = ReferenceModel(personal)
    before = reference.gradient(pictures())
    without = logits_of(personal.module)
    personal.load("local", random_adapter(personal.whole_layout, 3, scale=1.0))
    personal.activate({"local": 1.0})
    assert not torch.equal(logits_of(personal.module), without)
    assert torch.equal(reference.gradient(pictures()), before)
    assert torch.equal(logits_of(personal.module), without)  # until the next step's mixture


def test_the_diagonal_gradient_is_the_closed_formula_and_not_the_exact_one() -> None:
    """The formula of the authors' code for a head that reads the last token only, in loops over tokens."""
    personal = llama_personal()
    module: Any = personal.module
    kept: dict[str, Tensor] = {}
    module.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: kept.update(u=x[0]))
    module.model.norm.register_forward_pre_hook(lambda m, x: kept.update(h=x[0]))
    data = text()
    logits = module(**data.inputs).logits
    head, gamma, epsilon = module.score.weight, module.model.norm.weight, module.model.norm.variance_epsilon
    count, width = len(data), 16
    delta = torch.softmax(logits, dim=-1)
    delta[torch.arange(count), data.labels] -= 1
    expected, exact = torch.zeros(16, 24), torch.zeros(16, 24)
    for i in range(count):
        above, h, u = delta[i] / count @ head, kept["h"][i, -1], kept["u"][i, -1]
        v = h.square().mean() + epsilon
        expected += torch.outer(above * gamma * v**-0.5 * (1 - h * h / (v * width)), u)
        exact += torch.outer(v**-0.5 * (gamma * above - h * (gamma * above @ h) / (v * width)), u)
    reference = ReferenceModel(personal)
    diagonal = reference.gradient(data, plan_pb2.SKETCH_GRADIENT_DIAGONAL)
    torch.testing.assert_close(diagonal, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(reference.gradient(data), exact, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(diagonal, exact, rtol=1e-2)
    with pytest.raises(SketchError, match="one RMS norm after the layers, found 0"):
        ReferenceModel(PersonalModel(base_of(), 2, 4.0)).gradient(pictures(), plan_pb2.SKETCH_GRADIENT_DIAGONAL)


def test_rows_are_the_same_for_everybody_and_in_order() -> None:
    first = row_subset(20, 8, plan_pb2.SKETCH_ROWS_RANDOM, 5)
    assert torch.equal(first, row_subset(20, 8, plan_pb2.SKETCH_ROWS_RANDOM, 5))
    assert not torch.equal(first, row_subset(20, 8, plan_pb2.SKETCH_ROWS_RANDOM, 6))
    assert first.tolist() == sorted(set(first.tolist()))
    assert row_subset(20, 3, plan_pb2.SKETCH_ROWS_FIRST, 5).tolist() == [0, 1, 2]
    with pytest.raises(SketchError, match="unknown choice of rows 0"):
        row_subset(20, 3, plan_pb2.SKETCH_ROWS_UNSPECIFIED, 5)


def test_without_noise_a_sketch_is_rows_of_the_mean_gradient_and_deterministic() -> None:
    reference, data = ReferenceModel(PersonalModel(base_of(), 2, 4.0)), pictures()
    everything = step(batches=1, batch_size=len(data))
    sketch = take_sketch(reference, everything, data, None, 1, 2, QUIET)
    rows = row_subset(reference.weight.shape[0], 5, plan_pb2.SKETCH_ROWS_RANDOM, 2)
    torch.testing.assert_close(sketch.upload.vector.view(5, -1), reference.gradient(data)[rows], atol=1e-6, rtol=1e-4)
    again = take_sketch(reference, step(), data, None, 1, 2, QUIET)
    assert torch.equal(take_sketch(reference, step(), data, None, 1, 2, QUIET).upload.vector, again.upload.vector)
    assert again.examples == 6
    assert sketch.norm == pytest.approx(float(sketch.upload.vector.norm()))


def test_the_moving_average_starts_with_the_first_gradient_and_follows_its_recursion() -> None:
    reference, data = ReferenceModel(PersonalModel(base_of(), 2, 4.0)), pictures()
    means = [take_sketch(reference, step(), data, None, seed, 2, QUIET).state.vector for seed in (1, 2, 3)]
    state: Adapter | None = None
    expected = means[0]
    for round_, seed in enumerate((1, 2, 3)):
        state = take_sketch(reference, step(new_weight=0.25), data, state, seed, 2, QUIET).state
        expected = expected if round_ == 0 else 0.75 * expected + 0.25 * means[round_]
        torch.testing.assert_close(state.vector, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("on_gradients", [False, True])
def test_noise_goes_where_the_plan_says(on_gradients: bool) -> None:
    reference, data = ReferenceModel(PersonalModel(base_of(), 2, 4.0)), pictures()
    clean = take_sketch(reference, step(batches=4), data, None, 1, 2, QUIET)
    noisy = take_sketch(
        reference, step(batches=4, noise=0.5, noise_on_gradients=on_gradients), data, None, 1, 2, gaussian(0.5, b"k")
    )
    assert torch.equal(noisy.state.vector, clean.state.vector) is not on_gradients
    added = noisy.upload.vector - clean.upload.vector
    assert float(added.std()) == pytest.approx(0.5 / (2 if on_gradients else 1), rel=0.25)


def test_whoever_knows_the_plan_cannot_take_the_noise_away_and_the_client_can_answer_again() -> None:
    """The server knows seed, client, round and step; what it would draw from them is as far from the noise as any."""
    personal, data = PersonalModel(base_of(), 2, 4.0), ClientData("toy", "", {"train": pictures()})

    def sent(secret: bytes, noise: float) -> Tensor:
        asked = step(batches=4, noise=noise, encoding=encoding_to_proto(Encoding.FP32))
        steps = [plan_pb2.Step(sketch=asked)]
        plan = plan_pb2.Plan(version=1, run_name="run", client_id="ada", round=3, seed=7, steps=steps)
        slots: Any = Memory({})
        _, uploads = Interpreter("ada", personal, data, slots, secret=secret).run(plan, {})
        known = layout_of_sketch(ReferenceModel(personal).layout, asked.row_count)
        return decode(uploads["sketch"], layouts={known.digest: known}).vector

    clean, mine = sent(b"mine", 0.0), sent(b"mine", 50.0)
    assert torch.equal(sent(b"mine", 50.0), mine)
    assert not torch.equal(sent(b"other", 50.0), mine)
    guesses = [seed_of("sketch noise", seed_of(7, "ada", 3, 0)), seed_of(7, "ada", 3, 0), 7]
    for seed in guesses:
        drawn = 50.0 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed))
        assert float(torch.nn.functional.cosine_similarity(mine - drawn, clean, dim=0)) < 0.5


def test_what_cannot_be_sketched_is_refused() -> None:
    reference, data = ReferenceModel(PersonalModel(base_of(), 2, 4.0)), pictures()
    with pytest.raises(SketchError, match="99 of 16 rows"):
        take_sketch(reference, step(row_count=99), data, None, 1, 2, QUIET)
    wrong = Dataset(data.inputs, data.labels + CLASSES)
    with pytest.raises(SketchError, match=f"scores {CLASSES} classes, but this client has the label"):
        reference.gradient(wrong)


def test_a_batch_of_several_tasks_is_the_mean_over_its_examples_each_by_its_own_head() -> None:
    specs = [SPECS["digit"], SPECS["answer"]]
    reference = ReferenceModel(PersonalModel(flava_of(specs), 2, 4.0))
    train = data_of(specs, (9, 7)).splits["train"]
    assert isinstance(train, MixedDataset)
    whole = step(batches=1, batch_size=16, row_count=16, rows=plan_pb2.SKETCH_ROWS_FIRST)
    found = take_sketch(reference, whole, train, None, 1, 2, QUIET).upload.vector
    of_digits, of_answers = (reference.gradient(train.parts[name]) for name in ("digit", "answer"))
    torch.testing.assert_close(found.view(16, -1), (9 * of_digits + 7 * of_answers) / 16)
    assert of_digits.any()
    assert of_answers.any()
    assert reference.name.startswith("backbone.multimodal_model."), "the encoder that every task goes through"


def test_a_text_generator_is_sketched_by_its_targets_only() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, pad_token_id=0
    )
    torch.manual_seed(0)
    module: Any = LlamaForCausalLM(config).eval()
    targets = tuple(n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith("down_proj"))
    personal = PersonalModel(Base("llama", module, "f" * 64, targets, ()), 2, 4.0)
    tokens = text().inputs["input_ids"]
    labels = tokens.clone()
    labels[:, :3] = -100
    found = ReferenceModel(personal).gradient(Dataset(text().inputs, labels, "causal-lm"))
    weight = personal.module.get_submodule("model.layers.1.mlp.down_proj").weight
    assert isinstance(weight, nn.Parameter)
    weight.requires_grad_(True)
    logits = module(**text().inputs).logits
    loss = torch.stack(
        [-torch.log_softmax(logits[i, t], -1)[tokens[i, t + 1]] for i in range(6) for t in (2, 3)]
    ).mean()
    torch.testing.assert_close(found, torch.autograd.grad(loss, weight)[0], atol=1e-6, rtol=1e-4)


def test_a_quantised_reference_cannot_be_sketched() -> None:
    personal = PersonalModel(base_of(), 2, 4.0)
    name = ReferenceModel(personal).name
    layer = personal.module.get_submodule(name)
    layer.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.uint8), requires_grad=False)
    assert reference_layout(personal) is None
