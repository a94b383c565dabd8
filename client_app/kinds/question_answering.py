"""Extractive question answering: where in a context the answer is (SQuAD 1 and 2)."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import MASK, ClientData, Dataset
from client_app.data.example import Example
from client_app.data.targets import IGNORED
from client_app.kinds.contract import About, Cells, Encoding, Item, Kind, Scorer
from client_app.kinds.scores.texts import words_of
from client_app.settings import DataSettings

QUESTION, CONTEXT, ANSWERS = "question", "context", "answers"
"""Columns with fixed names: those of SQuAD."""
IN_CONTEXT = "in_context"
"""This input is one at tokens of the context, where answers are looked for, ``[n, L]``."""
LONGEST_ANSWER = 30
"""The most tokens in an answer; BERT's own bound on SQuAD."""
_OUTSIDE = -1e4
"""The logit of padding: far below all others, and finite."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class QuestionAnswering(Kind):
    """Outputs ``[b, 2, L]`` (logits of first and last token) against ``labels [b, A, 2]``, the places of A answers.

    The first answer is learnt; any of them is right. ``(0, 0)``: the question has no answer. -100: this answer does not
    exist, or lies beyond the part of the context that is read and counts as not found.
    """

    name = "question-answering"
    about = About(
        "`question`, `context`, `answers` (`text` and `answer_start`, as in SQuAD; an empty list: no answer)",
        "exact match and F1 of words, the better of several answers",
    )
    order = 4
    columns = ("question", "context", "answers")
    auto_model = "AutoModelForQuestionAnswering"
    peft_task = "QUESTION_ANS"
    head = "common"
    per_token = True
    own_inputs = (IN_CONTEXT,)
    evaluation_batch = 32
    scores = ("exact_match", "f1")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return all(column in row for column in (QUESTION, CONTEXT, ANSWERS))

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        context = cells.text(CONTEXT)
        found = []
        for text, start in _answers(cells):
            at = context.find(text) if start is None else start
            if at < 0 or context[at : at + len(text)] != text or not text.strip():
                shown = context[at : at + len(text)] if at >= 0 else "nowhere"
                cells.refuse(ANSWERS, f"answer {text[:60]!r} is not in the context at {start}, found {shown[:60]!r}")
            found.append((at, at + len(text)))
        return {"text": cells.text(QUESTION), "pair": context, "told": {"answers": tuple(found)}}

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        return {QUESTION, CONTEXT, ANSWERS}

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return (ANSWERS,)

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        told = [self._item(encoding, example) for example in examples]
        targets = torch.full((len(told), max(len(spans) for _, spans in told), 2), IGNORED)
        for row, (_, spans) in enumerate(told):
            targets[row, : len(spans)] = torch.tensor(spans)
        return encoding.dataset(encoding.padded([item for item, _ in told]), targets, examples)

    def _item(self, encoding: Encoding, example: Example) -> tuple[Item, list[tuple[int, int]]]:
        tokenizer = encoding.tokenizer
        if not tokenizer.is_fast:
            encoding.refuse(example, f"answers in a context need a fast tokenizer, found {type(tokenizer).__name__}")
        try:
            told = tokenizer(
                example.text,
                example.pair,
                return_offsets_mapping=True,
                split_special_tokens=True,
                truncation="only_second",
                max_length=encoding.max_length,
            )
        except Exception as error:  # the tokenizer's own class for a question that fills everything
            encoding.refuse(example, f"the question leaves no room for its context within max-length: {error}")
        inside = [int(part == 1) for part in told.sequence_ids()]
        offsets = told["offset_mapping"]
        if not any(inside):
            encoding.refuse(example, "the question leaves no room for its context within max-length")
        if max(end for (_, end), there in zip(offsets, inside, strict=True) if there) < len(str(example.pair).rstrip()):
            encoding.truncated += 1
        spans = []
        for start, end in example.told["answers"]:
            touched = [n for n, (b, e) in enumerate(offsets) if inside[n] and max(b, start) < min(e, end)]
            whole = bool(touched) and offsets[touched[-1]][1] >= end
            spans.append((touched[0], touched[-1]) if whole else (IGNORED, IGNORED))
        if (IGNORED, IGNORED) in spans:
            encoding.findings["answers lie beyond the part of their context that is read (max-length)"] += 1
        item = {name: list(told[name]) for name in tokenizer.model_input_names if name in told}
        return item | {MASK: [1] * len(inside), IN_CONTEXT: inside}, spans or [(0, 0)]

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return self.model_inputs(data)

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """``[b, 2, L]``; an answer cannot be in padding."""
        found = super().outputs(model, batch).transpose(1, 2)
        return found.masked_fill(batch.inputs[MASK].to(found.device)[:, None] == 0, _OUTSIDE)

    def read_output(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """``[b, L, 2]``."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of first and last token of the first answer ``[b]``."""
        losses = functional.cross_entropy(outputs.transpose(1, 2), labels[:, 0], ignore_index=IGNORED, reduction="none")
        return losses.mean(dim=1)

    def keep(self, outputs: Tensor, labels: Tensor, batch: Dataset, client: ClientData | None) -> Any:
        """The answer's text for each example, and the right answers."""
        spans = best_spans(outputs.float().cpu(), batch.inputs[IN_CONTEXT])
        decode = client.decode if client is not None else None
        if decode is None:
            return []
        found = []
        for ids, span, right in zip(batch.inputs["input_ids"], spans.tolist(), labels.tolist(), strict=True):
            known = [tuple(places) for places in right if places[0] != IGNORED]
            texts = ["" if (a, b) == (0, 0) else decode(ids[a : b + 1]) for a, b in [tuple(span), *known]]
            found.append((texts[0], texts[1:]))
        return found

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """See :meth:`Kind.metrics`."""
        answers = [answer for batch in kept for answer in batch]
        if loss_only or not answers:
            return {}
        exact = [max((float(_plain(said) == _plain(text)) for text in right), default=0.0) for said, right in answers]
        words = [max((word_f1(said, text) for text in right), default=0.0) for said, right in answers]
        return {"exact_match": sum(exact) / len(exact), "f1": sum(words) / len(words)}


