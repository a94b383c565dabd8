"""Texts that a model writes: after a prompt or in a conversation, and with images before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.data.example import Example
from client_app.data.targets import at_targets, by_example, mean_of, means_of, target_mask, token_losses
from client_app.kinds.contract import About, Cells, Encoding, Kind, Scorer
from client_app.settings import DataSettings

CONVERSATIONS, INSTRUCTION, INPUT, OUTPUT, TOOLS, KWARGS = (
    *("conversations", "instruction", "input", "output", "tools", "chat_template_kwargs"),
)
"""Columns with fixed names: those of ShareGPT, Alpaca, and TRL."""
IMAGES = "images"
"""The column of conversations with images, as TRL calls it; used if there is no image column."""


class Generation(Kind):
    """``labels [b, L]``: position t predicts the label at t + 1, and -100 is not a target.

    Outputs are logits at the n targets alone, ``[n, V]``, or at all positions, ``[b, L, V]``.
    """

    generative: ClassVar[bool] = True
    scores: ClassVar[tuple[str, ...]] = ()

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        return cells.written()

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        forms = (
            *((settings.messages_column,), (CONVERSATIONS,), (settings.prompt_column, settings.completion_column)),
            *((INSTRUCTION, INPUT, OUTPUT), (settings.text_column,)),
        )
        form = next((form for form in forms if form[0] in columns or form[-1] in columns), ())
        images = {settings.image_column, IMAGES} if self.has_image else set()
        return images | set(form) | ({TOOLS, KWARGS} if form != forms[-1] else set())

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return settings.completion_column, OUTPUT

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        inputs = encoding.padded([encoding.written_item(example) for example in examples])
        targets = inputs.pop("labels")
        return encoding.dataset(inputs, targets, examples)

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """``[n, V]`` at the n targets; ``everywhere``: ``[b, L, V]``, at targets and elsewhere."""
        inputs = model.inputs(batch.inputs)
        if everywhere:
            return model.logits(inputs, batch.task)
        return model.target_logits(inputs, batch.labels.to(model.device), batch.task)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over an example's target tokens ``[b]``."""
        return means_of(_at_labels(outputs, labels), labels)

    def mean_loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over a batch's target tokens."""
        return mean_of(_at_labels(outputs, labels), labels)

    def summed_loss(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """The sum over target tokens, and their number."""
        losses, counts = by_example(_at_labels(outputs, labels), labels)
        return float(losses.double().sum()), int(counts.sum())

    def targets_in(self, batch: Dataset) -> int:
        """The number of target tokens."""
        return int(target_mask(batch.labels).sum())


class CausalLM(Generation):
    """Prompt and completion, a conversation, or a text alone."""

    name = "causal-lm"
    about = About(
        "`prompt`, `completion`; or a [conversation](#conversations); or `text` alone",
        "loss, perplexity; exact match, ROUGE-L, chrF of written texts",
    )
    order = 90
    columns = ("prompt", "completion")
    auto_model = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    evaluation_batch = 16

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        asked = settings.prompt_column in row and settings.completion_column in row
        return _has_conversation(row, settings) or asked or first_name(settings.text_column) in row


class ImageTextToText(Generation):
    """Images before a prompt or in a conversation, and the text that follows."""

    name = "image-text-to-text"
    about = About(
        "`image`, and `prompt`, `completion` or a conversation",
        "loss, perplexity; exact match, ROUGE-L, chrF of written texts",
    )
    order = 40
    columns = ("image", "prompt", "completion")
    auto_model = "AutoModelForImageTextToText"
    evaluation_batch = 8

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        written = settings.completion_column in row or first_name(settings.text_column) in row
        return (settings.image_column in row or IMAGES in row) and (written or _has_conversation(row, settings))


def first_name(columns: str) -> str:
    """The first of the columns that a key names."""
    return columns.split(",")[0].strip()


def _has_conversation(row: Mapping[str, Any], settings: DataSettings) -> bool:
    return settings.messages_column in row or CONVERSATIONS in row or (INSTRUCTION in row and OUTPUT in row)


def _at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Target losses ``[n]`` from logits at targets, or everywhere."""
    if logits.dim() == 3:
        logits = at_targets(logits, labels)
    return token_losses(logits, labels[:, 1:][target_mask(labels)])
