"""Tokens of different tokenizers: which stand for the same characters, and alignment of models that differ in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.model import alignment
from client_app.model.alignment import AlignmentError, AlignOptions, align, basis_of, load_alignment
from client_app.model.personal import PersonalModel
from client_app.model.subwords import Decode, Pieces, counterparts, pairs_of, reduced
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor
from tests.client_app.model.test_alignment import QUICK, model_of, module_of

PIVOT = ["", "ab", "cd", "e", "f", "abcd", "ef"]
"""Tokens of the pivot by number; the first is padding."""
TARGET = ["", "a", "b", "c", "d", "ef", "[S]"]


def test_a_token_belongs_to_all_tokens_that_share_a_character_with_it() -> None:
    assert counterparts(["abc", "d"], ["a", "bcd"]) == [(0, [0, 1]), (1, [1])]
    assert counterparts(["a", "b"], ["ab"]) == [(0, [0]), (1, [0])]
    assert counterparts(["", "ab", ""], ["ab"]) == [(1, [0])], "special tokens have no characters"
    assert counterparts(["xx", "ab"], ["ab", "yy"]) == [(1, [0])], "what only one of them has is left out"
    assert counterparts(["ab"], []) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=12), st.data())
def test_two_divisions_of_one_text_cover_each_other_in_order(ours: list[str], data: st.DataObject) -> None:
    text, theirs, at = "".join(ours), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        theirs.append(text[at : at + size])
        at += size
    found = counterparts(ours, theirs)
    assert [token for token, _ in found] == [number for number, piece in enumerate(ours) if piece]
    begins = [sum(map(len, theirs[:number])) for number in range(len(theirs))]
    for token, matched in found:
        start = sum(map(len, ours[:token]))
        expected = [
            number
            for number, begin in enumerate(begins)
            if begin < start + len(ours[token]) and start < begin + len(theirs[number])
        ]
        assert matched == expected


def test_what_tokenizers_write_differently_is_the_same() -> None:
    assert reduced("##ing") == reduced(" Ing") == reduced("ING ") == "ing"
    assert reduced("café") == "cafe"
    assert reduced("\ufffd") == ""
    pieces = Pieces(lambda ids: {0: "", 1: " The", 2: "re"}[int(ids)])
    assert pieces.of(torch.tensor([0, 1, 2, 1])) == ["", "the", "re", "the"]


def test_counterparts_are_numbered_through_the_texts_of_a_batch_and_their_mean_is_taken() -> None:
    pairs = pairs_of([["ab", "c"], ["de"]], [["a", "b", "c"], ["", "d", "e"]])
    assert pairs.rows.tolist() == [0, 1, 2]
    values = torch.arange(6.0)[:, None] ** 2
    assert pairs.pooled(values).flatten().tolist() == [0.5, 4.0, 20.5]


def read(rows: list[list[int]]) -> Dataset:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Dataset({"input_ids": ids, "attention_mask": mask}, torch.zeros(len(rows), dtype=torch.long))


def texts(count: int = 40) -> tuple[Dataset, Dataset]:
    """The same texts of "abcd" and "ef" as both models read them; those of the target begin with a special token."""
    generator = torch.Generator().manual_seed(3)
    theirs, ours = [], []
    for _ in range(count):
        words = torch.randint(2, (5,), generator=generator).tolist()
        split = torch.randint(2, (5,), generator=generator).tolist()
        theirs.append(
            [t for word, s in zip(words, split, strict=True) for t in (([1, 2], [5])[s], ([3, 4], [6])[s])[word]]
        )
        ours.append([6, *(t for word in words for t in ([1, 2, 3, 4], [5])[word])])
    return read(theirs), read(ours)


def decode_of(pieces: list[str]) -> Decode:
    return lambda ids: "" if pieces[int(ids)] == "[S]" else pieces[int(ids)]


DECODE = (decode_of(PIVOT), decode_of(TARGET))


def test_models_with_other_tokens_are_brought_together_by_sub_words(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 4)
    data = texts()
    with pytest.raises(AlignmentError, match="are aligned by sub-words, for which their tokens must be decoded"):
        align(pivot, [target], data, tmp_path, QUICK)
    path = align(pivot, [target], data, tmp_path, AlignOptions(steps=300, batch_size=16), decode=DECODE)
    pairs = alignment._pairs(data, (Pieces(DECODE[0]), Pieces(DECODE[1])))
    assert pairs is not None
    special = [int(data[1].inputs["attention_mask"][:text].sum()) for text in range(40)]
    assert not set(special) & set(pairs.rows.tolist())
    assert len(pairs.rows) == int(data[1].inputs["attention_mask"].sum()) - 40

    def activations(model: PersonalModel, basis: Adapter, read_as: Dataset) -> dict[str, Tensor]:
        inputs = alignment._inputs(model, read_as)
        return {name: x @ basis[module_of(model, name), Factor.A].double().T for name, x in inputs.items()}

    def correlation(bases: tuple[Adapter, Adapter]) -> float:
        found = []
        theirs, ours = (activations(*given) for given in zip((pivot, target), bases, data, strict=True))
        for name, z in ours.items():
            z_t, z_p = z[pairs.rows], pairs.pooled(theirs[name])
            z_t, z_p = z_t - z_t.mean(dim=0), z_p - z_p.mean(dim=0)
            found.append(float((z_t * z_p).sum() / (z_t.norm() * z_p.norm())))
        return sum(found) / len(found)

    random = (basis_of(pivot.initial(0)), basis_of(target.initial(0)))
    aligned = (load_alignment(tmp_path, path.stem, pivot.layout), load_alignment(tmp_path, path.stem, target.layout))
    assert correlation(aligned) > correlation(random) + 0.2


def test_the_same_tokens_are_compared_one_by_one_special_ones_too(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 3)
    data = texts()[1]
    plain = align(pivot, [target], [data] * 2, tmp_path / "plain", QUICK)
    decoded = align(pivot, [target], [data] * 2, tmp_path / "decoded", QUICK, decode=(DECODE[1], DECODE[1]))
    assert plain.name == decoded.name


def test_texts_without_a_common_sub_word_are_refused(tmp_path: Path) -> None:
    theirs, ours = texts()
    foreign = (DECODE[0], lambda ids: "x" * int(ids))
    with pytest.raises(AlignmentError, match="'llama-24' and 'llama-16' have no sub-word of these texts in common"):
        align(model_of(16, 2), [model_of(24, 3)], [theirs, ours], tmp_path, QUICK, decode=foreign)
