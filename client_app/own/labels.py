"""Labels of a client's rows: which rows have one, what they are called, and whether they are names at all."""

from __future__ import annotations

import difflib
import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from client_app.kinds import Kind
from client_app.kinds.regression import is_fraction, number_in
from client_app.own.checked import Checked
from client_app.own.reading.readers import Table
from client_app.own.reading.text_files import ChosenRows, DataError, Row
from client_app.settings import DataSettings, Settings

_UNLABELLED = {"None", "", "-1"}
"""What benchmarks' test splits have instead of a label, as text."""
_MISSING = {"nan", "none", "null", "na", "n/a", "<na>"}
"""How programs write that a value is missing."""
_LOOKED_AT = 1000
"""How many rows tell whether labels are measured numbers."""


def first_trained(table: Table) -> Row | None:
    """The first row that is trained on."""
    return next(_trained(table), None)


def most_telling(table: Table, first: Row, settings: Settings) -> Row:
    """The row by which the kind of task is guessed: the first, or one whose label shows that labels are measured.

    A first label of ``5.0`` is a name or a number; if all are numbers and a later one is ``3.8``, they are numbers.
    """
    column = settings.data.label_column
    if column not in first.values:
        return first
    if settings.model.labels:  # then labels are names, whatever they look like
        told = first.values[column]
        return replace(first, values={**first.values, column: "a name" if is_fraction(told) else told})
    found = None
    for row in itertools.islice(_trained(table), _LOOKED_AT):
        value = row.values.get(column)
        if not _is_number_or_missing(value):
            return row if row.values.keys() == first.values.keys() else first
        if found is None and is_fraction(value):
            found = row
    return found or first


def without_unlabelled(table: Table, first: Row, kind: Kind, data: DataSettings) -> Table:
    """Leave out test and validation splits without any label, as in benchmarks and competitions.

    Their examples then come from train, as if the data had no such split. ``first`` is the first row of train.
    """
    column = next((name for name in kind.unlabelled_by(data) if name in first.values), "")
    held_out = {"validation", "test"} & set(table.splits)
    if not column or not held_out:
        return table
    seen: dict[str, set[str]] = {name: set() for name in held_out}
    numbered = False
    for row, split in zip(table.rows, table.splits, strict=True):
        told = _told(row.values.get(column), kind)
        if split in held_out:
            seen[split].add(told if told in _UNLABELLED else "a label")
        else:
            numbered |= told == "-1"
    missing = _UNLABELLED - ({"-1"} if numbered else set())
    left_out = [name for name in ("validation", "test") if name in held_out and seen[name] <= missing]
    findings = [f"{table.splits.count(name)} rows of {name} have no {column!r} and are left out" for name in left_out]
    kept = [number for number, split in enumerate(table.splits) if split not in left_out]
    rows = ChosenRows.of(table.rows, kept) if left_out else table.rows
    return Table(rows, [table.splits[n] for n in kept], [*table.findings, *findings])


def labels_in_order(examples: Checked, known: Sequence[str], *, asked: bool) -> tuple[str, ...]:
    """Class names in order: those that are known, else this client's own (numbers by value, then names).

    Args:
        examples: all of them.
        known: labels that all clients share, or that columns are named after; none: those of the examples.
        asked: whether somebody has said that the labels are names, by naming the task.

    Raises:
        DataError: a label is not one of those known, there are less than two, or they are measured numbers.
    """
    names = examples.names
    unknown = next((number for number, name in enumerate(names) if name not in known), None)
    if known and unknown is not None:
        close = difflib.get_close_matches(names[unknown], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(
            f"{_place_of(examples, unknown)}: label {names[unknown]!r} is not one of the labels of this run "
            f"({', '.join(known)}){hint}"
        )
    if known:
        return tuple(known)
    if len(names) < 2:
        only = f"the only label is {names[0]!r}" if names else "there is no label"
        raise DataError(f"{examples[0].place}: {only}, expected at least two")
    if not examples.kind.per_token and all(count == len(examples) for count in examples.counts().values()):
        raise DataError(
            f"{examples[0].place}: every example has each of the {len(names)} labels ({', '.join(names)[:60]}); "
            "expected the names of the labels that a row has, or a column for each (label-column = 'first,second')"
        )
    measured = next((number for number, name in enumerate(names) if is_fraction(name)), None)
    if measured is not None and not asked and all(_is_number_or_missing(name) for name in names):
        raise DataError(
            f"{_place_of(examples, measured)}: label {names[measured]!r} is a number that is not an integer; expected "
            f"task = 'regression' to learn numbers, or task = {examples.kind.name!r} to take them for names"
        )
    return tuple(sorted(names, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name)))


def remarks_on(labels: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """What is strange about the names of labels, in numbers."""
    found = []
    alike = look_alikes(labels)
    if alike:
        found.append(f"{alike} of {len(labels)} labels look like another one (case, width, zeros, what is not seen)")
    missing = sum(counts.get(label, 0) for label in labels if label.casefold() in _MISSING)
    if missing:
        found.append(f"{missing} examples have a label that spells a missing value (nan, none, null, na)")
    return found


def look_alikes(labels: Iterable[str]) -> int:
    """How many labels a reader takes for another one: they differ in case, width, blanks, zeros or what is not seen.

    >>> look_alikes(["yes", "Yes", "no", "1", "1.0", "01"])
    5
    """
    seen = Counter(_as_seen(label) for label in labels)
    return sum(count for count in seen.values() if count > 1)


def _trained(table: Table) -> Iterator[Row]:
    pairs = zip(table.rows, table.splits, strict=True)
    return (row for row, split in pairs if split in (None, "train"))


def _is_number_or_missing(value: Any) -> bool:
    return value is None or value == "" or number_in(value) is not None


def _told(value: Any, kind: Kind) -> str:
    """What a row tells as its label; a list tells what all of its values tell."""
    if isinstance(value, list) and (value or (kind.per_token and kind.has_labels)):
        told = {_told(item, kind) for item in value} or {""}
        return told.pop() if len(told) == 1 else "several"
    if isinstance(value, float) and math.isnan(value):
        return "None"
    return "-1" if number_in(value) == -1 else str(value).strip()


def _place_of(examples: Checked, label: int) -> str:
    """The place of the first example with the label of this number."""
    at = int(np.searchsorted(examples.ends, np.argmax(examples.labels == label), side="right"))
    return examples[at].place


def _as_seen(label: str) -> str:
    plain = unicodedata.normalize("NFKC", label).casefold().removesuffix(".0")
    plain = "".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Zs"))
    return plain.lstrip("0").rjust(1, "0") if plain.isdecimal() else plain


def _is_integer(name: str) -> bool:
    return name.lstrip("-").isdecimal() and name.isascii()
