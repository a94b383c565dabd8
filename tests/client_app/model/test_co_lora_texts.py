"""Gates that depend on the input, in models that read and write texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
)

from client_app.data.dataset import Base, Dataset
from client_app.model.co_lora import Gate, GateContext, GateError
from client_app.model.forward.padding import ALONE, LEFT, RIGHT
from client_app.model.personal import PersonalModel
from client_app.plan.training import batch_loss
from tests.client_app.model.co_lora_toys import llama, slots_of
from tests.fedalloy_adapters.samples import random_adapter


def text_model(family: type = LlamaForSequenceClassification, *, per_token: bool = False) -> PersonalModel:
    torch.manual_seed(0)
    module = llama(family=family).eval()
    targets = tuple(n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith("q_proj"))
    model = PersonalModel(Base("llama", module, "f" * 64, targets, ()), 3, 6.0, blocks=1)
    layout = model.gate_layout(looks_at_input=True, per_token=per_token)
    model.load("gates", random_adapter(layout, 3, scale=1.0))
    for name, adapter in slots_of(model).items():
        model.load(name, adapter)
    model.activate({"global": Gate("gates"), "local": Gate("gates", complement=True)})
    return model


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_does_not_change_an_input_dependent_gate(per_token: bool) -> None:
    model = text_model(per_token=per_token)
    tokens = torch.tensor([[5, 6, 7, 8]])
    alone = model.logits({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)], dim=1)
    other = torch.tensor([[9, 3, 4, 5, 9, 2, 1]])
    batch = {"input_ids": torch.cat([other, padded]), "attention_mask": torch.cat([torch.ones_like(other), mask])}
    torch.testing.assert_close(model.logits(batch)[1], alone[0], atol=1e-5, rtol=0)
    model._context.mask = torch.ones(1, 4)
    with pytest.raises(GateError, match=r"\(2, 7\) \(examples, tokens\), but the attention mask is \(1, 4\)"):
        model._context.weights("m", torch.zeros(2, 7, 16), torch.zeros(16))


def test_decoding_keeps_the_gates_of_the_prompt() -> None:
    """With a cache every further pass sees one token; the gate must not follow it."""
    model = text_model()
    prompt, further = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9]])
    first = model.module(input_ids=prompt, use_cache=True)
    kept = {name: value.clone() for name, value in model._context._kept.items()}
    assert kept
    cache = {
        name: value for name, value in first.items() if isinstance(value, Cache)
    }  # by this transformers' name for it
    assert len(cache) == 1
    model.module(input_ids=further, **cache, use_cache=True)
    assert all(torch.equal(model._context._kept[name], value) for name, value in kept.items())
    model.module(input_ids=further)
    assert not all(torch.equal(model._context._kept[name], value) for name, value in kept.items())


@pytest.mark.parametrize("name", ["past_key_values", "cache_params", "cache", None])
@pytest.mark.parametrize("attention", [True, False])
def test_a_pass_goes_on_with_a_text_when_a_cache_holds_tokens_whatever_the_argument_is_called(
    name: str | None, attention: bool
) -> None:
    class Model(nn.Module):
        def forward(self, tokens: Tensor, *others: Any, **named: Any) -> Tensor:
            return tokens

    def decoding(cache: Any) -> bool:
        if name is None:
            module(torch.zeros(1, 1), cache)
        else:
            module(torch.zeros(1, 1), **{name: cache})
        return context.decoding

    context, module = GateContext(), Model()
    context.attach(module)
    cache = DynamicCache() if attention else DynamicCache(config=MambaConfig(num_hidden_layers=1))
    assert not decoding(None)
    assert not decoding(cache)
    if attention:
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    else:
        cache.update_conv_state(torch.zeros(1, 4, 3), 0)
        cache.update_recurrent_state(torch.zeros(1, 4, 3), 0)
    assert decoding(cache)
    assert not decoding(None)


PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [3, 4, 5])


def written(model: PersonalModel, rows: Sequence[list[int]], *, use_cache: bool = True) -> list[list[int]]:
    """Five more tokens for each row."""
    module: Any = model.module
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    found: Tensor = module.generate(input_ids=tokens, attention_mask=mask, **options)
    answers: list[list[int]] = found[:, width:].tolist()
    return answers


def test_gates_by_token_are_the_same_whether_a_text_is_read_at_once_or_token_by_token() -> None:
    model = text_model(LlamaForCausalLM, per_token=True)
    together = written(model, PROMPTS)
    assert together == [written(model, [prompt])[0] for prompt in PROMPTS]
    assert together == written(model, PROMPTS, use_cache=False)
    model.load("gates", random_adapter(model.gate_layout(looks_at_input=True, per_token=True), 4, scale=30.0))
    assert together != written(model, PROMPTS)  # the gates decide something


def test_a_text_does_not_depend_on_the_other_prompts_and_goes_on_with_the_gates_of_its_own() -> None:
    model = text_model(LlamaForCausalLM)

    def by_prefix(row: list[int]) -> list[int]:
        """Without a cache: the gates of the prompt, as numbers, over the whole text so far."""
        model.logits({"input_ids": torch.tensor([row])})
        fixed = dict(model._context._kept)
        model._context.weights = lambda module, x, gate: fixed[module]  # type: ignore[method-assign]
        try:
            answer: list[int] = []
            for _ in range(5):
                answer.append(int(model.logits({"input_ids": torch.tensor([row + answer])})[0, -1].argmax()))
        finally:
            del model._context.weights
        return answer

    together = written(model, PROMPTS)
    assert together == [written(model, [prompt])[0] for prompt in PROMPTS]
    assert together == [by_prefix(prompt) for prompt in PROMPTS]
    model.activate({})
    assert together != written(model, PROMPTS)  # the adapters decide something


def texts(answers: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """:data:`PROMPTS` with these answers, padded on the right; the answers are the targets."""
    rows = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(tokens, -100)
    for number, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=True)):
        labels[number, len(prompt) : len(row)] = tokens[number, len(prompt) : len(row)]
    return {"input_ids": tokens, "attention_mask": mask}, labels


@pytest.mark.parametrize("padding", [RIGHT, LEFT, ALONE])
def test_gates_do_not_see_the_answer_that_the_loss_asks_for(padding: str) -> None:
    model = text_model(LlamaForCausalLM)
    model.base = replace(model.base, padding=padding)
    inputs, labels = texts([[3, 4], [5, 6, 7]])
    others, other_labels = texts([[3, 9], [5, 6, 2]])  # the same up to the last target, which decides no logit
    with torch.no_grad():
        found = model.target_logits(inputs, labels)
        torch.testing.assert_close(model.target_logits(others, other_labels), found)
        whole = model.logits(inputs)  # without targets the gates see everything
    assert float((whole[0, len(PROMPTS[0]) - 1] - found[0]).abs().max()) > 1e-4


@pytest.mark.parametrize("padding", [RIGHT, LEFT, ALONE])
def test_losses_are_those_of_the_model_that_writes(padding: str) -> None:
    model = text_model(LlamaForCausalLM)
    model.base = replace(model.base, padding=padding)
    answers = written(model, PROMPTS)
    inputs, labels = texts(answers)
    with torch.no_grad():
        best = model.target_logits(inputs, labels).argmax(dim=-1).reshape(2, 5)
        losses = model.at_targets(inputs, labels).losses()
    assert best.tolist() == answers
    expected = torch.nn.functional.cross_entropy(
        model.target_logits(inputs, labels), torch.tensor(answers).flatten(), reduction="none"
    )
    torch.testing.assert_close(losses, expected)


def test_a_text_that_is_all_targets_has_gates_of_its_first_token() -> None:
    model = text_model(LlamaForCausalLM)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found = model.target_logits({"input_ids": tokens}, tokens)
        changed = model.target_logits({"input_ids": torch.tensor([[5, 6, 7, 2]])}, tokens)
    torch.testing.assert_close(found, changed)


def test_texts_with_gates_for_the_whole_text_do_not_share_rows() -> None:
    model = text_model(LlamaForCausalLM)
    assert model.looks_at_whole_texts
    inputs, labels = texts([[3, 4], [5, 6, 7]])
    batch = Dataset(inputs, labels, "causal-lm")
    apart = float(batch_loss(model, batch))
    model.packing = True
    assert float(batch_loss(model, batch)) == apart
    assert not text_model(LlamaForCausalLM, per_token=True).looks_at_whole_texts
