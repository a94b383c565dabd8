"""Texts are scored in every script alike."""

from __future__ import annotations

import unicodedata

import pytest

from client_app.kinds.scores.texts import Written, chrf, text_metrics, words_of


def test_texts_are_scored_by_exact_match_and_rouge() -> None:
    """ROUGE-L by hand: the longest common subsequence of "the cat sat" and "the cat ran" has 2 of 3 words: F = 2/3."""
    found = text_metrics(Written(["the cat sat", " yes\n", "no"], ["the cat ran", "yes", "yes"]))
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир",
        "今天天气很好",
        "こんにちは世界",
        "مرحبا بالعالم",
        "Größe",
        "हिन्दी भाषा",
        "สวัสดีครับ",
        "hello",
        "!?",
        "👍🏽",
    ],
)
def test_equal_texts_have_full_scores_in_every_script(text: str) -> None:
    same = text_metrics(Written([text], [unicodedata.normalize("NFD", text)]))
    assert same == pytest.approx({"exact_match": 1.0, "rouge_l": 1.0, "chrf": 1.0})


def test_unequal_texts_are_scored_by_their_common_words() -> None:
    """By hand: 2 of 3 words; 4 of 6 characters of a script without spaces; letters with marks are not cut."""

    def rouge(text: str, reference: str) -> float:
        return text_metrics(Written([text], [reference]))["rouge_l"]

    assert rouge("это кот 1", "это пёс 1") == pytest.approx(2 / 3, abs=1e-6)
    assert rouge("今天天气很好", "今天天气不坏") == pytest.approx(4 / 6, abs=1e-6)
    assert rouge("Grüße", "Grobe") == 0
    assert words_of("می\u200cخواهم خبر") == ["می\u200cخواهم", "خبر"]
    assert words_of("สวัสดี") == ["ส", "วั", "ส", "ดี"]


def test_chrf_is_the_definition_over_character_n_grams() -> None:
    """By hand: orders 1 and 2 of "ab" and "abc" have precision 1, recall 2/3 and 1/2; longer ones do not occur in both.

    "abd" and "abc": precision and recall 2/3, 1/2 and 0 of one trigram, so F = (2/3 + 1/2) / 3.
    """
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf(["ab"], ["a bc"]) == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf(["abd"], ["abc"]) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert chrf(["", "x"], ["abc", "y"]) == 0
