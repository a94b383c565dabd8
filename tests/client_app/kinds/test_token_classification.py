"""Labels for words: which token has a word's label, and entities as conlleval counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client_app.data.example import Example
from client_app.data.targets import IGNORED
from client_app.kinds import kind_of
from client_app.own.encoding import Encoder
from client_app.own.files import load_own, read_own
from client_app.own.reading.text_files import DataError
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data

TAGGED = [{"tokens": ["good", "zz", "film"], "ner_tags": ["O", "B-X", "I-X"]}] * 6


def test_a_words_first_token_has_its_label_whatever_pieces_it_is_in(tmp_path: Path) -> None:
    """Words of the tokenizer, and characters: with one token for each letter, the others have none."""
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", TAGGED)
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    _, data = load_own(settings_of(path, tmp_path, base))
    o, begin, inside = (data.labels.index(tag) for tag in ("O", "B-X", "I-X"))
    assert data.splits["train"].labels[0].tolist() == [IGNORED, o, begin, inside, IGNORED]
    kind = kind_of("token-classification")
    letters = Encoder(kind, 64, tiny_models.character_tokenizer())
    example = Example("", told={"words": ("ab", "c"), "tags": ("O", "B-X")})
    encoded = kind.encode(letters, [example], ("O", "B-X"))
    letters_read = letters.tokenizer.convert_ids_to_tokens(encoded.inputs["input_ids"][0])
    told = dict(zip(letters_read, encoded.labels[0].tolist(), strict=True))
    assert (told["a"], told["b"], told["c"]) == (0, IGNORED, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "1 tags for 2 words"),
        ({"tokens": ["a", 2], "ner_tags": ["O", "O"]}, "word 2 is '2', expected a text"),
        ({"tokens": ["a", "b"], "ner_tags": ["O", None]}, "expected a label"),
        ({"tokens": [], "ner_tags": []}, "0 tags for 0 words"),
    ],
)
def test_words_and_tags_that_do_not_fit_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", [*TAGGED, row])
    with pytest.raises(DataError, match=rf"x\.jsonl, line 7, column '.*': .*{message}"):
        read_own(settings_of(path, tmp_path))


@pytest.mark.parametrize("blank", ["\xa0", "", " "])
def test_blank_words_have_no_label_and_move_no_other_words(blank: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["good", blank, "zz", "film", blank], "ner_tags": ["O", "O", "B-X", "I-X", "O"]}] * 6
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    _, data = load_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, base))
    o, begin, inside = (data.labels.index(tag) for tag in ("O", "B-X", "I-X"))
    assert data.splits["train"].labels[0].tolist() == [IGNORED, o, begin, inside, IGNORED]
    assert "12 words are blank, and have no label" in data.notes


def test_words_that_are_cut_off_are_told(tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", TAGGED)
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    _, data = load_own(settings_of(path, tmp_path, base, max_length=4))
    assert "6 words lie beyond the part of their text that is read (max-length)" in data.notes


def test_tags_by_number_have_the_names_of_their_feature(tmp_path: Path) -> None:
    """As hub data sets have them: a list of numbers, whose names are in the data set's description."""
    import datasets

    names = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
    rows = {"tokens": [["good", "film"]] * 4, "ner_tags": [[0, 1]] * 4}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    found = read_own(settings_of(tmp_path / "saved", tmp_path))
    assert found.kind.name == "token-classification"
    assert found.splits["train"][0].told["tags"] == ("O", "B-X")
