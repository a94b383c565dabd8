"""A text gets the same answer alone and in any batch: kinds of tasks over architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.data.dataset import ClientData
from client_app.kinds import kind_of
from client_app.model.bases.model_folders import BaseModelError
from client_app.model.personal import PersonalModel
from client_app.own.files import load_own
from client_app.plan import training
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
T: Any = transformers
BODIES: dict[str, Callable[[int], Any]] = {
    "roberta": lambda v: T.RobertaModel(T.RobertaConfig(vocab_size=v, pad_token_id=0, **SIZES)),
    "deberta": lambda v: T.DebertaV2Model(
        T.DebertaV2Config(
            vocab_size=v, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, **SIZES
        )
    ),
    "xlnet": lambda v: T.XLNetModel(
        T.XLNetConfig(vocab_size=v, d_model=32, n_layer=2, n_head=2, d_inner=64, initializer_range=0.2)
    ),
    "fnet": lambda v: T.FNetModel(T.FNetConfig(vocab_size=v, **{k: n for k, n in SIZES.items() if "heads" not in k})),
    "t5": lambda v: T.T5Model(
        T.T5Config(
            vocab_size=v,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
            decoder_start_token_id=0,
        )
    ),
    "mistral": lambda v: T.MistralModel(T.MistralConfig(vocab_size=v, num_key_value_heads=1, **SIZES)),
}


KINDS_TRIED = ("token-classification", "question-answering", "multi-label-classification")


def rows_of(kind: str, texts: list[list[str]]) -> list[dict[str, Any]]:
    """These texts as rows of a kind; every second word is tagged, and is the answer."""
    found: list[dict[str, Any]] = []
    for number, words in enumerate(texts):
        text = " ".join(words)
        found.append(
            {
                "token-classification": {"tokens": words, "ner_tags": [("O", "B-X")[i % 2] for i in range(len(words))]},
                "question-answering": {"question": "good", "context": text, "answers": {"text": [words[-1]]}},
                "multi-label-classification": {"text": text, "label": ["a", "b"][: number % 3]},
            }[kind]
        )
        if kind == "question-answering":
            found[-1]["answers"]["answer_start"] = [len(text) - len(words[-1])]
    return found


@pytest.mark.parametrize("kind", KINDS_TRIED)
@pytest.mark.parametrize("body", BODIES)
def test_an_answer_is_the_same_alone_and_in_any_company(body: str, kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_models.word_tokenizer(toy_data.VOCABULARY)
    base = tiny_models.save_model(tmp_path / "base", lambda: BODIES[body](len(tokenizer)), tokenizer)
    texts = [list(toy_data.VOCABULARY[: 1 + n % 6]) for n in range(12)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows_of(kind, texts))
    wanted = settings_of(path, tmp_path / "state", base, {"split_fractions": "1,0,0"}, target_modules="all-linear")
    model, data = loaded(wanted)

    @settings(max_examples=5, deadline=None)
    @given(st.lists(st.integers(0, 11), min_size=2, max_size=4))
    def same(positions: list[int]) -> None:
        _compare(model, data, positions)

    same()


def _compare(model: PersonalModel, data: ClientData, positions: list[int]) -> None:
    train, kind = data.splits["train"], kind_of(data.kind)
    with torch.no_grad():
        together = training.logits_of(model, train.batch(torch.tensor(positions)))
        for row, position in enumerate(positions):
            one = train.batch(torch.tensor([position]))
            alone = training.logits_of(model, one)[0]
            found = together[row]
            if kind.per_token:  # tokens are the first axis of tags, the last of places of answers
                length = int(one.inputs["attention_mask"].sum())
                found, alone = (part[:, :length] if kind.own_inputs else part[:length] for part in (found, alone))
            assert torch.allclose(found, alone, atol=1e-4)


def test_a_model_that_cannot_answer_is_refused_before_the_first_round(tmp_path: Path) -> None:
    """T5 has no embedding of a text without a decoder's input."""
    tokenizer = tiny_models.word_tokenizer(toy_data.VOCABULARY)
    base = tiny_models.save_model(tmp_path / "base", lambda: BODIES["t5"](len(tokenizer)), tokenizer)
    rows = [{"anchor": f"good {noun}", "positive": f"bad {noun}"} for noun in toy_data.NOUNS]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(BaseModelError, match="does not answer as the task 'sentence-pairs' needs it"):
        load_own(settings_of(path, tmp_path / "state", base, target_modules="all-linear"))
