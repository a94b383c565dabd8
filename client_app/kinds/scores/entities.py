"""Entities in tagged words, and how many of them were found; tags are IOB or IOBES, read as conlleval reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]
"""Type, first word, last word."""
_TAG = re.compile(r"([BIESLU])-(.*)")


def has_entities(labels: Iterable[str]) -> bool:
    """Whether labels are tags of entities: ``O``, and others with one of the prefixes."""
    return any(_TAG.fullmatch(name) for name in labels)


def entities_in(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence; a tag that continues nothing begins an entity of its own.

    >>> sorted(entities_in(["B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 3, 3), ('PER', 0, 1)]
    """
    found: set[Entity] = set()
    start, kind, ended = 0, "", True
    for place, tag in enumerate([*tags, "O"]):
        match = _TAG.fullmatch(tag)
        prefix, now = (match[1], match[2]) if match else ("O", "")
        begins = prefix != "O" and (ended or prefix in "BSU" or now != kind)
        if not ended and (prefix == "O" or begins):
            found.add((kind, start, place - 1))
            ended = True
        if begins:
            start, kind, ended = place, now, False
        if not ended and prefix in "ESLU":
            found.add((kind, start, place))
            ended = True
    return found


def entity_scores(answers: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all entities together (the CoNLL-2000 shared task's; seqeval's by default).

    An entity counts if its type, its first word and its last word are right.
    """
    hits = told = there = 0
    for said, right in zip(answers, wanted, strict=True):
        found, expected = entities_in(said), entities_in(right)
        hits, told, there = hits + len(found & expected), told + len(found), there + len(expected)
    precision, recall = hits / max(told, 1), hits / max(there, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(told + there, 1)}
