"""A number for each text, or for two: scores, similarities, amounts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.data.example import Example
from client_app.kinds.classification import read_texts
from client_app.kinds.contract import About, Cells, Encoding, Kind, Scorer
from client_app.kinds.generation import first_name
from client_app.kinds.scores.classes import ranks
from client_app.settings import DataSettings


class Regression(Kind):
    """Outputs ``[b]`` against ``labels [b]``, by the squared error. The head means the same at every client."""

    name = "regression"
    about = About(
        '`text` (or two), `label` as numbers that are not all integers; for integers, set `task="regression"`',
        "mean squared error, Pearson's and Spearman's correlation",
    )
    order = 11
    columns = ("text", "label")
    auto_model = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"
    head = "common"
    probabilities = False
    scores = ("mse", "pearson", "spearman")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return first_name(settings.text_column) in row and is_fraction(row.get(settings.label_column))

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        column = cells.settings.label_column
        value = cells.value(column)
        number = number_in(value)
        if number is None:
            cells.refuse(column, f"{str(value)[:60]!r}, expected a number")
        if not math.isfinite(number):
            cells.refuse(column, f"{number}, expected a finite number")
        return {"told": {"number": number}} | read_texts(cells)

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        return {settings.label_column} | {name.strip() for name in settings.text_column.split(",")}

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        targets = torch.tensor([example.told["number"] for example in examples], dtype=torch.float32)
        return encoding.dataset(encoding.padded([encoding.text_item(e) for e in examples]), targets, examples)

    def configure(self, config: Any) -> None:
        """See :meth:`Kind.configure`."""
        if config.num_labels != 1:
            config.id2label, config.label2id = {0: "LABEL_0"}, {"LABEL_0": 0}
        config.problem_type = "regression"

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return dict(data.inputs)

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """``[b]``."""
        return super().outputs(model, batch).squeeze(-1)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared errors ``[b]``."""
        return (outputs - labels.to(outputs)).square()

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """Correlations are left out if all numbers are the same."""
        outputs, labels = (torch.cat(parts).double() for parts in zip(*kept, strict=True))
        found = {"mse": float((outputs - labels).square().mean())}
        if loss_only:
            return found
        correlations = {"pearson": correlation(outputs, labels), "spearman": correlation(ranks(outputs), ranks(labels))}
        return found | {name: value for name, value in correlations.items() if math.isfinite(value)}


def is_fraction(value: Any) -> bool:
    """Whether a label is a number, or the text of one, that is not an integer.

    >>> [is_fraction(value) for value in (3.8, "3.8", 4.0, "4.000", 4, "four", "1e-3", "nan")]
    [True, True, False, False, False, False, True, False]
    """
    number = number_in(value)
    return number is not None and math.isfinite(number) and not number.is_integer()


def number_in(value: Any) -> float | None:
    """A label as a number; None if it is none, or has signs that only Python reads (``1_000``).

    >>> [number_in(value) for value in ("-1.0", 2, True, "1_000", "one", None)]
    [-1.0, 2.0, None, None, None, None]
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two lists of numbers ``[n]``; NaN where one has no variance."""
    first, second = first - first.mean(), second - second.mean()
    scale = (first.square().sum() * second.square().sum()).sqrt()
    return float((first * second).sum() / scale) if scale > 0 else math.nan
