"""Which tokens of two tokenizers stand for the same characters, so that models that divide texts differently compare.

Co-LoRA's authors align models of different families so: a token of the target belongs to a list of the pivot's tokens,
whose mean is taken, and a token without counterpart is left out. Here both texts are compared by character, without
spaces, case, accents, and what marks sub-words. Special tokens have no characters, and so no counterparts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

Decode = Callable[[Tensor], str]
"""The text of token ids ``[n]``, without special tokens."""
_CONTINUES = "##"
"""How WordPiece marks a token inside a word."""


@dataclass(frozen=True)
class Pairs:
    """Tokens of some texts with their counterparts, each numbered through the texts of a batch.

    ``rows [m]`` are tokens of the target. ``tokens [k]`` are tokens of the pivot, each for the row ``of [k]``.
    """

    rows: Tensor
    tokens: Tensor
    of: Tensor

    def pooled(self, values: Tensor) -> Tensor:
        """For each row the mean ``[m, r]`` of its counterparts in ``values`` ``[pivot's tokens, r]``."""
        sums = values.new_zeros(len(self.rows), values.shape[1]).index_add_(0, self.of, values[self.tokens])
        counts = torch.bincount(self.of, minlength=len(self.rows)).to(values)
        return sums / counts[:, None]


class Pieces:
    """The text of single tokens, as a tokenizer's ``decode`` gives it, reduced to what tokenizers agree on."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._known: dict[int, str] = {}

    def of(self, ids: Tensor) -> list[str]:
        """One text for each token; empty for special tokens."""
        for token in set(ids.tolist()) - self._known.keys():
            self._known[token] = reduced(self._decode(torch.tensor([token])))
        return [self._known[token] for token in ids.tolist()]


def reduced(text: str) -> str:
    """Without spaces, case, accents, marks of sub-words, and characters of which a token has a part only."""
    plain = unicodedata.normalize("NFKD", text.strip().removeprefix(_CONTINUES).casefold())
    return "".join(c for c in plain if not c.isspace() and not unicodedata.combining(c) and c not in "\ufffd▁Ġ")


def counterparts(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, list[int]]]:
    """Each of our tokens that has some, with those of theirs that share a character with it; all in order.

    >>> counterparts(["un", "happy", "!"], ["[CLS]", "unhap", "py"])
    [(0, [1]), (1, [1, 2])]
    """
    mine = [number for number, piece in enumerate(ours) for _ in piece]
    other = [number for number, piece in enumerate(theirs) for _ in piece]
    found: dict[int, dict[int, None]] = {}
    for ours_at, theirs_at, size in _common("".join(ours), "".join(theirs)):
        for step in range(size):
            found.setdefault(mine[ours_at + step], {})[other[theirs_at + step]] = None
    return [(token, list(tokens)) for token, tokens in sorted(found.items())]


def pairs_of(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> Pairs:
    """The pairs of the texts of a batch, text by text."""
    rows: list[int] = []
    tokens: list[int] = []
    of: list[int] = []
    start_ours = start_theirs = 0
    for one, other in zip(ours, theirs, strict=True):
        for token, matched in counterparts(one, other):
            tokens += [start_theirs + number for number in matched]
            of += [len(rows)] * len(matched)
            rows.append(start_ours + token)
        start_ours, start_theirs = start_ours + len(one), start_theirs + len(other)
    return Pairs(*(torch.tensor(numbers, dtype=torch.long) for numbers in (rows, tokens, of)))


def _common(first: str, second: str) -> list[tuple[int, int, int]]:
    """Where two texts are the same: starts in both, and length."""
    if first == second:
        return [(0, 0, len(first))]
    return list(SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks())
