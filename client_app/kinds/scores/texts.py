"""Scores of written texts in every script: exact match, ROUGE-L, chrF."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

_NO_SPACES = "".join(
    rf"\p{{{name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
_WORDS: Any = regex.compile(rf"(?V1)[{_NO_SPACES}]\p{{M}}*|[\w--[{_NO_SPACES}]]+")

MAX_ORDER, BETA = 6, 2
"""The longest character n-grams of chrF, and the weight of recall in its F-measure."""


@dataclass(frozen=True)
class Written:
    """What the model wrote for some examples, and what it should have written."""

    texts: list[str]
    references: list[str]


def words_of(text: str) -> list[str]:
    """Words of a text; if the script puts no spaces between words, each character with its marks is a word.

    A text without letters and digits (``!?``) is taken character by character, so that equal texts have equal words.
    """
    found: list[str] = _WORDS.findall(text)
    return found or [character for character in text if not character.isspace()]


def text_metrics(written: Written) -> dict[str, float]:
    """Scores of texts against their references; canonically equivalent texts (NFC, NFD) are equal.

    ``exact_match`` is the share of texts equal to their reference, apart from white space around them. ``rouge_l`` is
    the mean F-measure of the longest common subsequence of :func:`words_of`, in lower case (Lin 2004, section 3);
    for ``chrf``, see :func:`chrf`.
    """
    from torchmetrics.functional.text import rouge_score

    texts, references = (
        [unicodedata.normalize("NFC", text) for text in found] for found in (written.texts, written.references)
    )
    exact = sum(text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True))
    rouge: Mapping[str, Any] = rouge_score(
        texts, references, rouge_keys="rougeL", normalizer=str.casefold, tokenizer=words_of
    )
    return {
        "exact_match": exact / len(texts),
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "chrf": chrf(texts, references),
    }


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 over all texts together, from 0 to 1 (Popovic 2015): character n-grams up to 6, recall twice as important.

    Precision and recall are means over the orders that occur, as in sacrebleu: torchmetrics always divides by 6, so
    that a right answer of three letters gets a half.
    """
    precisions, recalls = [], []
    for order in range(1, MAX_ORDER + 1):
        common = written = wanted = 0
        for text, reference in zip(texts, references, strict=True):
            found, expected = _n_grams(text, order), _n_grams(reference, order)
            common += (found & expected).total()
            written, wanted = written + found.total(), wanted + expected.total()
        if written and wanted:
            precisions.append(common / written)
            recalls.append(common / wanted)
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _n_grams(text: str, order: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[start : start + order] for start in range(len(letters) - order + 1))
