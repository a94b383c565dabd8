"""JSON and CSV files, read line by line: every row knows its line, and no quote or blank line swallows rows."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from client_app.own.reading.text_files import MAX_LINE, DataError, FileRows, Line, Row, TextLines, rows_of

_WRAPPED = re.compile(r'[{,]\s*"(?:data|rows|examples|instances)"\s*:\s*\[\s*\{')
"""An object on one line that is not a row but holds all of them."""
_SPACED = re.compile(r'[ \t]+".*"[ \t]*', re.DOTALL)
"""A field in quotes with a blank before them; by RFC 4180 such quotes are letters."""


def read_text_file(path: Path, suffix: str) -> FileRows:
    """Rows of a JSON, JSONL, CSV or TSV file, compressed or not; all are parsed once, for their errors.

    Raises:
        DataError: the content does not fit the name's ending; the message names line and column.
    """
    lines = TextLines(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(lines, suffix)
    if suffix == ".json" and not _is_one_object_a_line(lines):
        return FileRows(list(_json_elements(path, "\n".join(line.text for line in lines))))
    return _json_rows(lines)


def _json_rows(lines: TextLines) -> FileRows:
    blank, folder = 0, lines.path.parent

    def parse(text: str, number: int) -> Row:
        place = f"{lines.path}, line {number}"
        return Row(_parse_object(place, text), place, folder)

    def found() -> Iterator[tuple[Line, Row]]:
        nonlocal blank
        for line in lines:
            if line.text.strip():
                yield line, parse(line.text, line.number)
            else:
                blank += 1

    rows = rows_of(lines, found(), parse)
    return FileRows(rows, _blanks(blank))


def _blanks(count: int) -> list[str]:
    return [f"{count} blank lines were skipped"] if count else []


def _is_one_object_a_line(lines: TextLines) -> bool:
    """Whether each line is a row; also true for an empty file."""
    told = (line.text.strip() for line in lines)
    filled = list(itertools.islice((text for text in told if text), 2))
    if not filled:
        return True
    first, rest = filled[0], filled[1:]
    if rest or not first.startswith("{"):
        return first.startswith("{") and first.endswith("}")
    return _WRAPPED.search(first) is None


def _json_elements(path: Path, text: str) -> Iterator[Row]:
    """Objects of an array, or of the only array of objects in an object (``{"data": [...]}``), with their lines."""
    start = len(text) - len(text.lstrip())
    wrapped = text[start : start + 1] == "{"
    if wrapped:
        found = _decoder(f"{path}, line 1").decode(text) if _is_json(path, text) else {}
        lists = [k for k, v in found.items() if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)]
        if len(lists) != 1:
            raise DataError(f"{path}: one JSON object with {len(lists)} lists of objects, expected an array of objects")
        start = text.index("[", text.index(json.dumps(lists[0], ensure_ascii=lists[0] not in text)))
    if text[start : start + 1] != "[":
        raise DataError(f"{path}, line 1: expected a JSON array of objects, or one object per line")
    position, line, counted = start + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}, line {line}"
        if text[position : position + 1] == "]":
            rest = "" if wrapped else text[position + 1 :]
            if rest.strip():
                line += rest[: len(rest) - len(rest.lstrip())].count("\n")
                raise DataError(
                    f"{path}, line {line}: {rest.strip()[:30]!r} after the end of the array; were files put together?"
                )
            return
        try:
            values, position = _decoder(place).raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{place}: nested too deeply") from None
        if not isinstance(values, dict) or not values:
            raise DataError(f'{place}: a {type(values).__name__}, expected an object like {{"text": ...}}')
        yield Row(values, place, path.parent)


def _is_json(path: Path, text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deeply") from None
    return True


def _decoder(place: str) -> json.JSONDecoder:
    """A decoder that refuses what Python reads although it is not JSON, and objects in which a name occurs twice."""

    def refuse(constant: str) -> NoReturn:
        raise DataError(f"{place}: {constant} is not JSON and not a value that can be used")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{place}: column {twice!r} occurs twice")
        return found

    return json.JSONDecoder(parse_constant=refuse, object_pairs_hook=unique)


def _parse_object(place: str, line: str) -> dict[str, Any]:
    if line.lstrip().startswith("[") and place.endswith("line 1"):
        raise DataError(
            f"{place}: a JSON array, expected one object per line; call the file .json, or jq -c '.[]' FILE makes it so"
        )
    try:
        found = _decoder(place).decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply") from None
    except DataError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise DataError(f"{place}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f'{place}: a {type(found).__name__}, expected an object like {{"text": ...}}')
    if not found:
        raise DataError(f"{place}: an object without columns")
    return found


@dataclass
class _Look:
    """A CSV file's lines, each by itself: whether all have the same number of fields; how many are blank or quoted."""

    delimiter: str
    complete: bool
    blank: int = 0
    quoted: int = 0


@dataclass(frozen=True)
class _Fields:
    """A row's fields, its place, its last line, and whether a quote is doubled in it."""

    place: Line
    last: int
    doubled: bool
    fields: list[str]