def best_spans(outputs: Tensor, in_context: Tensor) -> Tensor:
    """First and last token ``[b, 2]`` of the likeliest answer in the context, or ``(0, 0)``.

    Args:
        outputs: ``[b, 2, L]``.
        in_context: ``[b, L]``, one where an answer may be.
    """
    width = outputs.shape[-1]
    inside = in_context.bool()
    pairs = outputs[:, 0, :, None] + outputs[:, 1, None, :]
    order = torch.ones(width, width, dtype=torch.bool).triu() & ~torch.ones(width, width).triu(LONGEST_ANSWER).bool()
    allowed = inside[:, :, None] & inside[:, None, :] & order
    allowed[:, 0, 0] = True
    best = pairs.masked_fill(~allowed, -torch.inf).flatten(1).argmax(dim=1)
    return torch.stack([best // width, best % width], dim=1)


def word_f1(said: str, right: str) -> float:
    """SQuAD's F1 of the words that two answers share; if one has no words, 1 if the other has none either, else 0."""
    found, expected = Counter(words_of(_plain(said))), Counter(words_of(_plain(right)))
    if not found or not expected:
        return float(found == expected)
    return 2 * (found & expected).total() / (found.total() + expected.total())


def _plain(text: str) -> str:
    """As SQuAD compares answers: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(letter for letter in text.casefold() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _answers(cells: Cells) -> list[tuple[str, int | None]]:
    """Texts and where they begin, in the forms that occur in SQuAD's files."""
    value = cells.value(ANSWERS)
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except ValueError:
            cells.refuse(ANSWERS, "not valid JSON")
    if isinstance(value, str):
        return [(value, None)] if value.strip() else []
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list | tuple):
        cells.refuse(ANSWERS, f"{str(value)[:60]!r}, expected lists text and answer_start of one length")
    found: list[tuple[str, int | None]] = []
    for item in value:
        item = {"text": item} if isinstance(item, str) else item
        text, start = (item.get("text"), item.get("answer_start")) if isinstance(item, Mapping) else (None, None)
        if not isinstance(text, str) or isinstance(start, bool) or not (start is None or isinstance(start, int)):
            cells.refuse(ANSWERS, f"{str(item)[:60]!r}, expected text and answer_start (an integer)")
        found.append((text, start))
    return found
