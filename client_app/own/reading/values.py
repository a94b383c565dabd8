"""The values of a row, checked one by one; errors name file, line and column."""

from __future__ import annotations

import difflib
from typing import Any

from client_app.own.reading.text_files import DataError, Row


def value_in(row: Row, column: str) -> Any:
    """A row's value in a column.

    Raises:
        DataError: no such column, or null.
    """
    if column not in row.values:
        raise missing_column(row, column)
    value = row.values[column]
    if value is None:
        raise DataError(f"{row.place}, column {column!r}: null, expected a value")
    return value


def text_in(row: Row, column: str) -> str:
    """The text that a row has in a column.

    Raises:
        DataError: there is none, or it is empty.
    """
    return checked_text(value_in(row, column), f"{row.place}, column {column!r}")


def checked_text(value: Any, where: str) -> str:
    """A text that is not empty and can be written as UTF-8.

    Raises:
        DataError: it is something else; the message begins with ``where``.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {short(value)} is {type(value).__name__}, expected text")
    if not value.strip():
        raise DataError(f"{where}: an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        ) from None
    return value


def missing_column(row: Row, column: str, more: str = "") -> DataError:
    """The error for a column that a row lacks; names one with a similar name."""
    close = difflib.get_close_matches(column, row.values, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}? Then set the name of the column in node-config)" if close else ""
    return DataError(
        f"{row.place}: no column {column!r}{f' {more}' if more else ''}{hint}; found {', '.join(map(repr, row.values))}"
    )


def short(value: Any) -> str:
    """A value in the form that errors show."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
