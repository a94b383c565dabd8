"""The contract of a kind of task: its columns, tensors, loss, scores, head, and the export of its model.

A kind is stateless. What it works with comes from outside: a row (:class:`Cells`), the base model's tokenizer
(:class:`Encoding`), and the model with a mixture active (:class:`Scorer`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.data.example import Example
from client_app.settings import DataSettings

Item = dict[str, list[int]]
"""One example's inputs by name, a number for each token."""


class TaskError(ValueError):
    """There is no such kind of task, or data and model are of different kinds."""


class Cells(Protocol):
    """One row as a kind reads it. Every error names file, line and column."""

    @property
    def settings(self) -> DataSettings:
        """Names of columns."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The row's values by column."""

    def value(self, column: str) -> Any:
        """The value in a column; a missing one or null is an error."""

    def text(self, column: str) -> str:
        """A text that is not empty."""

    def label(self, column: str) -> str:
        """A label: a name or an integer."""

    def label_of(self, value: Any, column: str) -> str:
        """A value of a column as a label."""

    def images(self) -> tuple[Any, ...]:
        """The row's images: paths or encoded files."""

    def written(self) -> dict[str, Any]:
        """Fields of an example for generation, in whatever form the row has them."""

    def turns(self, column: str) -> tuple[Mapping[str, Any], ...]:
        """A list of messages."""

    def refuse(self, column: str, message: str) -> NoReturn:
        """Raise the error of this row and column."""


