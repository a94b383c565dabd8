"""Rows of every kind of task that a tiny model learns in a few steps, over the words of :mod:`tests.toys.toy_data`."""

from __future__ import annotations

import random
from typing import Any

from tests.toys import toy_data

Rows = list[dict[str, Any]]


def _texts(count: int) -> list[tuple[str, str, str]]:
    """A text, whether it is good or bad, and its noun."""
    chance, found = random.Random(0), []
    for number in range(count):
        opinion = ("pos", "neg")[number % 2]
        noun = chance.choice(toy_data.NOUNS)
        found.append((f"{chance.choice(toy_data.WORDS[opinion])} {noun}", opinion, noun))
    return found


def several_labels(count: int = 32) -> Rows:
    """The opinion, and whether it is on a film; a third of the nouns make no label."""
    return [
        {"text": text, "label": [opinion] * (noun != "music") + ["film"] * (noun == "film")}
        for text, opinion, noun in _texts(count)
    ]


def numbers(count: int = 32) -> Rows:
    """Good texts about 1, bad ones about -1."""
    return [
        {"text": text, "label": (1 if opinion == "pos" else -1) + toy_data.NOUNS.index(noun) / 8 + 0.01}
        for text, opinion, noun in _texts(count)
    ]


def tagged_words(count: int = 32) -> Rows:
    """Adjectives are opinions, and nouns begin an entity that another noun continues."""
    chance, rows = random.Random(1), []
    for text, _, _ in _texts(count):
        words, tags = text.split(), ["O", "B-THING"]
        if chance.random() < 0.5:
            words, tags = [*words, chance.choice(toy_data.NOUNS)], [*tags, "I-THING"]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def questions(count: int = 32) -> Rows:
    """Questions for the noun; every fourth has no answer."""
    rows: Rows = []
    for number, (text, opinion, noun) in enumerate(_texts(count)):
        found = number % 4 != 3
        context = text if found else toy_data.WORDS[opinion][0]
        answers = {"text": [noun], "answer_start": [context.index(noun)]} if found else {"text": [], "answer_start": []}
        rows.append({"question": "good", "context": context, "answers": answers})
    return rows


def preferred(count: int = 24) -> Rows:
    """The longer answer is the better one."""
    return [{"prompt": f"{'abc'[n % 3]}>", "chosen": "yes yes", "rejected": "no"} for n in range(count)]


def pairs() -> Rows:
    """A good text and a bad text about a thing; no two are the same."""
    opinions = zip(toy_data.WORDS["pos"], toy_data.WORDS["neg"], strict=True)
    return [
        {"anchor": f"{good} {noun}", "positive": f"{bad} {noun}"} for good, bad in opinions for noun in toy_data.NOUNS
    ]
