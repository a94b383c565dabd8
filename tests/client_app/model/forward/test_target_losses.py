"""Losses from a few logits at a time: those of all logits at once, gradients too, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.dataset import MASK, Base
from client_app.data.targets import at_targets, mean_of, means_of, target_mask, token_losses
from client_app.kinds import example_losses, mean_loss
from client_app.model.forward.target_logits import TargetLogits
from client_app.model.forward.target_losses import AtTargetsWhole, TargetLosses
from client_app.model.personal import PersonalModel
from fedalloy_adapters.adapter import Adapter
from tests.client_app.model.forward.test_target_logits import CONFIGS, SIZES, Hidden, Twice, batch, built, head_rows
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data

TWO_AT_ONCE = 2 * 4 * 50


def frozen_head(name: str) -> Any:
    """All but the head is trained, and embeddings that are the head, too."""
    module = built(name).requires_grad_(True)
    module.get_output_embeddings().requires_grad_(False)
    return module


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_and_gradients_are_those_of_all_logits(name: str) -> None:
    ids, labels = batch()
    module = frozen_head(name)
    losses = TargetLosses(TargetLogits(module), TWO_AT_ONCE)
    losses(lambda: module(input_ids=ids).logits, labels)  # the first time it tries
    rows = head_rows(module)
    found = losses(lambda: module(input_ids=ids).logits, labels).losses()
    assert rows == [0, 2, 2, 1], losses.reason
    mean_of(found, labels).backward()
    plain = frozen_head(name)
    logits = plain(input_ids=ids).logits
    expected = mean_loss("causal-lm", logits, labels)
    expected.backward()
    torch.testing.assert_close(mean_of(found, labels), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means_of(found, labels), example_losses("causal-lm", logits, labels), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(module), gradients(plain), rtol=1e-4, atol=1e-6)
    assert not losses.reason


@pytest.mark.parametrize("save", [tiny_models.save_llava, tiny_models.save_gemma3])
def test_a_model_of_images_and_texts_has_one_logit_at_a_time(save: Callable[[Path], Path], tmp_path: Path) -> None:
    path = toy_data.write_captions(tmp_path / "data", 4, 0)
    model, data = loaded(settings_of(path, tmp_path, save(tmp_path / "base"), target_modules="q_proj"))
    batch = data.splits["train"].batch(torch.arange(2))
    inputs, parameters = model.inputs(batch.inputs), list(model.trainable("local", model.layout).values())
    model.target_losses.chunk_bytes = 1
    model.at_targets(inputs, batch.labels)  # the first time it tries
    rows = head_rows(model.module)
    found = model.at_targets(inputs, batch.labels).losses()
    assert rows == [0, *([1] * len(found))], model.target_losses.reason
    expected = token_losses(
        at_targets(model.logits(inputs), batch.labels), batch.labels[:, 1:][target_mask(batch.labels)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours, whole = (torch.autograd.grad(losses.sum(), parameters) for losses in (found, expected))
    assert max(float(gradient.abs().max()) for gradient in whole) > 1e-4
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_tokens_loss_is_weighed_as_its_gradient_is() -> None:
    ids, labels = batch()
    weights = torch.tensor([0.5, 2.0, 0.0])
    found = []
    for chunk in (TWO_AT_ONCE, None):
        module = frozen_head("llama")
        if chunk is None:
            each = example_losses("causal-lm", module(input_ids=ids).logits, labels)
        else:
            losses = TargetLosses(TargetLogits(module), chunk)
            forward: Callable[[], Tensor] = lambda module=module: module(input_ids=ids).logits  # type: ignore[misc]  # noqa: E731
            each = means_of(losses(forward, labels).losses(), labels)
        (each * weights).sum().backward()
        found.append(gradients(module))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_logits_of_some_targets_are_the_models() -> None:
    ids, labels = batch()
    module = built("gemma2, soft-capped")
    forward: Callable[[], Tensor] = lambda: module(input_ids=ids).logits  # noqa: E731
    with torch.no_grad():
        found = TargetLosses(TargetLogits(module), TWO_AT_ONCE)(forward, labels)
        whole = TargetLogits(module)(forward, labels)
        torch.testing.assert_close(found.logits(torch.tensor([0, 3])), whole[[0, 3]])
    assert torch.equal(found.tokens, torch.cat([ids[0, 3:6], ids[1, 7:]]))


def test_the_trial_draws_no_random_numbers_of_the_run() -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    ids, labels = batch()
    found = []
    for tried in (False, True):
        torch.manual_seed(0)
        module = transformers.GPT2LMHeadModel(config).train().requires_grad_(False)
        losses = TargetLosses(TargetLogits(module))
        forward: Callable[[], Tensor] = lambda module=module: module(input_ids=ids).logits  # type: ignore[misc]  # noqa: E731
        if tried:
            losses(forward, labels)
        torch.manual_seed(1)
        found.append(losses(forward, labels).losses())
    assert torch.equal(found[0], found[1])


class Between(transformers.LlamaForCausalLM):
    """Does something to hidden states between body and head."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden * 2))


