"""One label for each example: of a text or two, an image, or an image with a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import ClientData, Dataset
from client_app.data.example import Example
from client_app.kinds.contract import About, Cells, Encoding, Kind, balanced, scaled
from client_app.kinds.generation import first_name
from client_app.kinds.scores.classes import class_metrics
from client_app.settings import DataSettings

SCORES = ("f1", "auroc", "ece")
"""Scores of a classification beside its loss and accuracy."""


class Classification(Kind):
    """``logits [b, C]`` against ``labels [b]``, by their cross-entropy."""

    head: ClassVar[str] = "labels"
    scores: ClassVar[tuple[str, ...]] = SCORES

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        found: dict[str, Any] = {}
        if self.has_image:
            found["images"] = cells.images()
            if len(found["images"]) != 1:
                cells.refuse(cells.settings.image_column, f"{len(found['images'])} images, expected one")
        found["label"] = cells.label(cells.settings.label_column)
        return found | (read_texts(cells) if self.has_text else {})

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        texts = {name.strip() for name in settings.text_column.split(",")} if self.has_text else set()
        return {settings.label_column} | texts | ({settings.image_column, "images"} if self.has_image else set())

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        numbers = {name: number for number, name in enumerate(labels)}
        targets = torch.tensor([numbers[str(example.label)] for example in examples], dtype=torch.long)
        items = [encoding.text_item(example) for example in examples] if self.has_text else []
        return encoding.dataset(encoding.padded(items), targets, examples)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies ``[b]``."""
        return functional.cross_entropy(outputs, labels, reduction="none")

    def mean_loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean cross-entropy, each example with the weight of its class."""
        if weights is None:
            return functional.cross_entropy(outputs, labels)
        return (self.example_losses(outputs, labels) * weights.to(outputs)[labels]).mean()

    def summed_loss(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """See :meth:`Kind.summed_loss`."""
        return float(functional.cross_entropy(outputs, labels, reduction="sum")), len(labels)

    def weigh(self, data: Dataset, asked: Sequence[float], classes: int) -> Tensor:
        """See :meth:`Kind.weigh`."""
        counts = torch.bincount(data.labels, minlength=classes)
        return scaled(asked, counts, self.name) if asked else balanced(counts)

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """Accuracy, and those of :func:`class_metrics` that the client asks for."""
        logits, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        found = {"accuracy": int((logits.argmax(dim=-1) == labels).sum()) / len(labels)}
        if client is not None and client.metrics and not loss_only:
            more = class_metrics(logits, labels)
            found |= {name: more[name] for name in client.metrics if name in more}
        return found


class TextClassification(Classification):
    """A text, or two, with a label."""

    name = "text-classification"
    about = About(
        '`text` (or two: `text-column="premise,hypothesis"`), `label`', "accuracy, macro F1, AUROC, calibration error"
    )
    order = 50
    columns = ("text", "label")
    auto_model = "AutoModelForSequenceClassification"
    peft_task = "SEQ_CLS"

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return first_name(settings.text_column) in row and settings.label_column in row

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return dict(data.inputs)


class ImageClassification(Classification):
    """An image with a label."""

    name = "image-classification"
    about = About(
        "`image` (a path beside the file), `label`; or folders of images named after classes",
        "accuracy, macro F1, AUROC, calibration error",
    )
    order = 30
    columns = ("image", "label")
    auto_model = "AutoModelForImageClassification"
    evaluation_batch = 256

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return settings.image_column in row and settings.label_column in row


class ImageTextClassification(Classification):
    """An image and a text with a label."""

    name = "image-text-classification"
    about = About("`image`, `text`, `label`", "accuracy, macro F1, AUROC, calibration error")
    order = 20
    columns = ("image", "text", "label")
    auto_model = "AutoModelForVisualQuestionAnswering"
    evaluation_batch = 32

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return all(
            first_name(name) in row for name in (settings.image_column, settings.text_column, settings.label_column)
        )


def read_texts(cells: Cells) -> dict[str, Any]:
    """A text, or the two that ``text-column`` names."""
    names = [name.strip() for name in cells.settings.text_column.split(",")]
    if len(names) > 2:
        cells.refuse(cells.settings.text_column, "at most two columns, like premise,hypothesis")
    return {"text": cells.text(names[0]), "pair": cells.text(names[1]) if len(names) == 2 else None}
