"""Rows to examples: the columns that a task needs, checked one by one, with errors that name file, line and column."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.data.task_kinds import Kind
from client_app.own.readers import DataError, Row
from client_app.settings import DataSettings

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One checked example; what its task does not have is None.

    ``text`` and ``pair`` for classification; ``prompt`` (None: the text has none) and ``completion``, or ``messages``,
    for generation. ``image`` is a path or an encoded file.
    """

    place: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    image: Path | bytes | None = None

    @property
    def content(self) -> str:
        """What two copies of one example have in common."""
        # Not where the folder lies: a copy of it elsewhere is divided in the same way.
        image = "/".join(self.image.parts[-2:]) if isinstance(self.image, Path) else repr(self.image)
        return json.dumps([self.text, self.pair, self.label, self.prompt, self.completion, self.messages, image])


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
    if has["image"] and (has["completion"] or has["text"]):
        return "image-text-to-text"
    if has["label"] and has["text"]:
        return "text-classification"
    if has["messages"] or (has["prompt"] and has["completion"]) or has["text"]:
        return "causal-lm"
    raise DataError(
        f"columns {', '.join(map(repr, columns))} are for no known task; expected text + label, prompt + completion, "
        "messages, image + label or image + text. Columns with other names: set text-column, label-column, ... in "
        "node-config"
    )


def read_example(row: Row, kind: Kind, settings: DataSettings) -> Example:
    """The example in a row.

    Raises:
        DataError: a column is missing, or its value is not usable.
    """
    found: dict[str, Any] = {"place": row.place}
    if kind.has_image:
        found["image"] = _image(row, settings.image_column)
    if not kind.generative:
        found["label"] = _label(row, settings.label_column)
        if kind.has_text:
            names = [name.strip() for name in settings.text_column.split(",")]
            if len(names) > 2:
                raise DataError(f"text-column = {settings.text_column!r}: at most two columns, like premise,hypothesis")
            found["text"] = _text(row, names[0])
            found["pair"] = _text(row, names[1]) if len(names) == 2 else None
        return Example(**found)
    if settings.messages_column in row.values:
        return Example(**found, messages=_messages(row, settings.messages_column))
    if settings.prompt_column in row.values or settings.completion_column in row.values:
        prompt, completion = _text(row, settings.prompt_column), _text(row, settings.completion_column)
        return Example(**found, prompt=prompt, completion=completion)
    if settings.text_column in row.values:
        return Example(**found, completion=_text(row, settings.text_column))
    raise _missing(row, settings.prompt_column, f"or {settings.messages_column!r} or {settings.text_column!r}")


def _missing(row: Row, column: str, more: str = "") -> DataError:
    close = difflib.get_close_matches(column, row.values, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}? Then set the name of the column in node-config)" if close else ""
    return DataError(
        f"{row.place}: no column {column!r}{f' {more}' if more else ''}{hint}; found {', '.join(map(repr, row.values))}"
    )


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise _missing(row, column)
    value = row.values[column]
    if value is None:
        raise DataError(f"{row.place}, column {column!r}: null, expected a value")
    return value


def _text(row: Row, column: str) -> str:
    return _checked_text(_value(row, column), f"{row.place}, column {column!r}")


def _checked_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {_short(value)} is {type(value).__name__}, expected text")
    if not value.strip():
        raise DataError(f"{where}: an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        ) from None
    return value


def _label(row: Row, column: str) -> str:
    value, where = _value(row, column), f"{row.place}, column {column!r}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {_short(value)} is {type(value).__name__}, expected a label (text or integer)")
    label = value.strip()
    if not label:
        raise DataError(f"{where}: an empty label")
    if "," in label or not label.isprintable():
        raise DataError(f"{where}: label {_short(label)} has a comma or a control character, expected a plain name")
    if len(label) > 200:
        raise DataError(f"{where}: a label of {len(label)} characters, expected at most 200; is this the text?")
    return label


def _messages(row: Row, column: str) -> tuple[Mapping[str, str], ...]:
    value, where = _value(row, column), f"{row.place}, column {column!r}"
    if isinstance(value, str):  # in a CSV file
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f"{where}: not a JSON list of messages") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: {_short(value)}, expected a list of messages")
    turns = []
    for number, turn in enumerate(value, start=1):
        at = f"{where}, message {number}"
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise DataError(f"{at}: {_short(turn)}, expected an object with role and content")
        if turn["role"] not in ROLES:
            raise DataError(f"{at}: role {_short(turn['role'])}, expected one of {', '.join(ROLES)}")
        if turn["role"] == "system" and number > 1:
            raise DataError(f"{at}: a system message, expected it first or not at all")
        turns.append({"role": str(turn["role"]), "content": _checked_text(turn["content"], f"{at}, content")})
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is the {turns[-1]['role']}'s, expected the assistant's")
    if not any(turn["role"] == "user" for turn in turns):
        raise DataError(f"{where}: no message of the user")
    return tuple(turns)


def _image(row: Row, column: str) -> Path | bytes:
    value, where = _value(row, column), f"{row.place}, column {column!r}"
    if isinstance(value, Mapping):  # an image column of datasets
        if value.get("bytes"):
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {_short(value)}, expected the path of an image")
    if "\0" in value or "://" in value:
        raise DataError(f"{where}: {_short(value)}, expected the path of a file on this machine")
    path = row.folder / Path(value).expanduser()
    if not path.is_file():
        raise DataError(f"{where}: there is no file {str(path)!r}")
    return path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