def _csv_rows(lines: TextLines, suffix: str) -> FileRows:
    """Rows of a CSV file, by its quotes (RFC 4180). If quotes would hide whole rows of a TSV file, they are letters.

    Raises:
        DataError: a row is not like the header; or each line of a CSV file is a row by itself, but quotes join some.
    """
    look, findings = _look_at(lines, suffix)
    rows, joined, spaced, meant, longest = 0, 0, 0, False, (1, 1)
    try:
        for row in _by_quotes(lines, look.delimiter):
            rows += 1
            spaced += sum(_SPACED.fullmatch(field) is not None for field in row.fields)
            if row.last > row.place.number:
                joined += 1
                # If quotes are doubled, or are around most rows, then the writer knew what quotes are for.
                meant |= row.doubled
                longest = max(longest, (row.place.number, row.last), key=lambda span: span[1] - span[0])
        meant |= suffix == ".csv" and 2 * joined > rows
        hidden = look.complete and bool(joined) and not meant
    except DataError:
        if suffix != ".tsv" or not look.complete:
            raise
        hidden = True
    if hidden and suffix == ".csv":
        raise DataError(
            f"{lines.path}, line {longest[0]}: a quote joins lines {longest[0]} to {longest[1]} in one row, though "
            "each line is a row by itself; expected quotes in a text to be doubled"
        )
    if hidden:
        findings.append(f"quotes are read as they are ({look.quoted} lines): read as quotes they would join rows")
        joined, spaced = 0, 0
    if joined:
        findings.append(
            f"{joined} rows have several lines, in quotes (the longest has {longest[1] - longest[0] + 1} lines)"
        )
    else:
        findings += _blanks(look.blank)
    if spaced:
        findings.append(f"{spaced} fields have a blank before their quotes, which are read as letters")
    return FileRows(_with_header(lines, look.delimiter, quotes=not hidden), findings)


def _look_at(lines: TextLines, suffix: str) -> tuple[_Look, list[str]]:
    delimiter, findings = "," if suffix == ".csv" else "\t", []
    head = next((line.text for line in lines if line.text.strip()), "")
    if suffix == ".csv" and "," not in head and (";" in head or "\t" in head):
        delimiter = ";" if ";" in head else "\t"
        findings.append(f"fields are divided by {'semicolons' if delimiter == ';' else 'tabs'}")
    separators = head.count(delimiter)
    found = _Look(delimiter, separators > 0)
    for line in lines:
        filled = bool(line.text.strip())
        found.blank += not filled
        found.quoted += '"' in line.text
        found.complete &= not filled or line.text.count(delimiter) == separators
    return found, findings


def _by_lines(lines: Iterable[Line], delimiter: str) -> Iterator[_Fields]:
    """Each line is a row, and quotes are letters."""
    for line in lines:
        if line.text.strip():
            yield _Fields(line, line.number, False, _split(line.text, delimiter, quotes=False))


def _by_quotes(lines: TextLines, delimiter: str) -> Iterator[_Fields]:
    """Rows made of the lines by their quotes."""
    csv.field_size_limit(min(MAX_LINE, sys.maxsize))
    start, end, doubled = -1, 0, False

    def fed() -> Iterator[str]:
        nonlocal start, end, doubled
        for line in lines:
            begin, text = line.start, f"{line.text}\n"
            # A carriage return alone ends a line, too.
            for part in io.StringIO(text, newline="") if "\r" in text else (text,):
                start = begin if start < 0 else start
                begin += len(part.encode())
                end, doubled = min(begin, line.end), doubled or '""' in part
                yield part

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    first = 1
    try:
        for fields in reader:
            if fields:
                yield _Fields(Line(first, start, end, ""), reader.line_num, doubled, fields)
            first, start, doubled = reader.line_num + 1, -1, False
    except csv.Error as error:
        raise DataError(f"{lines.path}, line {first}: {error}") from None


def _split(text: str, delimiter: str, *, quotes: bool) -> list[str]:
    """The fields of one row."""
    if quotes:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    return text.rstrip("\r").split(delimiter)


def _with_header(lines: TextLines, delimiter: str, *, quotes: bool) -> Sequence[Row]:
    """The rows below the header.

    Raises:
        DataError: the header cannot be used, or a row does not fit it.
    """
    every = (_by_quotes if quotes else _by_lines)(lines, delimiter)
    first = next(every, None)
    if first is None:
        return []
    header = _header(first.fields, f"{lines.path}, line {first.place.number}")

    def row_of(fields: list[str], number: int) -> Row:
        place = f"{lines.path}, line {number}"
        if len(fields) != len(header):
            what = {",": "a comma", ";": "a semicolon"}.get(delimiter, "a tab")
            raise DataError(
                f"{place}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}); a text with {what} in "
                "it needs double quotes"
            )
        if len(header) > 1 and [name.strip().lstrip("\ufeff") for name in fields] == header:
            raise DataError(f"{place}: the header once more; expected one file, not several put together")
        if fields[0].startswith("\ufeff"):
            raise DataError(f"{place}: a byte order mark inside the file; were several files put together?")
        return Row(dict(zip(header, fields, strict=True)), place, lines.path.parent)

    def parse(text: str, number: int) -> Row:
        return row_of(_split(text, delimiter, quotes=quotes), number)

    return rows_of(lines, ((one.place, row_of(one.fields, one.place.number)) for one in every), parse)


def _header(fields: Sequence[str], place: str) -> list[str]:
    """Names of columns; the first may have none, as pandas writes the numbers of rows.

    Raises:
        DataError: one is empty, or occurs twice.
    """
    header = [name.strip() for name in fields]
    for number, name in enumerate(header, start=1):
        if not name and (number > 1 or len(header) == 1):
            raise DataError(f"{place}: field {number} of the header is empty, expected a column's name")
        if header.count(name) > 1:
            raise DataError(f"{place}: column {name!r} occurs twice in the header")
    return header
