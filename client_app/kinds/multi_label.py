"""Any number of labels for each text: each label is a separate yes or no."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import ClientData, Dataset
from client_app.data.example import Example
from client_app.kinds.classification import read_texts
from client_app.kinds.contract import About, Cells, Encoding, Kind, TaskError
from client_app.kinds.generation import first_name
from client_app.kinds.scores.classes import area_under_curve
from client_app.settings import DataSettings, canonical_label

MOST_WEIGHT = 100.0
"""The most that a yes may count compared with a no, if weights are made from the data."""

_MOST_AREAS = 300
"""The most labels that are reported one by one; a server accepts a thousand metrics."""
_CALLED = re.compile(r"[\w][\w .&+-]{0,63}")
"""Names of labels that can be part of a metric's name, which a server checks."""


class MultiLabel(Kind):
    """``logits [b, C]`` against ``labels [b, C]`` of zeros and ones, by the mean binary cross-entropy over labels.

    A label's weight is that of a yes compared with a no; if balanced, it is the label's share of no divided by that of
    yes.
    """

    name = "multi-label-classification"
    about = About(
        "`text` (or two), `label` as a list (in CSV: `a,b`, or a JSON list); or a column of zeros and ones for each "
        'label: `label-column="toxic,obscene"`',
        "accuracy (all labels right), macro and micro F1, macro AUROC and each label's",
    )
    order = 10
    columns = ("text", "label")
    auto_model = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    head = "labels"
    probabilities = False
    scores = ("f1", "f1_micro", "auroc")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        text, several = row.get(first_name(settings.text_column)), _several(settings)
        told = all(name in row for name in several) if several else isinstance(row.get(settings.label_column), list)
        return isinstance(text, str) and told

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        several = _several(cells.settings)
        if several:
            return {"told": {"labels": tuple(name for name in several if _yes(cells, name))}} | read_texts(cells)
        column = cells.settings.label_column
        value: Any = cells.values.get(column, "") if column in cells.values else cells.value(column)
        if isinstance(value, str):
            value = _parsed(value)
        if value is None or not isinstance(value, list | tuple):
            cells.refuse(column, f"{str(value)[:60]!r}, expected a list of labels")
        names = tuple(dict.fromkeys(cells.label_of(item, column) for item in value))
        twice = len(names) < len(value) and set(names) <= {"0", "1"}  # read as names these would be two labels
        if twice or any(isinstance(item, bool) for item in value):
            cells.refuse(
                column,
                f"{str(value)[:60]}, zeros and ones, expected the names of the labels that the row has, or a column "
                "for each label (label-column = 'first,second')",
            )
        return {"told": {"labels": names}} | read_texts(cells)

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        labels = _several(settings) or (settings.label_column,)
        return set(labels) | {name.strip() for name in settings.text_column.split(",")}

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return _several(settings) or (settings.label_column,)

    def labels_named(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.labels_named`."""
        return _several(settings)

    def labels_of(self, example: Example) -> Sequence[str]:
        """See :meth:`Kind.labels_of`."""
        found: Sequence[str] = example.told["labels"]
        return found

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        numbers = {name: number for number, name in enumerate(labels)}
        targets = torch.zeros(len(examples), len(labels))
        for row, example in enumerate(examples):
            for name in example.told["labels"]:
                targets[row, numbers[name]] = 1.0
        return encoding.dataset(encoding.padded([encoding.text_item(e) for e in examples]), targets, examples)

    def configure(self, config: Any) -> None:
        """See :meth:`Kind.configure`."""
        config.problem_type = "multi_label_classification"

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return dict(data.inputs)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Kind.example_losses`."""
        return functional.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none").mean(dim=-1)

    def mean_loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """See :meth:`Kind.mean_loss`."""
        yes = None if weights is None else weights.to(outputs)
        return functional.binary_cross_entropy_with_logits(outputs, labels.to(outputs), pos_weight=yes)

    def weigh(self, data: Dataset, asked: Sequence[float], classes: int) -> Tensor:
        """See :meth:`Kind.weigh`."""
        if asked and (len(asked) != classes or not all(0 < weight < float("inf") for weight in asked)):
            raise TaskError(f"label-weights: {len(asked)} numbers, expected {classes} (labels), all above 0")
        if asked:
            return torch.tensor(list(asked))
        yes = data.labels.sum(dim=0)
        return torch.where(yes > 0, (len(data) - yes) / yes.clamp_min(1), 1.0).clamp(1 / MOST_WEIGHT, MOST_WEIGHT)

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """A label's own area is called by the label's number, or by the label if the run names all labels."""
        logits, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        wanted, answers = labels.bool(), logits > 0
        found = {"accuracy": float((answers == wanted).all(dim=1).double().mean())}
        if loss_only:
            return found
        hits, misses = (answers & wanted).sum(dim=0).double(), (answers != wanted).sum(dim=0).double()
        seen = (hits + misses) > 0
        by_label = 2 * hits / (2 * hits + misses).clamp_min(1)
        if bool(seen.any()):
            found["f1"] = float(by_label[seen].mean())
            found["f1_micro"] = float(2 * hits.sum() / (2 * hits.sum() + misses.sum()))
        areas = {n: area_under_curve(logits[:, n], wanted[:, n]) for n in range(labels.shape[1])}
        known = {n: area for n, area in areas.items() if area is not None}
        if known:
            found["auroc"] = sum(known.values()) / len(known)
        if labels.shape[1] > _MOST_AREAS:
            return found
        names = client.shared_labels if client is not None else ()
        if not all(_CALLED.fullmatch(name) for name in names):
            names = ()
        return found | {f"auroc:{names[n] if names else n}": area for n, area in known.items()}


def _several(settings: DataSettings) -> tuple[str, ...]:
    """Columns that are labels themselves; none if one column holds the labels."""
    names = tuple(name for name in map(canonical_label, settings.label_column.split(",")) if name)
    return names if len(names) > 1 else ()


def _yes(cells: Cells, column: str) -> bool:
    """Whether a row has the label that a column is named after."""
    value = cells.value(column)
    known = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        cells.refuse(column, f"{str(value)[:60]!r}, expected 0 or 1, as the column is a label")
    return found


def _parsed(value: str) -> Any:
    """Labels in one cell of a CSV file."""
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return None
    return [part for part in value.split(",") if part.strip()]
