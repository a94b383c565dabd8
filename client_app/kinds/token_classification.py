"""A label for each word of a text: names, parts of speech."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import ClientData, Dataset
from client_app.data.example import Example
from client_app.data.targets import IGNORED
from client_app.kinds.contract import About, Cells, Encoding, Item, Kind, balanced, scaled
from client_app.kinds.scores.classes import macro_f1
from client_app.kinds.scores.entities import entity_scores, has_entities
from client_app.settings import DataSettings

WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "pos_tags", "labels")
"""Usual names of the columns, used if those of the settings are missing."""


class TokenClassification(Kind):
    """``logits [b, L, C]`` against ``labels [b, L]``, by the cross-entropy of each word's first token.

    Words are joined with spaces and read as a text, as they will be when the model is used. -100: not the first token
    of a word.
    """

    name = "token-classification"
    about = About(
        "`text` or `tokens` as a list of words, `label` or `ner_tags` as a list of tags",
        "accuracy of words; F1, precision and recall of entities (IOB, IOBES), else macro F1",
    )
    order = 5
    columns = ("words", "tags")
    auto_model = "AutoModelForTokenClassification"
    peft_task = "TOKEN_CLS"
    head = "labels"
    per_token = True
    evaluation_batch = 32
    scores = ("f1", "precision", "recall")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return all(isinstance(row.get(column), list) for column in _columns(row, settings))

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        columns = _columns(cells.values, cells.settings)
        words, tags = (_listed(cells, column) for column in columns)
        if len(words) != len(tags) or not words:
            cells.refuse(columns[1], f"{len(tags)} tags for {len(words)} words, expected one each, at least one")
        for number, word in enumerate(words, start=1):
            if not isinstance(word, str):
                cells.refuse(columns[0], f"word {number} is {str(word)[:60]!r}, expected a text")
        return {"told": {"words": tuple(words), "tags": tuple(cells.label_of(tag, columns[1]) for tag in tags)}}

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        return set(_columns(dict.fromkeys(columns), settings))

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return settings.label_column, *TAGS

    def labels_of(self, example: Example) -> Sequence[str]:
        """See :meth:`Kind.labels_of`."""
        found: Sequence[str] = example.told["tags"]
        return found

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        numbers = {name: number for number, name in enumerate(labels)}
        inputs = encoding.padded([self._item(encoding, example, numbers) for example in examples])
        targets = inputs.pop("labels")
        return encoding.dataset(inputs, targets, examples)

    def _item(self, encoding: Encoding, example: Example, numbers: Mapping[str, int]) -> Item:
        words: Sequence[str] = example.told["words"]
        tokenizer = encoding.tokenizer
        if not tokenizer.is_fast:
            encoding.refuse(example, f"labels for words need a fast tokenizer, found {type(tokenizer).__name__}")
        told = tokenizer(
            " ".join(words),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            split_special_tokens=True,
            truncation=True,
            max_length=encoding.max_length,
        )
        found = [name for name in tokenizer.model_input_names if name in told]
        places = zip(told["offset_mapping"], told["special_tokens_mask"], strict=True)
        tokens = [(start, end, number) for number, ((start, end), new) in enumerate(places) if not new and end > start]
        labels, at, begin = [IGNORED] * len(told["input_ids"]), 0, 0
        for word, tag in zip(words, example.told["tags"], strict=True):
            while at < len(tokens) and tokens[at][1] <= begin:
                at += 1
            # A token may begin with the space before its word; one that begins in another word is that word's.
            own = at < len(tokens) and begin - 1 <= tokens[at][0] < begin + len(word) and tokens[at][1] > begin
            if not word.strip():
                encoding.findings["words are blank, and have no label"] += 1
            elif own and labels[tokens[at][2]] == IGNORED:
                labels[tokens[at][2]] = numbers[tag]
            elif at >= len(tokens):
                encoding.findings["words lie beyond the part of their text that is read (max-length)"] += 1
            else:
                encoding.findings["words have no token of their own, and so no label"] += 1
            begin += len(word) + 1
        if all(label == IGNORED for label in labels):
            encoding.refuse(example, "no word has a token of its own within max-length")
        item = {name: list(told[name]) for name in found}
        return item | {"attention_mask": [1] * len(labels), "labels": labels}

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return dict(data.inputs)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Each text's mean over its words ``[b]``."""
        losses = _losses(outputs, labels)
        return losses.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp_min(1)

    def mean_loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over the words of all texts."""
        losses = _losses(outputs, labels)
        if weights is not None:
            losses = losses * weights.to(outputs)[labels.clamp_min(0)]
        return losses.sum() / (labels != IGNORED).sum().clamp_min(1)

    def summed_loss(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """The sum over words, and their number."""
        return float(_losses(outputs, labels).double().sum()), int((labels != IGNORED).sum())

    def targets_in(self, batch: Dataset) -> int:
        """The number of words with a label."""
        return int((batch.labels != IGNORED).sum())

    def weigh(self, data: Dataset, asked: Sequence[float], classes: int) -> Tensor:
        """See :meth:`Kind.weigh`."""
        counts = torch.zeros(classes, dtype=torch.long)
        for part in torch.split(torch.arange(len(data)), 1024):  # labels of tokens may be in a file
            found = data.batch(part).labels
            counts += torch.bincount(found[found != IGNORED], minlength=classes)
        return scaled(asked, counts, self.name) if asked else balanced(counts)

    def keep(self, outputs: Tensor, labels: Tensor, batch: Dataset, client: ClientData | None) -> Any:
        """Answers and labels of each text's words."""
        masks, answers, wanted = (labels != IGNORED).cpu(), outputs.argmax(dim=-1).cpu(), labels.cpu()
        return [(said[m], right[m]) for said, right, m in zip(answers, wanted, masks, strict=True)]

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """See :meth:`Kind.metrics`."""
        pairs = [pair for batch in kept for pair in batch]
        said, right = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        found = {"accuracy": int((said == right).sum()) / max(len(right), 1)}
        if loss_only or client is None or not client.labels:
            return found
        names = client.labels
        if not has_entities(names):
            return found | {"f1": macro_f1(said, right, len(names))}
        told = [[[names[number] for number in tags.tolist()] for tags in pair] for pair in pairs]
        return found | entity_scores([pair[0] for pair in told], [pair[1] for pair in told])


def _columns(row: Mapping[str, Any], settings: DataSettings) -> tuple[str, str]:
    words = next((name for name in (settings.text_column, *WORDS) if name in row), settings.text_column)
    tags = next((name for name in (settings.label_column, *TAGS) if name in row), settings.label_column)
    return words, tags


def _listed(cells: Cells, column: str) -> list[Any]:
    value = cells.value(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split()
        except ValueError:
            value = None
    if not isinstance(value, list | tuple):
        cells.refuse(column, f"{str(value)[:60]!r}, expected a list")
    return list(value)


def _losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """``[b, L]``, zero where there is no label."""
    return functional.cross_entropy(outputs.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