class Across(transformers.LlamaForCausalLM):
    """What it does to logits depends on their neighbours."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits - logits.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "reason"), [(Between, "no module of the model gives what its head gets"), (Across, "differ")]
)
def test_what_cannot_be_had_from_parts_is_computed_whole(kind: type[Any], reason: str) -> None:
    ids, labels = batch()
    torch.manual_seed(0)
    module = kind(transformers.LlamaConfig(**SIZES)).eval().requires_grad_(False)
    losses = TargetLosses(TargetLogits(module), TWO_AT_ONCE)
    for _ in range(2):
        found = losses(lambda: module(input_ids=ids).logits, labels)
        assert isinstance(found, AtTargetsWhole)
        torch.testing.assert_close(
            found.losses(), TargetLosses(TargetLogits(module))(lambda: module(input_ids=ids).logits, labels).losses()
        )
    assert reason in losses.reason


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    ids, labels = batch()
    module = built("llama").requires_grad_(True)
    losses = TargetLosses(TargetLogits(module), TWO_AT_ONCE)
    mean_of(losses(lambda: module(input_ids=ids).logits, labels).losses(), labels).backward()
    assert module.lm_head.weight.grad is not None
    assert losses.reason == "the head is trained"


@pytest.mark.parametrize("kind", [Twice, Hidden])
def test_a_hidden_head_says_why(kind: type[Twice]) -> None:
    ids, labels = batch()
    module = kind().requires_grad_(False)
    losses = TargetLosses(TargetLogits(module), TWO_AT_ONCE)
    found = losses(lambda: module(ids), labels)
    expected = functional.cross_entropy(module(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(mean_of(found.losses(), labels), expected)
    assert losses.reason


def test_a_batch_without_targets_has_no_loss() -> None:
    ids, labels = batch()
    module = frozen_head("llama")
    labels = torch.full_like(labels, -100)
    losses = TargetLosses(TargetLogits(module), TWO_AT_ONCE)(lambda: module(input_ids=ids).logits, labels).losses()
    assert losses.shape == (0,)


def test_a_step_computes_each_slots_products_once() -> None:
    """Frozen slots beside a trained one: a product with A and one with B in each forward pass, and no more."""
    tokenizer = tiny_models.character_tokenizer()
    module = transformers.LlamaForCausalLM(tiny_models.llama_config(tokenizer, 32)).eval()
    targets = tuple(name for name, _ in module.named_modules() if name.endswith("q_proj"))
    model = PersonalModel(Base("llama", module, "0" * 64, targets, ()), 2, 4.0)
    for slot in ("trained", "frozen", "other"):
        model.load(slot, Adapter.initial(model.layout, 0))
    model.activate({"trained": 1.0, "frozen": 0.5, "other": 0.2})
    model.trainable("trained", model.layout)
    model.target_losses.chunk_bytes = 1  # one target at a time: the body still runs once
    ids = torch.arange(8).view(2, 4) + 3
    model.at_targets({"input_ids": ids, MASK: torch.ones_like(ids)}, ids)  # the first time it tries
    calls: list[str] = []
    for name, part in module.named_modules():
        if name.rsplit(".", 2)[-2:-1] and name.rsplit(".", 2)[-2] in ("lora_A", "lora_B"):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.at_targets({"input_ids": ids, MASK: torch.ones_like(ids)}, ids).losses().sum().backward()
    assert len(calls) == len(set(calls)) == 3 * 2 * len(targets)
