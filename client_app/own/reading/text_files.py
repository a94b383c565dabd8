"""Text files: their lines, checked, a few in memory at a time; and rows that stay in their file.

A row that stays in its file is read again whenever it is needed, so that a large file is never in memory as a whole.
"""

from __future__ import annotations

import bisect
import gzip
import os
import re
import shutil
import tempfile
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
MAX_LINE = 2**24
"""Most bytes of one line or field; a longer one means another file format, or a mistake."""
IN_MEMORY_BYTES = 2**23
"""Rows of files up to this size stay in memory; those of larger files are read again when they are needed."""
_BLOCK = 2**18

_PLACE = re.compile(r"[^\n]*?, ((?:line|row) \d+(?:, column (?:\d+|'[^']{1,100}'))?)(?=:|,)")


class DataError(ValueError):
    """The client's data are not as expected; the message begins with the file, the line and the column."""

    @property
    def told(self) -> str:
        """Line and column; the server learns nothing else."""
        place = _PLACE.match(str(self))
        return place.group(1) if place else ""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, its place (``notes.jsonl, line 3``), and the folder it may refer to."""

    values: Mapping[str, Any]
    place: str
    folder: Path


@dataclass(frozen=True)
class FileRows:
    """A file's rows, and notes for the user on how they were read."""

    rows: Sequence[Row]
    findings: Sequence[str] = ()


class Line(NamedTuple):
    """One line without its end, its number from 1, and where its bytes begin and end."""

    number: int
    start: int
    end: int
    text: str


class TextLines:
    """The lines of a UTF-8 text file, which can be read again; a compressed file is unpacked to a nameless one.

    Raises:
        DataError: it cannot be opened or unpacked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self._stamp = self._stamped()

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self._stamp[0]

    def __iter__(self) -> Iterator[Line]:
        """Every line, checked.

        Raises:
            DataError: it is not text, or not UTF-8; names line and column.
        """
        at, number, rest = self._begin(), 0, b""
        begin = at
        while block := self._read(at, _BLOCK):
            at += len(block)
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                yield self._line(number, begin, line)
                begin += len(line) + 1
            if len(rest) > MAX_LINE:
                raise DataError(
                    f"{self.path}, line {number + 1}: more than {MAX_LINE} bytes, expected at most {MAX_LINE}"
                )
        if rest:
            yield self._line(number + 1, begin, rest)

    def between(self, start: int, end: int) -> str:
        """The text of bytes that were read as lines before."""
        return self._read(start, end - start).decode("utf-8")

    def _begin(self) -> int:
        """Where the text begins, after a byte order mark."""
        first = self._read(0, 4)
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{self.path}, line 1: the text is UTF-16, expected UTF-8")
        if first[:2] == b"\x1f\x8b":
            raise DataError(f"{self.path}, line 1: the file is compressed, but its name does not end in .gz")
        if first == b"PAR1":
            raise DataError(f"{self.path}, line 1: the file is Parquet, but its name does not end in .parquet")
        return 3 if first[:3] == b"\xef\xbb\xbf" else 0

    def _line(self, number: int, start: int, line: bytes) -> Line:
        if len(line) > MAX_LINE:
            raise DataError(f"{self.path}, line {number}: {len(line)} bytes, expected at most {MAX_LINE}")
        if b"\0" in line:
            where = f"line {number}, column {line.index(0) + 1}"
            raise DataError(f"{self.path}, {where}: a NUL byte; is this a text file?")
        try:
            return Line(number, start, start + len(line), line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}, line {number}, column {error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8"
            ) from None

    def _read(self, start: int, size: int) -> bytes:
        with self._lock:
            if self._stamped() != self._stamp:
                raise DataError(f"{self.path}: was changed while it was read")
            self._file.seek(start)
            return self._file.read(size)

    def _stamped(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns


def _opened(path: Path) -> IO[bytes]:
    try:
        if path.suffix.lower() != ".gz":
            return path.open("rb")
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the lines that are read from it
        with gzip.open(path) as file:
            shutil.copyfileobj(file, unpacked, _BLOCK)
        unpacked.flush()
        return unpacked
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except Exception as error:  # zlib's own class
        raise DataError(f"{path}: is not valid gzip: {error}") from None


class RowSequence(Sequence[Row]):
    """Rows that are made when they are needed; a slice of them is a list."""

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """One row, or some."""
        if isinstance(at, slice):
            return [self.row(position) for position in range(*at.indices(len(self)))]
        return self.row(range(len(self))[at])

    def row(self, position: int) -> Row:
        """The row at a position from 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredRows(RowSequence):
    """Rows that stay in their file.

    Args:
        lines: the file's lines.
        parse: makes a row of its text and the number of its first line.
        starts: where each row's bytes begin; ``ends``: where they end; ``numbers``: each row's first line.
    """

    lines: TextLines
    parse: Callable[[str, int], Row]
    starts: Sequence[int] = field(default_factory=lambda: array("q"))
    ends: Sequence[int] = field(default_factory=lambda: array("q"))
    numbers: Sequence[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, position: int) -> Row:
        """See :meth:`RowSequence.row`."""
        text = self.lines.between(self.starts[position], self.ends[position])
        return self.parse(text, self.numbers[position])


@dataclass(frozen=True)
class JoinedRows(RowSequence):
    """Rows of several files, one file after another."""

    parts: Sequence[Sequence[Row]]
    ends: Sequence[int]

    @classmethod
    def of(cls, parts: Sequence[Sequence[Row]]) -> Sequence[Row]:
        """All rows of all parts."""
        if all(isinstance(part, list) for part in parts):
            return [row for part in parts for row in part]
        ends, total = [], 0
        for part in parts:
            total += len(part)
            ends.append(total)
        return cls(parts, ends)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from part

    def row(self, position: int) -> Row:
        """See :meth:`RowSequence.row`."""
        number = bisect.bisect_right(self.ends, position)
        return self.parts[number][position - (self.ends[number - 1] if number else 0)]


@dataclass(frozen=True)
class ChosenRows(RowSequence):
    """Some rows of a sequence, by their positions in it."""

    rows: Sequence[Row]
    positions: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[Row], positions: Sequence[int]) -> Sequence[Row]:
        """The rows at these positions, in that order."""
        return [rows[n] for n in positions] if isinstance(rows, list) else cls(rows, array("q", positions))

    def __len__(self) -> int:
        return len(self.positions)

    def row(self, position: int) -> Row:
        """See :meth:`RowSequence.row`."""
        return self.rows[self.positions[position]]


def rows_of(lines: TextLines, found: Iterable[tuple[Line, Row]], parse: Callable[[str, int], Row]) -> Sequence[Row]:
    """Rows as they are found: in memory for a small file; for a large one, in the file.

    Args:
        lines: the file's lines.
        found: each row with its first line: the line's number, and where the row's bytes begin and end.
        parse: makes the same row again.
    """
    if lines.size <= IN_MEMORY_BYTES:
        return [row for _, row in found]
    starts, ends, numbers = array("q"), array("q"), array("q")
    for place, _ in found:
        starts.append(place.start)
        ends.append(place.end)
        numbers.append(place.number)
    return StoredRows(lines, parse, starts, ends, numbers)
