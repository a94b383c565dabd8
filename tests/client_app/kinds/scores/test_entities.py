"""Entities against the values that seqeval 1.2.2 prints for the same tags."""

from __future__ import annotations

import pytest

from client_app.kinds.scores.entities import entities_in, entity_scores, has_entities

# The example in seqeval's README: precision, recall and F1 are 0.5.
WANTED = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
ANSWERS = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_scores_are_those_of_seqeval() -> None:
    assert entity_scores(ANSWERS, WANTED) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert entity_scores(WANTED, WANTED)["f1"] == 1.0
    assert entity_scores([["O"]], [["O"]])["f1"] == 0.0


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["I-A", "I-A", "O", "I-B"], {("A", 0, 1), ("B", 3, 3)}),
        (["B-A", "B-A", "I-B"], {("A", 0, 0), ("A", 1, 1), ("B", 2, 2)}),
        (["B-A", "I-A", "E-A", "S-A", "S-A"], {("A", 0, 2), ("A", 3, 3), ("A", 4, 4)}),
        (["B-A", "E-A", "I-A"], {("A", 0, 1), ("A", 2, 2)}),
        (["B-A-B", "I-A-B"], {("A-B", 0, 1)}),
    ],
)
def test_entities_in_every_scheme(tags: list[str], entities: set[tuple[str, int, int]]) -> None:
    assert entities_in(tags) == entities


def test_parts_of_speech_are_no_entities() -> None:
    assert not has_entities(["NOUN", "VERB", "O"])
    assert has_entities(["O", "B-PER"])
