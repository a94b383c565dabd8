"""Rows to examples: the columns that a task needs, checked one by one, with errors that name file, line and column."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from client_app.data.example import Example
from client_app.kinds import Kind
from client_app.kinds import guess_kind as kind_for
from client_app.kinds.generation import CONVERSATIONS, IMAGES, INSTRUCTION, OUTPUT
from client_app.own.messages import (
    Turn,
    image_parts,
    read_alpaca,
    read_context,
    read_messages,
    read_prompt_and_completion,
    read_turns,
)
from client_app.own.reading.text_files import DataError, Row
from client_app.own.reading.values import missing_column, short, text_in, value_in
from client_app.settings import DataSettings, canonical_label

_NOT_IN_LABELS = ("Cc", "Cs", "Zl", "Zp")


def guess_kind(row: Mapping[str, Any], settings: DataSettings) -> str:
    """The kind of task that a row's columns are for.

    Raises:
        DataError: they fit no kind.
    """
    kind = kind_for(row, settings)
    lost = [
        f"{item.name.replace('_', '-')} = {given!r}"
        for item in fields(DataSettings)
        if item.name.endswith("_column")
        and (given := getattr(settings, item.name)) != item.default
        and not all(name.strip() in row for name in given.split(","))
    ]
    # A text alone is one to write, but not if somebody has named the column of its label.
    alone = {name: value for name, value in row.items() if name != settings.text_column}
    unlabelled = any(item.startswith("label-column") for item in lost) and kind_for(alone, settings) is None
    if kind is not None and not (kind.generative and unlabelled):
        return kind.name
    missing = f"{' and '.join(lost)}: there is no such column. Columns" if lost else "columns"
    raise DataError(
        f"{missing} {', '.join(map(repr, row))} fit no known task; expected text + label, prompt + completion, "
        "messages, conversations, instruction + output, image + label or image + text, tokens + ner_tags, "
        "question + context + answers, chosen + rejected, or anchor + positive. "
        "Columns with other names: set text-column, label-column, ... in "
        "node-config"
    )


@dataclass(frozen=True)
class RowCells:
    """A row as kinds read it; see :class:`client_app.kinds.contract.Cells`."""

    row: Row
    settings: DataSettings
    with_images: bool

    @property
    def values(self) -> Mapping[str, Any]:
        """The row's values by column."""
        return self.row.values

    def value(self, column: str) -> Any:
        """See :func:`~client_app.own.reading.values.value_in`."""
        return value_in(self.row, column)

    def text(self, column: str) -> str:
        """See :func:`~client_app.own.reading.values.text_in`."""
        return text_in(self.row, column)

    def label(self, column: str) -> str:
        """The label in a column."""
        return _label(value_in(self.row, column), f"{self.row.place}, column {column!r}")

    def label_of(self, value: Any, column: str) -> str:
        """One of the labels in a column."""
        return _label(value, f"{self.row.place}, column {column!r}")

    def images(self) -> tuple[Path | bytes, ...]:
        """The images in the image column."""
        return _images(self.row, self.settings.image_column)

    def turns(self, column: str) -> tuple[Turn, ...]:
        """The messages in a column."""
        return read_turns(self.row, column)

    def written(self) -> dict[str, Any]:
        """The text that the model should write, and its images."""
        found = _to_write(self.row, self.settings)
        parts = image_parts(found.get("messages", ()))
        if self.with_images:
            found["images"] = _images_to_write(self.row, self.settings.image_column, parts)
        elif parts:
            raise DataError(
                f"{self.row.place}: {len(parts)} images in the messages, expected none, because the task has no images "
                "(task = 'image-text-to-text' has)"
            )
        return found

    def refuse(self, column: str, message: str) -> NoReturn:
        """Raise the error of this row and column."""
        raise DataError(f"{self.row.place}, column {column!r}: {message}")


def read_example(row: Row, kind: Kind, settings: DataSettings) -> Example:
    """The example in a row.

    Raises:
        DataError: a column is missing, or its value is not usable.
    """
    return Example(row.place, **kind.read(RowCells(row, settings, kind.has_image)))


def columns_read(kind: Kind, settings: DataSettings, columns: Iterable[str]) -> set[str]:
    """Which of a row's columns :func:`read_example` looks at."""
    there = set(columns)
    return (
        {settings.split_column, settings.partition_by, settings.task_column} | kind.columns_read(there, settings)
    ) & (there - {""})


def _to_write(row: Row, settings: DataSettings) -> dict[str, Any]:
    """The text that the model should write for a row, and what comes before it, in the first known form that fits."""
    context, columns = read_context(row), row.values
    for column in (settings.messages_column, CONVERSATIONS):
        if column in columns:
            return {"messages": read_messages(row, column), "context": context}
    prompt, completion = settings.prompt_column, settings.completion_column
    if prompt in columns or completion in columns:
        if isinstance(columns.get(prompt), list) and isinstance(columns.get(completion), list):
            turns, first = read_prompt_and_completion(row, prompt, completion)
            return {"messages": turns, "first": first, "context": context}
        return {"prompt": text_in(row, prompt), "completion": text_in(row, completion), "context": context}
    if INSTRUCTION in columns and OUTPUT in columns:
        turns, asked, answer = read_alpaca(row)
        return {"messages": turns, "prompt": asked, "completion": answer, "context": context}
    if settings.text_column in columns:
        return {"completion": text_in(row, settings.text_column)}
    raise missing_column(row, prompt, f"or {settings.messages_column!r} or {settings.text_column!r}")


def _images_to_write(row: Row, column: str, parts: Sequence[Mapping[str, Any]]) -> tuple[Path | bytes, ...]:
    """The images of a conversation or prompt: those of the column, or else those that the messages name."""
    named = [part for part in parts if "image" in part]
    if column not in row.values and IMAGES not in row.values and parts and len(named) == len(parts):
        return tuple(_image(row, part["image"], f"{row.place}, an image of the messages") for part in parts)
    found = _images(row, column)
    if parts and len(parts) != len(found):
        raise DataError(f"{row.place}: {len(parts)} places for images in the messages, and {len(found)} images")
    return found


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # pandas turns integers into floats if one is missing
        return str(int(value))
    if not isinstance(value, str):
        raise DataError(f"{where}: {short(value)} is {type(value).__name__}, expected a label (text or integer)")
    label = canonical_label(value)
    if not label:
        raise DataError(f"{where}: an empty label")
    # Joiners and non-breaking spaces are parts of words and of emoji.
    if "," in label or any(unicodedata.category(letter) in _NOT_IN_LABELS for letter in label):
        raise DataError(f"{where}: label {short(label)} has a comma or a control character, expected a plain name")
    if len(label) > 200:
        raise DataError(f"{where}: a label of {len(label)} characters, expected at most 200; is this the text?")
    return label


def _images(row: Row, column: str) -> tuple[Path | bytes, ...]:
    if column not in row.values and IMAGES in row.values:
        column = IMAGES
    value, where = value_in(row, column), f"{row.place}, column {column!r}"
    several = value if isinstance(value, list) else [value]
    if not several:
        raise DataError(f"{where}: no image, expected at least one")
    return tuple(_image(row, item, where) for item in several)


def _image(row: Row, value: Any, where: str) -> Path | bytes:
    if isinstance(value, Mapping):  # an image column of datasets
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {short(value)}, expected the path of an image")
    if "\0" in value or "://" in value:
        raise DataError(f"{where}: {short(value)}, expected the path of a file on this machine")
    path = row.folder / Path(value).expanduser()
    if not path.is_file():
        raise DataError(f"{where}: there is no file {str(path)!r}")
    return path
