"""Packed texts have the losses and gradients of texts in rows of their own; models that mix them are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from client_app import session
from client_app.data.dataset import MASK, Dataset
from client_app.model.forward.packing import packed, rows_of
from client_app.plan.training import batch_loss
from client_app.settings import Settings, SettingsError
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_every_text_is_in_one_row_and_fits(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    assert all(sum(lengths[text] for text in row) <= max(lengths) for row in rows)


def llama(tmp_path: Path, **more: Any) -> Settings:
    tokenizer = tiny_models.character_tokenizer()
    config = tiny_models.llama_config(tokenizer, 32)
    base = tiny_models.save_model(tmp_path / "llama", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    rows = [{"prompt": "a" * n + "?", "completion": "yes" * (n % 3 + 1)} for n in (1, 20, 5, 9, 2, 14, 3, 7)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    return settings_of(path, tmp_path, base, **more)


def test_loss_and_gradients_are_those_of_rows_of_their_own(tmp_path: Path) -> None:
    model, data = loaded(llama(tmp_path))
    train = data.splits["train"]
    batch = train.batch(torch.arange(len(train)))
    small = packed(batch)
    assert len(small) < len(batch)
    assert small.inputs["input_ids"].numel() < batch.inputs["input_ids"].numel()
    found = []
    for model.packing in (False, True):
        parameters = model.trainable("local", model.layout)
        loss = batch_loss(model, batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found.append(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)]))
    assert float(found[0].abs().max()) > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_model_that_mixes_texts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = llama(tmp_path, packing=True)
    model, data = session._load(settings)
    assert model.packing
    mixes: Any = model.module.forward

    def blind(input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **others: Any) -> Any:
        return mixes(input_ids=input_ids, attention_mask=attention_mask, **others)

    monkeypatch.setitem(model.module.__dict__, "forward", blind)
    with pytest.raises(SettingsError, match="does not keep packed texts apart"):
        session._pack(model, data)
    monkeypatch.setitem(model.module.__dict__, "forward", lambda input_ids=None: None)
    with pytest.raises(SettingsError, match="takes no position ids"):
        session._pack(model, data)
    with pytest.raises(SettingsError, match="the task is text-classification"):
        session._pack(model, replace(data, kind="text-classification"))


def test_filling_is_a_text_of_its_own() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    ids = torch.arange(10, 25).view(3, 5)
    found = packed(Dataset({"input_ids": ids * mask, MASK: mask}, ids.masked_fill(mask == 0, -100), "causal-lm"))
    assert found.inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 20, 21]]
    assert found.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert found.labels.tolist() == [[-100, 11, 12, 13, 14], [-100, 16, 17, -100, 21]]
