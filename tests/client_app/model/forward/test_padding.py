"""A text gets the same answer alone and in a batch, with any padding token, in every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

from client_app.model.forward.padding import ALONE, LEFT, RIGHT, arranged
from client_app.plan import evaluation, training
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {"vocab_size": 104, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 104},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128},
}
CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: transformers.LlamaConfig(**SIZE, **WORDS, num_key_value_heads=2), RIGHT),
    "gpt2": (
        lambda: transformers.GPT2Config(vocab_size=104, n_positions=128, n_embd=32, n_layer=2, n_head=2),
        RIGHT,
    ),
    "bert": (lambda: transformers.BertConfig(**SIZE, **WORDS), RIGHT),
    "roberta": (lambda: transformers.RobertaConfig(**SIZE, **WORDS), RIGHT),
    "bart": (
        lambda: transformers.BartConfig(
            **SEQ2SEQ, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2
        ),
        RIGHT,
    ),
    "t5": (
        lambda: transformers.T5Config(
            vocab_size=104, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2,
            decoder_start_token_id=0,
        ),
        RIGHT,
    ),
    "xlnet": (
        lambda: transformers.XLNetConfig(vocab_size=104, d_model=32, n_layer=2, n_head=2, d_inner=64),
        LEFT,
    ),
    "fnet": (lambda: transformers.FNetConfig(**SIZE, vocab_size=104, max_position_embeddings=128), ALONE),
}  # fmt: skip
TARGETS = {"fnet": "all-linear", "xlnet": "all-linear"}


def saved(folder: Path, architecture: str, pad: int | None, config_pad: int | None) -> Path:
    """A model without a head; ``pad`` is the tokenizer's padding token, ``config_pad`` what the configuration says."""
    tokenizer = tiny_models.character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
    config = CONFIGS[architecture][0]()
    config.initializer_range = 0.2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModel.from_config(config)
    model.config.pad_token_id = config_pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def largest_difference(folder: Path, base: Path, architecture: str, split: str = "train") -> tuple[float, str]:
    """Of the logits of texts alone and together; and where padding is put.

    Another split than ``train`` has texts of other lengths than it, where all texts have one length.
    """
    rows: list[dict[str, str]] = [{"text": "x" * n + " y", "label": str(n % 2)} for n in range(1, 12)]
    if split != "train":
        rows = [{**row, "split": split} for row in rows]
        rows += [{"text": "xyxy" + "xy"[n % 2], "label": str(n % 2), "split": "train"} for n in range(8)]
    path = toy_data.write_jsonl(folder / "x.jsonl", rows)
    told = {"split_column": "split"} if split != "train" else {}
    settings = settings_of(path, folder, base, told, labels="0,1", target_modules=TARGETS.get(architecture, ""))
    model, data = loaded(settings)
    train = data.splits[split]
    with torch.no_grad():
        together = training.logits_of(model, train.batch(torch.arange(len(train))))
        alone = torch.cat([training.logits_of(model, train.batch(torch.tensor([i]))) for i in range(len(train))])
    assert float(alone.std()) > 1e-4
    return float((together - alone).abs().max()), model.base.padding


@pytest.mark.parametrize("architecture", CONFIGS)
def test_texts_get_the_same_answer_alone_and_together(architecture: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture, 0, 0)
    difference, padding = largest_difference(tmp_path, base, architecture)
    assert difference < 1e-4
    assert padding == CONFIGS[architecture][1]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize(("pad", "config_pad"), [(None, None), (None, 0), (None, -1), (2, 0), (2, None), (7, 3)])
def test_any_padding_token_will_do(architecture: str, pad: int | None, config_pad: int | None, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture, pad, config_pad if architecture != "roberta" else 0)
    assert largest_difference(tmp_path, base, architecture)[0] < 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "bart", "xlnet", "fnet"])
def test_training_texts_of_one_length_do_not_hide_what_others_need(architecture: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", architecture, 0, 0)
    difference, padding = largest_difference(tmp_path, base, architecture, "test")
    assert difference < 1e-4
    assert padding == CONFIGS[architecture][1]


def test_padding_before_a_text_keeps_its_order() -> None:
    inputs = {
        "input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "pixel_values": torch.zeros(2, 3, 4),
    }
    found = arranged(inputs, LEFT)
    assert found["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert found["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert arranged(inputs, RIGHT) is inputs


def test_texts_that_spell_special_tokens_are_texts(tmp_path: Path) -> None:
    """BART and T5 refuse a batch whose texts do not have equally many end tokens."""
    base = saved(tmp_path / "base", "bart", 0, 0)
    rows = [{"text": ("a </s> b", "a <pad>", "a")[n % 3] + "x" * n, "label": str(n % 2)} for n in range(12)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    model, data = loaded(settings_of(path, tmp_path, base, labels="0,1"))
    assert evaluation.evaluate(model, data.splits["train"], data)["loss"] > 0
    assert int((data.splits["train"].inputs["input_ids"] == 2).sum(dim=1).max()) == 1
    assert any("spell special tokens" in note for note in data.notes)
