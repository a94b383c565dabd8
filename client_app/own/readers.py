"""Rows out of whatever the data are in: JSONL, CSV, Parquet, folders of images, Hugging Face data sets.

Every row knows where it stands, because every complaint about it must say so. JSONL and CSV are read line by line here:
the readers of ``datasets`` guess types over the whole file and cannot name a line. The rest goes through ``datasets``.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"} | {
    "val": "validation", "dev": "validation", "test": "test", "eval": "test"
}  # fmt: skip
TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_PLACE = re.compile(r"[^\n]*?, ((?:line|row) \d+(?:, column (?:\d+|'[^']{1,100}'))?)(?=:|,)")
MAX_LINE = 2**24
"""Bytes of one line or field; a longer one is a file of another format, or a mistake."""


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
class Table:
    """All rows with the split that each is in, or None where splits are still to be made."""

    rows: Sequence[Row]
    splits: Sequence[str | None]
    blank_lines: int = 0


def read_table(path: str, config: str = "", cache_dir: Path | None = None) -> Table:
    """Rows of a file, of a folder (one file or sub-folder per split, or images by class), or of a hub id.

    Raises:
        DataError: there is no such file, or its content is not what its name says.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _table({None: [local]}, cache_dir)
    if local.is_dir():
        return _read_folder(local, cache_dir)
    if path.startswith((".", "/", "~")) or local.suffix in (*TEXT_SUFFIXES, ".parquet", ".gz") or path.count("/") > 1:
        raise DataError(f"data-path {path!r}: there is no such file or folder ({local.absolute()})")
    return _read_hub(path, config)


def stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files below a data path: it changes when the data do (a hub id has none)."""
    if not path:
        return ()
    local = Path(path).expanduser()
    files = sorted(local.rglob("*")) if local.is_dir() else [local]
    found = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def _read_folder(folder: Path, cache_dir: Path | None) -> Table:
    files: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and _format_of(path) is not None:
            stem = re.split(r"[.\-_]", path.name.lower())[0]
            if stem == "metadata":
                continue
            if stem not in SPLIT_NAMES:
                raise DataError(
                    f"{path}: in a folder every file's name must begin with its split (train, validation or test), "
                    f"found {path.name!r}; to use one file, set data-path to it"
                )
            files.setdefault(SPLIT_NAMES[stem], []).append(path)
    if files:
        return _table(files, cache_dir)
    return _read_images(folder)


def _table(files: Mapping[str | None, Sequence[Path]], cache_dir: Path | None) -> Table:
    rows: list[Row] = []
    splits: list[str | None] = []
    blank = 0
    for split, paths in files.items():
        for path in paths:
            found, skipped = _read_file(path, cache_dir)
            if not found:
                raise DataError(f"{path}: no rows")
            rows += found
            splits += [split] * len(found)
            blank += skipped
    return Table(rows, splits, blank)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT_SUFFIXES, ".parquet") else None


def _read_file(path: Path, cache_dir: Path | None) -> tuple[list[Row], int]:
    kind = _format_of(path)
    if kind is None:
        expected = ".jsonl, .csv, .tsv (each also .gz) or .parquet"
        raise DataError(f"{path}: the name ends in {path.suffix or 'nothing'!r}, expected {expected}")
    if kind == ".parquet":
        return _read_parquet(path, cache_dir), 0
    content = _read_bytes(path)
    if kind in (".csv", ".tsv"):
        return list(_csv_rows(path, content, "," if kind == ".csv" else "\t")), 0
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


def _json_rows(path: Path, content: bytes) -> tuple[list[Row], int]:
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
    return rows, blank


def _parse_object(place: str, line: str) -> dict[str, Any]:
    if line.lstrip().startswith("[") and place.endswith("line 1"):
        raise DataError(f"{place}: a JSON array, expected one object per line: jq -c '.[]' FILE makes it so")

    def refuse(constant: str) -> NoReturn:
        raise DataError(f"{place}: {constant} is not JSON and not a value that can be used")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{place}: column {name!r} occurs twice")
        return dict(pairs)

    try:
        found = json.loads(line, parse_constant=refuse, object_pairs_hook=unique)
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


def _csv_rows(path: Path, content: bytes, delimiter: str) -> Iterator[Row]:
    text = "\n".join(line for _, line in _lines(path, content))
    csv.field_size_limit(min(MAX_LINE, sys.maxsize))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            place, start = f"{path}, line {start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                for number, name in enumerate(header, start=1):
                    if not name:
                        raise DataError(f"{place}: field {number} of the header is empty, expected a column's name")
                    if header.count(name) > 1:
                        raise DataError(f"{place}: column {name!r} occurs twice in the header")
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{place}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}); a text with "
                    f"{'a comma' if delimiter == ',' else 'a tab'} in it needs double quotes"
                )
            yield Row(dict(zip(header, fields, strict=True)), place, path.parent)
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: {error}") from None


def _read_parquet(path: Path, cache_dir: Path | None) -> list[Row]:
    import datasets

    try:
        found = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # pyarrow's and datasets' have no common class
        cause = error.__cause__ or error
        raise DataError(f"{path}: is not valid Parquet: {str(cause).splitlines()[0]}") from None
    return list(_dataset_rows(found, str(path), path.parent))


def _dataset_rows(found: Any, name: str, folder: Path) -> Iterator[Row]:
    import datasets

    named: dict[str, list[str]] = {}
    for column, feature in list((found.features or {}).items()):
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            names = feature.names
            found = found.cast_column(column, datasets.Value("int64"))
            named[column] = names
    for number, values in enumerate(found, start=1):
        for column, names in named.items():
            known = values[column] is not None and 0 <= values[column] < len(names)
            values = {**values, column: names[values[column]] if known else None}
        yield Row(values, f"{name}, row {number}", folder)


def _read_images(folder: Path) -> Table:
    """Folders named after classes, below folders named after splits or not; through ``datasets``' image folder."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    by_split = [path for path in inside if path.name.lower() in SPLIT_NAMES]
    rows: list[Row] = []
    splits: list[str | None] = []
    for root in by_split or [folder]:
        split = SPLIT_NAMES[root.name.lower()] if by_split else None
        for kind in sorted(path for path in root.iterdir() if path.is_dir()):
            for path in sorted(kind.iterdir()):
                if path.name.startswith("."):
                    continue
                if path.suffix.lower() not in IMAGE_SUFFIXES:
                    raise DataError(f"{path}: not an image, expected one of {', '.join(IMAGE_SUFFIXES)}")
                rows.append(Row({"image": str(path), "label": kind.name}, str(path), kind))
                splits.append(split)
    if not rows:
        raise DataError(
            f"{folder}: found neither data files (train.jsonl, test.csv, ...) nor images in folders named after classes"
        )
    return Table(rows, splits)


def _read_hub(name: str, config: str) -> Table:
    import datasets

    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # its errors have no common class
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data-path {name!r} is neither a file or folder here nor a data set in the Hugging Face cache or hub. "
            f'Where there is a network: python -c "import datasets; datasets.load_dataset({name!r}'
            f'{f", {config!r}" if config else ""})". ({type(error).__name__}: {reason})'
        ) from None
    rows: list[Row] = []
    splits: list[str | None] = []
    for split, part in found.items():
        if str(split).lower() not in SPLIT_NAMES:
            continue
        new = list(_dataset_rows(part, f"{name}/{split}", Path()))
        rows += new
        splits += [SPLIT_NAMES[str(split).lower()]] * len(new)
    if not rows:
        raise DataError(f"data-path {name!r} has the splits {', '.join(map(str, found))}, expected one called train")
    return Table(rows, splits)
