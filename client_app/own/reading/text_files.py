"""JSON and CSV files, read line by line: every row knows its line, and no quote or blank line swallows rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_WRAPPED = re.compile(r'[{,]\s*"(?:data|rows|examples|instances)"\s*:\s*\[\s*\{')
"""An object on one line that is not a row but holds all of them."""
MAX_LINE = 2**24
"""Bytes of one line or field; a longer one is a file of another format, or a mistake."""


_PLACE = re.compile(r"[^\n]*?, ((?:line|row) \d+(?:, column (?:\d+|'[^']{1,100}'))?)(?=:|,)")


class DataError(ValueError):
    """The client's data are not as expected; the message begins with the file, the line and the column."""

    @property
    def told(self) -> str:
        """Line and column, which are all that the server gets to know."""
        place = _PLACE.match(str(self))
        return place.group(1) if place else ""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, where it stands (``notes.jsonl, line 3``), and the folder it may refer to."""

    values: Mapping[str, Any]
    place: str
    folder: Path


@dataclass(frozen=True)
class FileRows:
    """A file's rows, and notes for the user on how they were read."""

    rows: Sequence[Row]
    findings: Sequence[str] = ()


def read_text_file(path: Path, suffix: str) -> FileRows:
    """Rows of a JSON, JSONL, CSV or TSV file, compressed or not.

    Raises:
        DataError: the content does not fit the name's ending; the message names line and column.
    """
    content = _read_bytes(path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, content, suffix)
    text = "" if suffix == ".jsonl" else "\n".join(line for _, line in _lines(path, content))
    if text and not _is_one_object_a_line(text):
        return FileRows(list(_json_elements(path, text)))
    return _json_rows(path, content)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # zlib's own
        raise DataError(f"{path}: is not valid gzip: {error}") from None


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """Numbered lines of UTF-8 text, checked."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}, line 1: the text is UTF-16, expected UTF-8")
    if content[:2] == b"\x1f\x8b":
        raise DataError(f"{path}, line 1: the file is compressed, but its name does not end in .gz")
    if content[:4] == b"PAR1":
        raise DataError(f"{path}, line 1: the file is Parquet, but its name does not end in .parquet")
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if len(line) > MAX_LINE:
            raise DataError(f"{path}, line {number}: {len(line)} bytes, expected at most {MAX_LINE}")
        if b"\0" in line:
            raise DataError(f"{path}, line {number}, column {line.index(0) + 1}: a NUL byte; is this a text file?")
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8"
            ) from None


def _json_rows(path: Path, content: bytes) -> FileRows:
    rows, blank = [], 0
    text = list(_lines(path, content))
    if text and text[-1][1] == "":
        text.pop()  # what follows the last line's end
    for number, line in text:
        if not line.strip():
            blank += 1
            continue
        place = f"{path}, line {number}"
        rows.append(Row(_parse_object(place, line), place, path.parent))
    return FileRows(rows, _blanks(blank))


def _blanks(count: int) -> list[str]:
    return [f"{count} blank lines were skipped"] if count else []


def _is_one_object_a_line(text: str) -> bool:
    first, *rest = text.strip().split("\n", 1)
    if rest or not first.startswith("{"):
        return first.rstrip().startswith("{") and first.rstrip().endswith("}")
    return _WRAPPED.search(first) is None


def _json_elements(path: Path, text: str) -> Iterator[Row]:
    """Objects of an array, or of the only array of objects in an object (``{"data": [...]}``), with their lines."""
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "{":
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
    """Refuses what is not JSON though Python reads it, and objects in which a name occurs twice."""

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
class _Fields:
    """Fields of each row with the first and the last of its lines."""

    rows: list[tuple[int, int, list[str]]] = field(default_factory=list)

    @property
    def longest(self) -> tuple[int, int]:
        """First and last line of the row with most lines."""
        return max(((first, last) for first, last, _ in self.rows), key=lambda row: row[1] - row[0], default=(1, 1))


def _csv_rows(path: Path, content: bytes, suffix: str) -> FileRows:
    """A CSV file is read by its quotes (RFC 4180). Where quotes would hide whole rows, a TSV file is read without.

    Raises:
        DataError: a row is not like the header; or each line of a CSV file is a row by itself, but quotes join some.
    """
    text = [line for _, line in _lines(path, content)]
    delimiter, findings = "," if suffix == ".csv" else "\t", []
    head = next((line for line in text if line.strip()), "")
    if suffix == ".csv" and "," not in head and (";" in head or "\t" in head):
        delimiter = ";" if ";" in head else "\t"
        findings.append(f"fields are divided by {'semicolons' if delimiter == ';' else 'tabs'}")
    width = len(head.split(delimiter))
    plain = _Fields([(n, n, line.rstrip("\r").split(delimiter)) for n, line in enumerate(text, 1) if line.strip()])
    complete = width > 1 and all(len(fields) == width for _, _, fields in plain.rows)
    try:
        found = _by_quotes(path, text, delimiter)
        first, last = found.longest
        longer = [row for row in found.rows if row[1] > row[0]]
        # Doubled quotes, or quotes around most rows, are those of a writer who knew what quotes are for.
        meant = any('""' in line for begin, end, _ in longer for line in text[begin - 1 : end])
        meant |= suffix == ".csv" and 2 * len(longer) > len(found.rows)
        hidden = complete and bool(longer) and not meant
    except DataError:
        if suffix != ".tsv" or not complete:
            raise
        hidden = True
    if hidden and suffix == ".csv":
        raise DataError(
            f"{path}, line {first}: a quote joins lines {first} to {last} in one row, though each line is a row by "
            "itself; expected quotes in a text to be doubled"
        )
    if hidden:
        quoted = sum('"' in line for line in text)
        findings.append(f"quotes are read as they are ({quoted} lines): read as quotes they would join rows")
        found = plain
    blank = sum(not line.strip() for line in text[:-1])
    joined = sum(last > first for first, last, _ in found.rows)
    findings += [f"{joined} rows have several lines, in quotes"] if joined else _blanks(blank)
    return FileRows(list(_with_header(path, found, delimiter)), findings)


def _by_quotes(path: Path, text: Sequence[str], delimiter: str) -> _Fields:
    csv.field_size_limit(min(MAX_LINE, sys.maxsize))
    reader = csv.reader(io.StringIO("\n".join(text), newline=""), delimiter=delimiter, strict=True)
    found, start = _Fields(), 1
    try:
        for fields in reader:
            if fields:
                found.rows.append((start, reader.line_num, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: {error}") from None
    return found


def _with_header(path: Path, found: _Fields, delimiter: str) -> Iterator[Row]:
    header: list[str] | None = None
    for line, _, fields in found.rows:
        place = f"{path}, line {line}"
        if header is None:
            header = [name.strip() for name in fields]
            for number, name in enumerate(header, start=1):
                if not name:
                    raise DataError(f"{place}: field {number} of the header is empty, expected a column's name")
                if header.count(name) > 1:
                    raise DataError(f"{place}: column {name!r} occurs twice in the header")
            continue
        if len(fields) != len(header):
            what = {",": "a comma", ";": "a semicolon"}.get(delimiter, "a tab")
            raise DataError(
                f"{place}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}); a text with {what} in "
                "it needs double quotes"
            )
        if len(header) > 1 and [name.strip().lstrip("\ufeff") for name in fields] == header:
            raise DataError(f"{place}: the header once more; expected one file, not several put together")
        yield Row(dict(zip(header, fields, strict=True)), place, path.parent)
