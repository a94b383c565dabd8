"""Fisher information by batches against a loop of single examples, its sums, and the steps that use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from client_app.data.dataset import ClientData, Dataset
from client_app.kinds import example_losses
from client_app.model.personal import PersonalModel
from client_app.plan import example_gradients, fisher, seeds, training
from client_app.plan.fisher import FisherError, Moments
from client_app.plan.interpreter import Interpreter, PlanError
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import distance, precision_mean
from fedalloy_adapters.layout import Factor, LayoutError
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.own_clients import loaded, settings_of
from tests.fedalloy_adapters.samples import random_adapter
from tests.fedalloy_adapters.tiny_vit import CLASSES, base_of, images
from tests.toys import tiny_models, toy_data


def data_of(examples: int = 9, seed: int = 3) -> Dataset:
    labels = torch.randint(CLASSES, (examples,), generator=torch.Generator().manual_seed(seed))
    return Dataset({"pixel_values": images(examples)}, labels)


@pytest.fixture
def model() -> PersonalModel:
    found = PersonalModel(base_of(), 2, 4.0)
    for seed, slot in enumerate(("fed", "own")):
        found.load(slot, random_adapter(found.layout, seed, scale=0.3))
    return found


def one_by_one(model: PersonalModel, slot: str, data: Dataset) -> torch.Tensor:
    """Gradients by ordinary autograd, one example at a time, ``[n, P]``."""
    rows = []
    for index in range(len(data)):
        model.activate({slot: 1.0})
        parameters = model.trainable(slot, model.layout)
        one = data.batch(torch.tensor([index]))
        loss = functional.cross_entropy(model.logits(one.inputs), one.labels)
        found = torch.autograd.grad(loss, list(parameters.values()))
        rows.append(torch.cat([tensor.reshape(-1) for tensor in found]))
    return torch.stack(rows)


def test_per_example_gradients_are_those_of_single_examples(model: PersonalModel) -> None:
    data = data_of()
    model.module.eval()
    for slot in ("fed", "own"):
        expected = one_by_one(model, slot, data)
        found = fisher.example_gradients(model, slot, model.layout, data)
        assert found.shape == (9, model.layout.size)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)  # other kernels, in float32
        assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize("max_bytes", [1, 10**9])
def test_moments_do_not_depend_on_the_chunk_and_square_before_they_average(
    model: PersonalModel, max_bytes: int
) -> None:
    data = data_of()
    found = fisher.moments(model, ("fed", "own"), model.layout, data, samples=100, seed=1, max_bytes=max_bytes)
    assert (found.samples, found.dropped) == (9, 0)
    fed, own = one_by_one(model, "fed", data), one_by_one(model, "own", data)
    torch.testing.assert_close(found.first, fed.square().mean(0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.second, own.square().mean(0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found.product, (fed * own).mean(0), rtol=1e-3, atol=1e-7)
    assert float((found.first - fed.mean(0).square()).abs().max()) > 1e-3  # not the square of the mean


def test_an_untrained_slot_has_no_information_in_a_and_its_variance_is_finite(model: PersonalModel) -> None:
    model.load("new", Adapter.initial(model.layout, 5))
    found = fisher.moments(model, ("new", "own"), model.layout, data_of(), samples=9, seed=1, max_bytes=10**9)
    information = Adapter(model.layout, found.first)
    assert all(float(information[m, Factor.A].abs().max()) == 0 for m in model.layout.lora_modules)
    pair = (Adapter.initial(model.layout, 5), model.read("own"))
    damping = fisher.damping_of(found, 1.0)
    assert damping == pytest.approx(0.5 * float(found.first.double().mean() + found.second.double().mean()))
    assert fisher.damping_of(found, 0.1) == pytest.approx(0.1 * damping)
    for in_delta_space in (False, True):
        numbers = fisher.result(pair, found, damping, in_delta_space=in_delta_space)
        assert all(0 <= number < float("inf") for number in numbers.variance_first)
    undamped = fisher.result(pair, found, 0.0, in_delta_space=False)
    assert all(0 <= number < float("inf") for number in undamped.variance_first)
    # What one slot knows nothing of is left out of both: else that slot would look certain.
    nothing = Moments(torch.zeros(model.layout.size), torch.ones(model.layout.size), torch.zeros(1), 9, 0)
    blind = fisher.result(pair, nothing, 0.0, in_delta_space=False)
    assert set(blind.variance_first) == set(blind.variance_second) == {0.0}
    known = fisher.result(pair, nothing, 0.5, in_delta_space=False)
    assert sum(known.variance_first) / (sum(known.variance_first) + sum(known.variance_second)) > 0.5


def test_sums_by_module(model: PersonalModel) -> None:
    found = fisher.moments(model, ("fed", "own"), model.layout, data_of(), samples=9, seed=1, max_bytes=10**9)
    pair = (model.read("fed"), model.read("own"))
    damping = 0.01
    numbers = fisher.result(pair, found, damping, in_delta_space=False)
    fed, own = Adapter(model.layout, found.first), Adapter(model.layout, found.second)
    product = Adapter(model.layout, found.product)
    for index, module in enumerate(model.layout.modules):
        mine = [entry for entry in model.layout.entries if entry.module == module]

        def total(values: list[torch.Tensor]) -> float:
            return float(sum(value.double().sum() for value in values))

        f = [fed[e.module, e.factor].double() for e in mine]
        o = [own[e.module, e.factor].double() for e in mine]
        c = [product[e.module, e.factor].double() for e in mine]
        assert numbers.information_first[index] == pytest.approx(total(f))
        assert numbers.variance_second[index] == pytest.approx(total([1 / (x + damping) for x in o]))
        rho = [(z / (x * y).sqrt()).nan_to_num(0.0).clamp(0, 1) for x, y, z in zip(f, o, c, strict=True)]
        expected = [r / ((x + damping) * (y + damping)).sqrt() for r, x, y in zip(rho, f, o, strict=True)]
        assert numbers.covariance[index] == pytest.approx(total(expected), rel=1e-6)
        bound = (numbers.variance_first[index] * numbers.variance_second[index]) ** 0.5
        assert 0 <= numbers.covariance[index] <= bound * (1 + 1e-9)
        away = [(pair[0][e.module, e.factor] - pair[1][e.module, e.factor]).double().square() for e in mine]
        expected = [y * d for y, d in zip(o, away, strict=True)]
        assert numbers.information_distance[index] == pytest.approx(total(expected))
        assert numbers.effective_dimension[index] == pytest.approx(total([y / (y + damping) for y in o]))


def test_both_slots_are_weighed_with_their_own_delta(model: PersonalModel) -> None:
    found = fisher.moments(model, ("fed", "own"), model.layout, data_of(), samples=9, seed=1, max_bytes=10**9)
    pair = (model.read("fed"), model.read("own"))
    numbers = fisher.result(pair, found, 0.01, in_delta_space=True)
    for adapter, information, reported in (
        (pair[0], found.first, numbers.variance_first),
        (pair[1], found.second, numbers.variance_second),
    ):
        expected = fisher.module_sums(model.layout, fisher.delta_weights(adapter) / (information.double() + 0.01))
        assert list(reported) == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [1, 90, 10_000])
@pytest.mark.parametrize("flat", [False, True])
def test_fisher_of_texts_is_that_of_one_example_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, flat: bool
) -> None:
    """In passes of any size; ``flat``: a module reads rows of which nobody knows whose they are, so texts go alone."""
    monkeypatch.setattr(fisher, "MAX_TOKENS", tokens)
    rows = [{"prompt": "a" * n + ">", "completion": "b" * (1 + n % 3)} for n in range(1, 9)]
    llama = tiny_models.save_llama(tmp_path / "llama", chat=True)
    model, data = loaded(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, llama))
    model.load("local", random_adapter(model.layout, 0, scale=0.3))
    batch = data.splits["train"].batch(torch.arange(4))
    if flat:
        first = next(iter(model.trainable("local", model.layout).values()))
        linear = next(one for one in model.module.modules() if getattr(one, "weight", None) is first)
        shape: list[int] = []

        def flatten(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            shape[:] = inputs[0].shape[:-1]
            return inputs[0].flatten(0, 1)

        linear.register_forward_pre_hook(flatten)
        linear.register_forward_hook(lambda module, inputs, output: output.unflatten(0, shape))
    sizes: list[int] = []

    def counted(model: PersonalModel, batch: Dataset) -> torch.Tensor:
        sizes.append(len(batch))
        return training.each_loss(model, batch)

    monkeypatch.setattr(example_gradients, "each_loss", counted)
    found = fisher.example_gradients(model, "local", model.layout, batch)
    assert max(sizes) == min(4, max(1, tokens // batch.inputs["input_ids"].shape[1]))
    assert sizes[-1] == (1 if flat else max(sizes))
    assert found.shape == (4, model.layout.size)
    parameters = list(model.trainable("local", model.layout).values())
    for index in range(4):
        one = batch.batch(torch.tensor([index]))
        loss = example_losses("causal-lm", training.logits_of(model, one), one.labels).sum()
        alone = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, parameters)])
        assert float(alone.abs().max()) > 1e-3
        assert torch.allclose(found[index], alone, atol=1e-4)


def test_a_model_whose_layers_mix_examples_goes_example_by_example(model: PersonalModel) -> None:
    data = data_of(4)
    expected = fisher.example_gradients(model, "own", model.layout, data)

    def mix(module: nn.Module, arguments: tuple[object, ...], output: Any) -> None:
        if len(output.logits) > 1:
            output.logits = output.logits + output.logits.mean(dim=0)

    model.module.register_forward_hook(mix)
    found = fisher.example_gradients(model, "own", model.layout, data)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_trace_in_delta_space_is_the_variance_of_the_delta(model: PersonalModel) -> None:
    """Monte Carlo: numbers of A and B moved by small independent noise of the given variances."""
    adapter = random_adapter(model.layout, 3, scale=0.5)
    generator = torch.Generator().manual_seed(2)
    variance = torch.rand(model.layout.size, generator=generator).double() * 1e-6
    predicted = fisher.module_sums(model.layout, variance * fisher.delta_weights(adapter))
    draws = 400
    measured = 0.0
    exact = adapter.to(torch.float64)
    for _ in range(draws):
        noise = torch.randn(model.layout.size, generator=generator, dtype=torch.float64)
        measured += distance(Adapter(model.layout, exact.vector + variance.sqrt() * noise), exact) ** 2 / draws
    assert sum(predicted) == pytest.approx(measured, rel=0.05)


def test_the_trace_in_delta_space_does_not_depend_on_the_gauge(model: PersonalModel) -> None:
    adapter = random_adapter(model.layout, 3)
    turned = adapter.clone()
    factors = Adapter(model.layout, torch.ones(model.layout.size, dtype=torch.float64))
    for module in model.layout.lora_modules:
        turned[module, Factor.A].mul_(7)
        turned[module, Factor.B].div_(7)
        factors[module, Factor.A].fill_(49)
        factors[module, Factor.B].fill_(1 / 49)
    variance = torch.rand(model.layout.size, generator=torch.Generator().manual_seed(1)).double()
    before = fisher.module_sums(model.layout, variance * fisher.delta_weights(adapter))
    after = fisher.module_sums(model.layout, variance * factors.vector * fisher.delta_weights(turned))
    assert after == pytest.approx(before, rel=1e-5)
    assert sum(fisher.module_sums(model.layout, variance * factors.vector)) > 5 * sum(
        fisher.module_sums(model.layout, variance)
    )


def test_a_gradient_that_is_not_finite_is_left_out_and_too_many_are_an_error(model: PersonalModel) -> None:
    data = data_of(20)
    data.inputs["pixel_values"][4] = float("nan")
    found = fisher.moments(model, ("fed", "own"), model.layout, data, samples=20, seed=1, max_bytes=10**9)
    assert (found.samples, found.dropped) == (19, 1)
    assert bool(found.first.isfinite().all())
    data.inputs["pixel_values"][:5] = float("nan")
    with pytest.raises(FisherError, match="5 of 20 gradients are not finite, expected at most 10%"):
        fisher.moments(model, ("fed", "own"), model.layout, data, samples=20, seed=1, max_bytes=10**9)


def test_one_example_is_enough_and_none_is_an_error(model: PersonalModel) -> None:
    found = fisher.moments(model, ("fed", "own"), model.layout, data_of(1), samples=30, seed=1, max_bytes=10**9)
    assert found.samples == 1
    with pytest.raises(FisherError, match="30 samples of 0 examples"):
        fisher.moments(model, ("fed", "own"), model.layout, data_of(0), samples=30, seed=1, max_bytes=10**9)


# ---------------------------------------------------------------------------------------------------------- the steps


class Bench:
    """An interpreter on the tiny model with two slots, outside a run."""

    def __init__(self, folder: Path, examples: int = 9) -> None:
        self.model = PersonalModel(base_of(), 2, 4.0)
        self.data = ClientData("toy", "image-classification", {"train": data_of(examples)})
        self.store = SlotStore(folder, self.model.base.name, lambda: self.model.heads)
        self.first, self.second = (random_adapter(self.model.layout, seed, scale=0.3) for seed in (1, 2))

    def run(self, *plan: plan_pb2.Step, round_: int = 1) -> tuple[report_pb2.Report, SlotStore]:
        with self.store.transaction(round_) as slots:
            slots["first"], slots["second"] = self.first, self.second
            interpreter = Interpreter("ada", self.model, self.data, slots)
            message = plan_pb2.Plan(version=1, run_name="run", client_id="ada", round=round_, seed=3, steps=plan)
            return interpreter.run(message, {})[0], slots


def test_fisher_step_reports_one_number_per_module_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    step = steps.fisher("first", "second", split="train", samples=5, damping=1.0, keep=("p1", "p2"))
    merge = steps.merge("merged", steps.precision_mixture({"first": "p1", "second": "p2"}), space="factor")
    report, slots = bench.run(step, steps.distance("first", "second"), merge)
    found = report.results[0].fisher
    modules = bench.model.layout.modules
    for field in report_pb2.FisherResult.DESCRIPTOR.fields:
        if field.is_repeated and field.message_type is None:
            assert len(getattr(found, field.name)) == len(modules)
    assert found.samples == 5
    again = fisher.moments(
        bench.model, ("first", "second"), bench.model.layout, bench.data.splits["train"], samples=5,
        seed=seeds.seed_of(3, "ada", 1, 0), max_bytes=10**9,
    )  # fmt: skip
    torch.testing.assert_close(slots["p1"].vector, again.first + found.damping, rtol=1e-5, atol=0)
    torch.testing.assert_close(slots["p2"].vector, again.second + found.damping, rtol=1e-5, atol=0)
    assert found.ByteSize() < 8 * 7 * len(modules) + 60  # a few bytes per module, whatever the model's size
    assert sum(report.results[1].distance.squared) == pytest.approx(distance(bench.first, bench.second) ** 2)
    expected = precision_mean([bench.first, bench.second], [slots["p1"], slots["p2"]])
    assert torch.equal(slots["merged"].vector, expected.vector)
    weight = slots["p1"].vector / (slots["p1"].vector + slots["p2"].vector)  # per-parameter closed form with c = 0
    by_hand = weight * bench.first.vector + (1 - weight) * bench.second.vector
    torch.testing.assert_close(slots["merged"].vector, by_hand, rtol=1e-4, atol=1e-6)


def test_the_same_seed_draws_the_same_examples_and_another_round_others(tmp_path: Path) -> None:
    step = steps.fisher("first", "second", split="train", samples=3, damping=1.0)
    first, again, later = (
        Bench(tmp_path / name).run(step, round_=round_)[0].results[0].fisher
        for name, round_ in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again
    assert first != later


def test_folds_are_disjoint_and_together_the_whole_split(tmp_path: Path) -> None:
    bench = Bench(tmp_path, examples=7)
    with bench.store.transaction(1) as slots:
        workbench = Workbench(plan_pb2.Plan(seed=1, client_id="ada", round=1), bench.model, bench.data, slots)
        whole = bench.data.splits["train"]
        folds = [workbench.fold(whole, plan_pb2.Fold(index=index, count=2), "train") for index in (0, 1)]
    rows = [row.tolist() for fold in folds for row in fold.inputs["pixel_values"].flatten(1)]
    assert sorted(rows) == sorted(row.tolist() for row in whole.inputs["pixel_values"].flatten(1))
    assert [len(fold) for fold in folds] == [4, 3]


@pytest.mark.parametrize(
    ("step", "finding"),
    [
        (steps.fisher("first", "none", split="train", samples=5, damping=1.0), "no slot 'none'"),
        (steps.fisher("first", "second", split="nope", samples=5, damping=1.0), "no split 'nope'"),
        (steps.fisher("first", "second", split="train", samples=0, damping=1.0), "0 samples and damping 1"),
        (steps.fisher("first", "second", split="train", samples=5, damping=-1.0), "damping -1;"),
        (steps.fisher("../x", "second", split="train", samples=5, damping=1.0), "slot name '../x'"),
        (steps.distance("first", "none"), "no slot 'none'"),
        (
            steps.train(Training(), steps.mixture("first"), ["first"], fold=(2, 2)),
            "part 2 of 2 of 9 examples: there is no such part",
        ),
        (
            steps.train(Training(), steps.mixture("first"), ["first"], fold=(0, 10)),
            "part 0 of 10 of 9 examples: there is no such part",
        ),
        (
            steps.merge("m", steps.precision_mixture({"first": "second"}), space="delta"),
            "precisions merge in factor space only",
        ),
        (
            steps.merge("m", steps.precision_mixture({"first": "second"}), space="factor"),
            "expected no negative number",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused(tmp_path: Path, step: plan_pb2.Step, finding: str) -> None:
    with pytest.raises((PlanError, LayoutError), match=finding):
        Bench(tmp_path).run(step)
