"""DP-SGD against naive loops, autograd and Opacus: what is clipped and spent, and that one example does not show."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from flwr.app import Context, RecordDict
from hypothesis import strategies as st
from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.guard.privacy import (
    Budget,
    Privacy,
    PrivacyError,
    Spending,
    epsilon_of,
    rate_of,
    require_private_steps,
    spending_of,
)
from client_app.model.personal import PersonalModel
from client_app.plan import example_gradients, private
from client_app.plan.example_gradients import ExampleGradients
from client_app.plan.private import PrivateTraining, clipped_sum
from client_app.plan.training import each_loss, train
from client_app.session import Executor
from client_app.settings import SettingsError, read_settings
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.fedalloy_adapters.tiny_vit import base_of, images
from tests.toys import tiny_models, toy_data

opacus = pytest.importorskip("opacus", reason="opacus (extra privacy) is not installed")

GIVEN = Privacy(epsilon=8.0, delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
TRAINING = Training(local_steps=2, batch_size=8, learning_rate=0.1, optimizer="sgd")


def settings_of(folder: Path, base: Path, rows: list[dict[str, Any]], **node: Any) -> Any:
    toy_data.write_jsonl(folder / "data.jsonl", rows)
    given = {"client-id": "ada", "data-path": str(folder / "data.jsonl"), "base-model": str(base)}
    given |= {"state-dir": str(folder / "state"), "split-fractions": "0.8,0.1,0.1"}
    given |= {"labels": "neg,pos"} if node else {}
    given |= {f"dp.{key.replace('_', '-')}": value for key, value in node.items()}
    return read_settings(Context(1, 7, given, RecordDict(), {"lora-r": 2}))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("bert") / "bert", toy_data.VOCABULARY)


@pytest.fixture(scope="module")
def kinds(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PersonalModel, Any]]:
    """A classifier of texts with its own head, a language model, and a model that looks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kinds")
    greetings = [
        {"prompt": f"{name} says:", "completion": "hello there"[: 5 + i]} for i, name in enumerate("abcdefghij")
    ]
    pictures = toy_data.write_pictures(folder / "pictures", 4, 0)
    images = [{"image": str(path), "label": path.parent.name} for path in sorted(pictures.rglob("*.png"))]
    found = {}
    for name, base, rows in (
        ("text-classification", bert, toy_data.opinions(20, 0)),
        ("causal-lm", tiny_models.save_llama(folder / "llama"), greetings),
        ("image-classification", tiny_models.save_vit(folder / "vit"), images),
    ):
        (folder / name).mkdir()
        found[name] = Executor()._load(settings_of(folder / name, base, rows))
    return found


def trained(model: PersonalModel) -> list[torch.nn.Parameter]:
    """Two slots in a mixture, both trained, away from zero."""
    for number, slot in enumerate(("a", "b")):
        numbers = 0.1 * torch.randn(model.whole_layout.size, generator=torch.Generator().manual_seed(number))
        model.load(slot, Adapter(model.whole_layout, numbers))
    model.activate({"a": 0.7, "b": 0.4})
    found = [p for slot in ("a", "b") for p in model.trainable(slot, model.layout).values()]
    return found + (list(model.trainable("a", model.own_layout).values()) if model.own_layout else [])


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm", "image-classification"])
def test_clipped_sums_of_gradients_equal_a_naive_loop(kind: str, kinds: dict[str, tuple[PersonalModel, Any]]) -> None:
    model, data = kinds[kind]
    parameters = trained(model)
    model.module.eval()
    chosen, split = torch.tensor([0, 3, 4, 5, 7]), data.splits["train"]
    wanted: list[Tensor] = [torch.zeros_like(p) for p in parameters]
    norms = []
    for index in chosen.tolist():
        loss = each_loss(model, split.batch(torch.tensor([index]))).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        each = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        norms.append(float(torch.cat([g.flatten() for g in each]).norm()))
        for total, g in zip(wanted, each, strict=True):
            total += g * min(1.0, 0.5 * max(norms[:1]) / norms[-1])
    gradients = ExampleGradients(model, parameters)
    sums = clipped_sum(gradients, split, chosen, 0.5 * norms[0])
    assert gradients.together  # from what linear layers read, not one by one
    assert max(norms) > 0.5 * norms[0]
    for parameter, total in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(sums[parameter], total, rtol=1e-3, atol=1e-5)
    model.unload_all()


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm", "image-classification"])
@hypothesis.settings(max_examples=12)
@hypothesis.given(drawn=st.data())
def test_one_example_more_moves_a_clipped_sum_by_no_more_than_the_bound(
    kind: str, kinds: dict[str, tuple[PersonalModel, Any]], drawn: st.DataObject
) -> None:
    """Whichever examples were drawn beside it, and however long its gradient is."""
    model, data = kinds[kind]
    parameters, split = trained(model), data.splits["train"]
    model.module.eval()
    numbers = st.lists(st.integers(0, len(split) - 1), min_size=1, max_size=5, unique=True)
    chosen, bound = drawn.draw(numbers), drawn.draw(st.sampled_from([1e-3, 0.1, 10.0]))
    with pytest.MonkeyPatch.context() as patch:
        scale = drawn.draw(st.sampled_from([1.0, 1e12, 1e30]))  # the last one overflows
        patch.setattr(example_gradients, "each_loss", lambda model, batch: each_loss(model, batch) * scale)
        gradients = ExampleGradients(model, parameters)
        with_it, without = (
            clipped_sum(gradients, split, torch.tensor(found, dtype=torch.long), bound)
            for found in (chosen, chosen[:-1])
        )
    moved = torch.stack([(with_it[p] - without[p]).double().square().sum() for p in parameters]).sum().sqrt()
    assert float(moved) <= bound * 1.001
    model.unload_all()


