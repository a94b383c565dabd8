"""Answers in a context: where they are, what counts as right, and what is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.data.targets import IGNORED
from client_app.kinds.question_answering import best_spans, word_f1
from client_app.own.files import load_own, read_own
from client_app.own.reading.text_files import DataError
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

CONTEXT = "good film bad plot"


def asked(text: list[str], start: list[int]) -> dict[str, Any]:
    return {"question": "bad", "context": CONTEXT, "answers": {"text": text, "answer_start": start}}


def test_an_answer_is_the_tokens_that_it_touches(tmp_path: Path) -> None:
    rows = [asked(["bad plot", "plot"], [10, 14]), asked([], []), asked(["film"], [5])] * 2
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    _, data = load_own(settings_of(path, tmp_path, base, {"split_fractions": "1,0,0"}))
    train = data.splits["train"]
    nothing = [IGNORED, IGNORED]
    assert train.labels[:3].tolist() == [[[5, 6], [6, 6]], [[0, 0], nothing], [[4, 4], nothing]]
    assert data.decode is not None
    assert data.decode(train.inputs["input_ids"][0, 5:7]) == "bad plot"
    assert train.inputs["in_context"][0].tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    _, cut = load_own(settings_of(path, tmp_path, base, {"split_fractions": "1,0,0"}, max_length=6))
    assert cut.splits["train"].labels[0, 0].tolist() == nothing
    assert any("answers lie beyond the part of their context that is read" in note for note in cut.notes)
    assert any(note.startswith("6 of 6 texts were cut") for note in cut.notes)


def test_an_answer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", [asked(["film"], [5])] * 3 + [asked(["film"], [4])])
    with pytest.raises(
        DataError, match=r"line 4, column 'answers': answer 'film' is not in the context at 4, found ' fil'"
    ):
        read_own(settings_of(path, tmp_path))


def test_the_best_span_is_in_the_context_in_order_and_not_too_long() -> None:
    outputs = torch.zeros(1, 2, 40)
    inside = torch.ones(1, 40).long()
    inside[0, 0] = inside[0, 39] = 0
    outputs[0, 0, 30], outputs[0, 1, 5] = 9.0, 9.0  # would end before it begins
    outputs[0, 0, 1], outputs[0, 1, 38] = 8.0, 8.0  # too long
    outputs[0, :, 39] = 20.0  # not in the context
    outputs[0, 0, 28], outputs[0, 1, 29] = 9.5, 0.0
    assert best_spans(outputs, inside).tolist() == [[28, 38]]
    outputs[0, :, 0] = 10.0
    assert best_spans(outputs, inside).tolist() == [[0, 0]]


def test_answers_are_compared_as_squad_does() -> None:
    assert word_f1("The Eiffel Tower!", "eiffel tower") == 1.0
    assert word_f1("eiffel", "the Eiffel Tower") == pytest.approx(2 / 3)
    assert (word_f1("", ""), word_f1("a", ""), word_f1("x", "")) == (1.0, 1.0, 0.0)
    assert word_f1("東京都", "東京") == pytest.approx(0.8)