class Encoding(Protocol):
    """The base model's tokenizer and processors, as a kind uses them."""

    tokenizer: Any
    max_length: int
    truncated: int
    findings: Counter[str]

    def text_item(self, example: Example) -> Item:
        """One text, or two, as an encoder reads them; cut to ``max_length``."""

    def written_item(self, example: Example) -> Item:
        """A text for generation, with ``labels``: the token where it is learnt, else -100."""

    def padded(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Inputs ``[n, longest]``, padded on the right; labels with -100."""

    def dataset(self, inputs: Mapping[str, Tensor], labels: Tensor, examples: Sequence[Example]) -> Dataset:
        """A split; images are read when a batch needs them."""

    def refuse(self, example: Example, message: str) -> NoReturn:
        """Raise the error of this example's row."""


class Scorer(Protocol):
    """A model with a mixture of adapters active."""

    preference_beta: float

    @property
    def device(self) -> torch.device:
        """The base model's device."""

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on the model's device and in its dtype."""

    def logits(
        self,
        inputs: Mapping[str, Tensor],
        task: str = "",
        read: Callable[[Any, Mapping[str, Tensor]], Tensor] = ...,
        *,
        per_token: bool = False,
    ) -> Tensor:
        """The model's answer to a batch: what ``read`` takes from the model's output."""

    def target_logits(self, inputs: Mapping[str, Tensor], labels: Tensor, task: str = "") -> Tensor:
        """Logits ``[n, V]`` at the targets of generated texts."""

    def at_targets(self, inputs: Mapping[str, Tensor], labels: Tensor, task: str = "") -> Any:
        """Losses at the targets of generated texts, few logits at a time."""

    def switched(self, mixture: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Use another mixture inside the block, without dropout; no mixture means the base model alone."""


@dataclass(frozen=True)
class About:
    """A kind's row in the documentation, in Markdown: the columns that it reads, and its scores."""

    columns: str
    scores: str


class Kind:
    """What tasks of one kind have in common.

    Attributes:
        name: the value of the key ``task``.
        about: its row in the documentation.
        order: rank when the columns decide the task; kinds that need fewer columns come later.
        columns: fields of one example.
        auto_model: the class of transformers that loads a base model for it.
        peft_task: the task type of its PEFT adapters; None where PEFT has no class for it.
        head: ``labels``: one row for each label, shared if the run names the labels. ``common``: one head with the same
            meaning at every client. Empty: the model needs no new head.
        generative: whether the model writes a text.
        per_token: whether the model has an output for each token ``[b, L, ...]``.
        probabilities: whether outputs are logits of a distribution over the last axis.
        company: whether an example's loss depends on the other examples in its batch.
        own_inputs: inputs that are for the kind only, not for the model.
        evaluation_batch: most examples at once in an evaluation (logits over a vocabulary are large).
        scores: its scores beside the loss.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    order: ClassVar[int] = 0
    columns: ClassVar[tuple[str, ...]]
    auto_model: ClassVar[str]
    peft_task: ClassVar[str | None] = None
    head: ClassVar[str] = ""
    generative: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    probabilities: ClassVar[bool] = True
    company: ClassVar[bool] = False
    own_inputs: ClassVar[tuple[str, ...]] = ()
    evaluation_batch: ClassVar[int] = 64
    scores: ClassVar[tuple[str, ...]] = ()

    @property
    def has_labels(self) -> bool:
        """Whether examples have labels with names, for which the head has rows."""
        return self.head == "labels"

    @property
    def has_text(self) -> bool:
        """Whether examples have text, for which a tokenizer is needed."""
        return self.columns != ("image", "label")

    @property
    def has_image(self) -> bool:
        """Whether examples have an image, for which an image processor is needed."""
        return "image" in self.columns

    # ------------------------------------------------------------------------------------------- rows to examples

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """Whether a row's columns are for this kind."""
        raise NotImplementedError

    def read(self, cells: Cells) -> dict[str, Any]:
        """The fields of a row's :class:`~client_app.data.example.Example`."""
        raise NotImplementedError

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """Which of a row's columns :meth:`read` looks at."""
        raise NotImplementedError

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """Columns that hold the answer of a test row; the first one that exists counts."""
        return (settings.label_column,)

    def labels_named(self, settings: DataSettings) -> tuple[str, ...]:
        """Labels that the names of columns tell; none if only the examples do."""
        return ()

    def labels_of(self, example: Example) -> Sequence[str]:
        """The names of labels that an example has."""
        return [example.label] if example.label is not None else []

    # ---------------------------------------------------------------------------------------- examples to tensors

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """One split; ``labels`` are the classes in order."""
        raise NotImplementedError

    def configure(self, config: Any) -> None:
        """Change a base model's configuration before it is loaded."""

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """Texts ``[n, L]`` by input name, to find out which padding the model needs; None if that does not matter."""
        return None

    def token_ids(self, data: Dataset) -> Sequence[Tensor]:
        """All token ids that go into a model of texts."""
        return [data.inputs["input_ids"]] if "input_ids" in data.inputs else []

    # ------------------------------------------------------------------------------------------- outputs and losses

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """The model's answer to a batch of one task, on its device; for ``everywhere``, see generated texts."""
        inputs = model.inputs(self.model_inputs(batch))
        return model.logits(inputs, batch.task, self.read_output, per_token=self.per_token)

    def read_output(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The part of a model's output on ``inputs`` that this kind uses."""
        found: Tensor = output.logits
        return found

    def model_inputs(self, batch: Dataset) -> dict[str, Tensor]:
        """The inputs that go to the model."""
        return {name: tensor for name, tensor in batch.inputs.items() if name not in self.own_inputs}

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One loss for each example ``[b]``."""
        raise NotImplementedError

    def mean_loss(self, outputs: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """What training minimises: the mean over a batch's examples, or targets; for ``weights``, see :meth:`weigh`."""
        return self.example_losses(outputs, labels).mean()

    def summed_loss(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """Sum of a batch's losses, and their number."""
        return float(self.example_losses(outputs, labels).double().sum()), len(labels)

    def targets_in(self, batch: Dataset) -> int:
        """How many losses :meth:`mean_loss` averages over: the weight of a part of a batch in the whole."""
        return len(batch)

    def weigh(self, data: Dataset, asked: Sequence[float], classes: int) -> Tensor:
        """The weight of each class in training ``[C]``: as ``asked``; if nothing is asked, all classes count the same.

        Raises:
            TaskError: this kind has no classes.
        """
        raise TaskError(f"label-weights: tasks of kind {self.name!r} have no classes that could be weighed")

    # --------------------------------------------------------------------------------------------------------- scores

    def keep(self, outputs: Tensor, labels: Tensor, batch: Dataset, client: ClientData | None) -> Any:
        """The values of a batch that :meth:`metrics` needs, on the CPU."""
        return outputs.cpu(), labels.cpu()

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """Scores of a split beside its loss, from what was kept of its batches; what cannot be computed is left out."""
        raise NotImplementedError

    def whole_loss(self, kept: Sequence[Any]) -> float | None:
        """The split's loss, if it is not a sum over batches."""
        return None


def balanced(counts: Tensor) -> Tensor:
    """Weights ``[C]`` that give every class the same sum over ``counts [C]`` examples, with a mean weight of 1.

    >>> balanced(torch.tensor([6, 2])).tolist()
    [0.6666666865348816, 2.0]
    """
    there = counts > 0
    return torch.where(there, counts.sum() / (there.sum() * counts.clamp_min(1)), 1.0)


def scaled(asked: Sequence[float], counts: Tensor, kind: str) -> Tensor:
    """Weights ``[C]`` in the given proportions whose mean over ``counts [C]`` examples is 1.

    Raises:
        TaskError: there is not one positive number for each class.
    """
    if len(asked) != len(counts) or not all(0 < weight < float("inf") for weight in asked):
        raise TaskError(f"label-weights: {len(asked)} numbers, expected {len(counts)} (labels), all above 0")
    weights = torch.tensor(list(asked))
    return weights * counts.sum() / (weights * counts).sum()