def test_where_layers_cannot_be_told_apart_examples_go_alone(
    kinds: dict[str, tuple[PersonalModel, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = kinds["text-classification"]
    parameters = trained(model)
    model.module.eval()
    split, chosen = data.splits["train"], torch.arange(4)
    right = clipped_sum(ExampleGradients(model, parameters), split, chosen, 0.1)
    monkeypatch.setattr(
        example_gradients, "each_loss", lambda model, batch: each_loss(model, batch) * len(batch)
    )  # a company
    gradients = ExampleGradients(model, parameters)
    found = clipped_sum(gradients, split, chosen, 0.1)
    assert not gradients.together
    for parameter in parameters:
        torch.testing.assert_close(found[parameter], right[parameter], rtol=1e-3, atol=1e-5)
    model.unload_all()


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_epsilon_is_opacus_own(accountant: str) -> None:
    counter = opacus.accountants.create_accountant(accountant)
    for noise, rate, count in ((1.1, 0.05, 40), (0.9, 0.1, 10)):
        for _ in range(count):
            counter.step(noise_multiplier=noise, sample_rate=rate)
    ours = epsilon_of([Spending(1.1, 0.05, 40), Spending(0.9, 0.1, 10)], 1e-5, accountant)
    assert ours == pytest.approx(counter.get_epsilon(1e-5), rel=1e-9)


def train_plan(round_: int = 1, run: str = "run", batch: int = 8, count: int = 2) -> plan_pb2.Plan:
    training = Training(local_steps=count, batch_size=batch, learning_rate=0.1, optimizer="sgd")
    mix = steps.mixture("global")
    made = [
        steps.initialise("global", 1),
        steps.train(training, mix, ["global"]),
        steps.evaluate(training, mix),
        steps.send(training, "global", relative_to_received=False),
    ]
    return plan_pb2.Plan(version=1, run_name=run, client_id="ada", round=round_, steps=made, run_key=b"k")


def test_what_leaves_has_no_loss_and_no_score_and_says_what_was_spent(bert: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, bert, toy_data.opinions(40, 0), epsilon=8.0, delta=1e-3, noise_multiplier=2.0)
    registration = Executor().register(settings)
    assert registration.privacy.budget == 8.0
    assert not registration.tasks[0].notes
    report, uploads = Executor().carry_out(settings, train_plan(), {})
    result = report.results[1].train
    assert (result.withheld, result.mean_loss, result.task_losses, result.examples) == (True, 0.0, {}, 16)
    assert report.results[2].evaluate.withheld
    assert not report.results[2].evaluate.metrics
    expected = epsilon_of([Spending(2.0, 8 / 32, 2)], 1e-3)
    assert report.privacy.epsilon == pytest.approx(expected)
    assert "each training example" in report.privacy.covers
    assert set(uploads) == {"global"}
    telling = settings_of(tmp_path, bert, toy_data.opinions(40, 0), epsilon=8.0, delta=1e-3, metrics="held-out")
    again, _ = Executor().carry_out(telling, train_plan(2), {})
    assert again.results[2].evaluate.metrics["loss"] > 0
    assert again.privacy.epsilon > report.privacy.epsilon


def test_the_budget_outlives_runs_and_kills_and_is_not_exceeded(bert: Path, tmp_path: Path) -> None:
    rows = toy_data.opinions(40, 0)
    settings = settings_of(tmp_path, bert, rows, epsilon=3.0, delta=1e-3, noise_multiplier=2.0)

    def killed(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateTraining, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            Executor().carry_out(settings, train_plan(), {})
    paths = list((tmp_path / "state" / "privacy").glob("*.json"))
    assert len(paths) == 1
    budget = Budget(settings.state_dir, settings.privacy, str(tmp_path / "data.jsonl"))
    assert budget.spent == pytest.approx(epsilon_of([Spending(2.0, 0.25, 2)], 1e-3))
    report, _ = Executor().carry_out(settings, train_plan(run="another"), {})
    assert report.privacy.epsilon == pytest.approx(epsilon_of([Spending(2.0, 0.25, 4)], 1e-3))
    with pytest.raises(PrivacyError, match=r"is exhausted: epsilon would be .* and dp\.epsilon is 3"):
        Executor().carry_out(settings, train_plan(2, run="another", count=60), {})
    assert budget.spent == pytest.approx(report.privacy.epsilon)  # what was refused is not spent
    paths[0].write_bytes(paths[0].read_bytes().replace(b"0.25", b"0.05"))
    with pytest.raises(PrivacyError, match="is damaged"):
        Executor().carry_out(settings, train_plan(2, run="another"), {})


NOT_PRIVATE: dict[str, plan_pb2.Step] = {
    "fisher": steps.fisher("global", "global", split="train", samples=9, damping=0.1),
    "gram": steps.gram(TRAINING, "gram", steps.mixture("global")),
    "sketch": steps.sketch(TRAINING, "s", batches=1, rows=1),
    "select": steps.select("global", ["global"], "best", split="train"),
    "distill": steps.distill(steps.train(TRAINING, steps.mixture("x"), ["x"]), steps.mixture("global"), {}),
}


@pytest.mark.parametrize("kind", NOT_PRIVATE)
def test_steps_that_are_not_private_are_refused_by_name_before_anything_is_spent(
    kind: str, bert: Path, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, bert, toy_data.opinions(40, 0), epsilon=3.0, delta=1e-3)
    plan = train_plan()
    plan.steps.append(NOT_PRIVATE[kind])
    with pytest.raises(PrivacyError, match=rf"refuses step 4 \({kind}\): differential privacy .* allows only"):
        Executor().carry_out(settings, plan, {})
    assert not (tmp_path / "state" / "privacy").exists()


@pytest.mark.parametrize("field", ["sharpness-aware", "attributed-to"])
def test_training_that_looks_twice_or_weighs_by_losses_is_refused(field: str) -> None:
    plan = train_plan()
    require_private_steps(plan)
    more = {"sharpness_radius": 0.05} if field == "sharpness-aware" else {"attributed_to": "x"}
    plan.steps.append(steps.train(TRAINING, steps.mixture("x"), ["x"], **more))  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=rf"refuses step 4 \(train\): {field} is not private"):
        require_private_steps(plan)


def test_slots_from_before_are_not_sent_as_if_they_were_private(bert: Path, tmp_path: Path) -> None:
    rows = toy_data.opinions(40, 0)
    Executor().carry_out(settings_of(tmp_path, bert, rows), train_plan(), {})
    settings = settings_of(tmp_path, bert, rows, epsilon=3.0, delta=1e-3)
    with pytest.raises(PrivacyError, match="slots of this run from before"):
        Executor().carry_out(settings, train_plan(2), {})


@pytest.mark.parametrize("place", [0, 5, 17])
def test_one_swapped_example_moves_an_upload_by_no_more_than_two_clipped_gradients(
    place: int, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same examples drawn and the same noise, which nobody outside has; plain SGD, so a step is a gradient."""
    monkeypatch.setattr(private.os, "urandom", lambda count: b"r" * count)
    found = []
    rows = toy_data.opinions(40, 0)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        if name == "after":
            other = "pos" if rows[place]["label"] == "neg" else "neg"
            rows[place] = rows[place] | {"label": other}
        settings = settings_of(tmp_path / name, bert, rows, epsilon=50.0, delta=1e-3, max_grad_norm=0.01)
        report, _ = Executor().carry_out(settings, train_plan(batch=32, count=1), {})
        for result in report.results:
            result.seconds = 0
            if result.HasField("train"):
                result.train.seconds = 0
            result.send.ClearField("content_digest")
        store = settings.run_directory("run") / "slots" / "global" / "exact.safetensors"
        from safetensors.torch import load_file

        found.append((load_file(store)["vector"], [r.SerializeToString() for r in report.results]))
    (before, said_before), (after, said_after) = found
    moved = float((before.double() - after.double()).norm())
    assert moved <= 0.1 * 2 * 0.01 / 32 * 1.001  # rate x 2 C / expected batch
    assert said_before == said_after


def test_an_owner_who_sets_epsilon_sets_the_rest(bert: Path, tmp_path: Path) -> None:
    for wrong in ({"epsilon": 3.0}, {"epsilon": 3.0, "delta": 2.0}, {"epsilon": -1.0}, {"accountant": "mine"}):
        with warnings.catch_warnings(), pytest.raises(SettingsError, match=r"dp\."):
            settings_of(tmp_path, bert, toy_data.opinions(8, 0), **wrong)
    assert rate_of(8, 4) == 1.0
    assert spending_of(train_plan(), GIVEN, lambda split: 0) == []


def test_classes_are_named_because_a_single_example_could_add_one(bert: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, bert, toy_data.opinions(40, 0), epsilon=3.0, delta=1e-3)
    found = replace(settings, model=replace(settings.model, labels=""))
    with pytest.raises(PrivacyError, match="classes that are found in the examples"):
        Executor().register(found)
    assert not (tmp_path / "state" / "records").exists()
    Executor().register(replace(found, privacy=Privacy()))


def surprise(correct: int, guesses: int, chance: float) -> float:
    """Probability of so many correct guesses or more, each correct with this chance."""
    return sum(math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(correct, guesses + 1))


def test_canaries_are_found_without_privacy_and_at_chance_with_it() -> None:
    """Images of noise with random labels: what a model knows of a label, it has from that example alone.

    Each canary has one of two labels by a fair coin, and the guess is the one whose loss has fallen more. If training
    is epsilon-private by adding or removing an example, it is 2 epsilon-private by exchanging one, and of n guesses no
    more are correct than of n coins that fall right with probability e^(2 epsilon) / (1 + e^(2 epsilon)) (Steinke et
    al., "Privacy Auditing with One (1) Training Run", 2023; delta adds about n delta to the probability).
    """
    torch.set_num_threads(1)
    epsilon, size, runs = 0.25, 40, 2
    noise = opacus.accountants.utils.get_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-6, sample_rate=1.0, steps=80, accountant="rdp"
    )
    given = Privacy(epsilon=epsilon, delta=1e-6, max_grad_norm=1.0, noise_multiplier=noise)
    training = Training(local_steps=80, batch_size=size, learning_rate=0.02)
    step = steps.train(training, steps.mixture("a"), ["a"]).train
    model, counter = PersonalModel(base_of(), 4, 8.0), itertools.count()

    def losses(pictures: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return each_loss(model, Dataset({"pixel_values": pictures}, labels).batch(torch.arange(size)))

    def correct(run: int, *, private: bool) -> int:
        draw = torch.Generator().manual_seed(run)
        pictures, coins = images(size, seed=5 + run), torch.randint(0, 2, (size,), generator=draw)
        first = torch.randint(0, 3, (size,), generator=draw)
        second = (first + torch.randint(1, 3, (size,), generator=draw)) % 3
        members = Dataset({"pixel_values": pictures}, torch.where(coins == 0, first, second))
        model.load("a", model.initial(0))
        model.activate({"a": 1.0})
        parameters, before = model.trainable("a", model.layout), [losses(pictures, y) for y in (first, second)]
        if private:
            train_privately = PrivateTraining(given, lambda: bytes([run, next(counter)]) * 16).train
            train_privately(model, step, parameters, members)
        else:
            train(model, step, parameters, members, 0)
        fell = [start - losses(pictures, y) for start, y in zip(before, (first, second), strict=True)]
        return int(((fell[1] > fell[0]).long() == coins).sum())

    found = {private: sum(correct(run, private=private) for run in range(runs)) for private in (False, True)}
    model.unload_all()
    allowed = math.exp(2 * epsilon) / (1 + math.exp(2 * epsilon))
    assert surprise(found[False], runs * size, allowed) < 1e-6, found  # no training that keeps epsilon does this
    assert surprise(max(found[True], runs * size - found[True]), runs * size, 0.5) > 1e-3, found  # as coins do
