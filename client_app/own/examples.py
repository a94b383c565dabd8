"""Rows to examples: the columns that a task needs, checked one by one, with errors that name file, line and column."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client_app.data.task_kinds import Kind
from client_app.own.messages import (
    CONVERSATIONS,
    INPUT,
    INSTRUCTION,
    KWARGS,
    OUTPUT,
    TOOLS,
    Turn,
    image_parts,
    read_alpaca,
    read_context,
    read_messages,
    read_prompt_and_completion,
)
from client_app.own.reading.text_files import DataError, Row
from client_app.own.reading.values import missing_column, short, text_in, value_in
from client_app.settings import DataSettings, canonical_label

IMAGES = "images"
"""The column of conversations with images, as TRL calls it; taken where there is no image column."""
_NOT_IN_LABELS = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Example:
    """One checked example; what its task does not have is None.

    ``text`` and ``pair`` for classification; ``prompt`` (None: the text has none) and ``completion``, or ``messages``,
    for generation, or both, where the prompt is for models without a chat template. ``context`` is what a chat template
    gets beside the messages (tools), ``first`` the first message that may be learnt. An image is a path or an encoded
    file.
    """

    place: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Turn, ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0
    images: tuple[Path | bytes, ...] = ()

    @property
    def content(self) -> str:
        """What two copies of one example have in common."""
        seen = [image_digest(image) for image in self.images]
        # "None" is how texts were divided from the first version on: another word would be another division.
        image = seen if len(seen) > 1 else seen[0] if seen else "None"
        told = [self.text, self.pair, self.label, self.prompt, self.completion, self.messages, image]
        return json.dumps([*told, self.context, self.first] if self.context or self.first else told, default=str)


def guess_kind(columns: Sequence[str], settings: DataSettings) -> str:
    """The kind of task that these columns are for.

    Raises:
        DataError: they are for none.
    """
    has = {
        name: getattr(settings, f"{name}_column").split(",")[0].strip() in columns
        for name in ("text", "label", "prompt", "completion", "messages", "image")
    }
    if has["image"] and has["label"]:
        return "image-text-classification" if has["text"] else "image-classification"
    has["messages"] |= CONVERSATIONS in columns or {INSTRUCTION, OUTPUT} <= set(columns)
    if (has["image"] or IMAGES in columns) and (has["completion"] or has["text"] or has["messages"]):
        return "image-text-to-text"
    if has["label"] and has["text"]:
        return "text-classification"
    if has["messages"] or (has["prompt"] and has["completion"]) or has["text"]:
        return "causal-lm"
    raise DataError(
        f"columns {', '.join(map(repr, columns))} are for no known task; expected text + label, prompt + completion, "
        "messages, conversations, instruction + output, image + label or image + text. "
        "Columns with other names: set text-column, label-column, ... in "
        "node-config"
    )


def read_example(row: Row, kind: Kind, settings: DataSettings) -> Example:
    """The example in a row.

    Raises:
        DataError: a column is missing, or its value is not usable.
    """
    found: dict[str, Any] = {"place": row.place}
    if not kind.generative:
        if kind.has_image:
            found["images"] = _images(row, settings.image_column)
            if len(found["images"]) != 1:
                raise DataError(f"{row.place}: {len(found['images'])} images, expected one")
        found["label"] = _label(row, settings.label_column)
        if kind.has_text:
            names = [name.strip() for name in settings.text_column.split(",")]
            if len(names) > 2:
                raise DataError(f"text-column = {settings.text_column!r}: at most two columns, like premise,hypothesis")
            found["text"] = text_in(row, names[0])
            found["pair"] = text_in(row, names[1]) if len(names) == 2 else None
        return Example(**found)
    found |= _to_write(row, settings)
    parts = image_parts(found.get("messages", ()))
    if kind.has_image:
        found["images"] = _images_to_write(row, settings.image_column, parts)
    elif parts:
        raise DataError(
            f"{row.place}: {len(parts)} images in the messages, expected none, because the task has no images "
            "(task = 'image-text-to-text' has)"
        )
    return Example(**found)


def columns_read(kind: Kind, settings: DataSettings, columns: Iterable[str]) -> set[str]:
    """Which of the columns of a row :func:`read_example` looks at."""
    found = {settings.split_column, settings.partition_by} | (
        {settings.image_column, IMAGES} if kind.has_image else set()
    )
    if not kind.generative:
        found |= {settings.label_column} | {name.strip() for name in settings.text_column.split(",") if kind.has_text}
        return found & set(columns)
    forms = (
        *((settings.messages_column,), (CONVERSATIONS,), (settings.prompt_column, settings.completion_column)),
        *((INSTRUCTION, INPUT, OUTPUT), (settings.text_column,)),
    )
    form = next((form for form in forms if form[0] in columns or form[-1] in columns), ())
    return (found | set(form) | ({TOOLS, KWARGS} if form != forms[-1] else set())) & set(columns)


def _to_write(row: Row, settings: DataSettings) -> dict[str, Any]:
    """What a model is to write for a row, and after what: the first of the known forms that it has."""
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
    """The images of a conversation or prompt: those of the column, or else those that the messages name themselves."""
    named = [part for part in parts if "image" in part]
    if column not in row.values and IMAGES not in row.values and parts and len(named) == len(parts):
        return tuple(_image(row, part["image"], f"{row.place}, an image of the messages") for part in parts)
    found = _images(row, column)
    if parts and len(parts) != len(found):
        raise DataError(f"{row.place}: {len(parts)} places for images in the messages, and {len(found)} images")
    return found


def _label(row: Row, column: str) -> str:
    value, where = value_in(row, column), f"{row.place}, column {column!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # pandas' integers beside a missing one
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


@functools.lru_cache(maxsize=100_000)
def _digest_of(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_digest(image: Path | bytes | None) -> str | None:
    """SHA-256 of an image's file: a copy under another name, or in another folder, is the same image."""
    if isinstance(image, Path):
        stat = image.stat()
        return _digest_of(image, stat.st_size, stat.st_mtime_ns)
    return None if image is None else hashlib.sha256(image).hexdigest()


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
