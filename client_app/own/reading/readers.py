"""Rows of data in any known form: JSONL, CSV, Parquet, folders of images, Hugging Face data sets.

Every row knows its place in the file, so that errors can name it. JSONL and CSV are read line by line here:
the readers of ``datasets`` guess types over the whole file and cannot name a line. The rest goes through ``datasets``.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.own.reading.json_and_csv import read_text_file
from client_app.own.reading.text_files import (
    IN_MEMORY_BYTES,
    TEXT_SUFFIXES,
    DataError,
    FileRows,
    JoinedRows,
    Row,
    RowSequence,
)

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"} | {
    "val": "validation", "dev": "validation", "test": "test", "eval": "test"
}  # fmt: skip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_ARROW = (".parquet", ".arrow")


@dataclass(frozen=True)
class Table:
    """All rows, each with its split, or None if splits are still to be made."""

    rows: Sequence[Row]
    splits: Sequence[str | None]
    findings: Sequence[str] = ()


def read_table(path: str, config: str = "", cache_dir: Path | None = None) -> Table:
    """Rows of a file, of several (``part-*.jsonl``), of a folder, or of a hub id.

    A folder has one file or more for each split, images by class, or a data set of ``datasets`` (as ``save_to_disk``
    writes it or the hub has it, with a folder or a paragraph of README.md for each configuration).

    Raises:
        DataError: there is no such file, or its content is not what its name says.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _table([(None, local)], cache_dir)
    if local.is_dir():
        return _read_folder(local, cache_dir, config)
    several = _matching(path)
    if several:
        return _read_several(several, cache_dir)
    if path.startswith((".", "/", "~")) or local.suffix in (*TEXT_SUFFIXES, ".parquet", ".gz") or path.count("/") > 1:
        raise DataError(f"data-path {path!r}: there is no such file or folder ({local.absolute()})")
    return _read_hub(path, config)


def stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files below a data path: it changes when the data do (a hub id has none)."""
    if not path:
        return ()
    local = Path(path).expanduser()
    files = sorted(local.rglob("*")) if local.is_dir() else _matching(path) or [local]
    found = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def _matching(path: str) -> list[Path]:
    """Files that a pattern names; none if it is not a pattern."""
    if not any(sign in path for sign in "*?["):
        return []
    return sorted(Path(found) for found in glob.glob(str(Path(path).expanduser())) if Path(found).is_file())


def _stem(name: str) -> str:
    return re.split(r"[.\-_]", name.lower())[0]


def _read_several(paths: Sequence[Path], cache_dir: Path | None) -> Table:
    """Files of a pattern: each in the split that it is named after, if all are named so; else together."""
    if all(_stem(path.name) in SPLIT_NAMES for path in paths):
        return _table([(SPLIT_NAMES[_stem(path.name)], path) for path in paths], cache_dir)
    return _table([(None, path) for path in paths], cache_dir)


def _read_folder(folder: Path, cache_dir: Path | None, config: str = "") -> Table:
    if (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and list(folder.glob("*.arrow"))
    ):
        return _read_saved(folder)
    named = _files_in_card(folder, config)
    if named:
        return _table(named, cache_dir)
    for inside in (folder / config if config else folder / "data", folder / config / "data"):
        if inside != folder and inside.is_dir() and any(_format_of(path) for path in inside.iterdir()):
            return _read_folder(inside, cache_dir)
    files: list[tuple[str | None, Path]] = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and _format_of(path) is not None:
            stem = _stem(path.name)
            if stem in ("metadata", "dataset"):
                continue
            if stem not in SPLIT_NAMES:
                raise DataError(
                    f"{path}: in a folder every file's name must begin with its split (train, validation or test), "
                    f"found {path.name!r}; to use one file, set data-path to it, or to a pattern for several"
                )
            files.append((SPLIT_NAMES[stem], path))
    if files:
        return _table(files, cache_dir)
    return _read_images(folder)


def _files_in_card(folder: Path, config: str) -> list[tuple[str | None, Path]]:
    """A configuration's files, by the head of a data set's README.md."""
    from huggingface_hub.repocard import metadata_load

    try:
        configs = (metadata_load(folder / "README.md") or {}).get("configs") or []
        chosen = [item for item in configs if item["config_name"] == (config or item["config_name"])]
    except Exception:  # no card, or one without a head
        return []
    if (configs and not chosen) or len(chosen) > 1:
        names = ", ".join(str(item["config_name"]) for item in configs)
        raise DataError(f"{folder}: data-config = {config!r}, expected one of {names}")
    files: list[tuple[str | None, Path]] = []
    for item in chosen[0].get("data_files") or [] if chosen else []:
        split = SPLIT_NAMES.get(_stem(str(item["split"])))
        patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        files += [(split, path) for path in found if split]
    return files


def _read_saved(folder: Path) -> Table:
    """The rows that ``save_to_disk`` of ``datasets`` wrote, in Arrow files."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # its errors have no common class
        raise DataError(f"{folder}: is not a data set that datasets can load: {str(error).splitlines()[0]}") from None
    if isinstance(found, datasets.DatasetDict):
        return _of_splits(found, str(folder), folder)
    rows = _dataset_rows(found, str(folder), folder)
    return Table(rows, [None] * len(rows))


def _of_splits(found: Mapping[str, Any], name: str, folder: Path) -> Table:
    """Splits by their names (``validation_matched`` is a validation split); others are not used, and a note says so."""
    parts: list[Sequence[Row]] = []
    splits: list[str | None] = []
    findings = []
    for split, part in found.items():
        known = SPLIT_NAMES.get(_stem(str(split)))
        if known is None:
            findings.append(f"{len(part)} rows of split {str(split)!r} are not used")
            continue
        new = _dataset_rows(part, f"{name}/{split}", folder)
        parts.append(new)
        splits += [known] * len(new)
    if not splits:
        raise DataError(f"data-path {name!r} has the splits {', '.join(map(str, found))}, expected one called train")
    return Table(JoinedRows.of(parts), splits, findings)


def _table(files: Sequence[tuple[str | None, Path]], cache_dir: Path | None) -> Table:
    parts: list[Sequence[Row]] = []
    splits: list[str | None] = []
    findings: list[str] = []
    for split, path in files:
        found = _read_file(path, cache_dir)
        if not found.rows:
            raise DataError(f"{path}: no rows")
        parts.append(found.rows)
        splits += [split] * len(found.rows)
        findings += found.findings
    return Table(JoinedRows.of(parts), splits, findings)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXT_SUFFIXES, *_ARROW) else None


def _read_file(path: Path, cache_dir: Path | None) -> FileRows:
    suffix = _format_of(path)
    if suffix is None:
        expected = ".jsonl, .json, .csv, .tsv (each also .gz), .parquet or .arrow"
        raise DataError(f"{path}: the name ends in {path.suffix or 'nothing'!r}, expected {expected}")
    if suffix in _ARROW:
        return FileRows(_read_arrow(path, suffix, cache_dir))
    return read_text_file(path, suffix)


def _read_arrow(path: Path, suffix: str, cache_dir: Path | None) -> Sequence[Row]:
    import datasets

    try:
        if suffix == ".arrow":
            found = datasets.Dataset.from_file(str(path))
        else:
            found = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # pyarrow's and datasets' have no common class
        cause = error.__cause__ or error
        raise DataError(f"{path}: is not valid {suffix[1:].title()}: {str(cause).splitlines()[0]}") from None
    return _dataset_rows(found, str(path), path.parent)


@dataclass(frozen=True)
class DatasetRows(RowSequence):
    """Rows of a data set of ``datasets``, which stay in its files; classes by their names, images as they are stored.

    ``named`` and ``lists`` are columns of classes, and of lists of classes, with the classes' names.
    """

    table: Any
    name: str
    folder: Path
    named: Mapping[str, Sequence[str]]
    lists: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Row]:
        for position, values in enumerate(self.table):
            yield self._row(position, values)

    def row(self, position: int) -> Row:
        """See :meth:`RowSequence.row`."""
        return self._row(position, self.table[position])

    def _row(self, position: int, values: Mapping[str, Any]) -> Row:
        for column, names in self.named.items():
            values = {**values, column: _name(names, values[column])}
        for column, names in self.lists.items():
            told = values[column]
            values = {**values, column: None if told is None else [_name(names, item) for item in told]}
        return Row(values, f"{self.name}, row {position + 1}", self.folder)


def _dataset_rows(found: Any, name: str, folder: Path) -> Sequence[Row]:
    """The rows of a data set; in memory if it is small."""
    import datasets

    named: dict[str, Sequence[str]] = {}
    lists: dict[str, Sequence[str]] = {}
    for column, feature in list((found.features or {}).items()):
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            names = feature.names
            found = found.cast_column(column, datasets.Value("int64"))
            named[column] = names
        elif isinstance(getattr(feature, "feature", None), datasets.ClassLabel):
            lists[column] = feature.feature.names
    rows = DatasetRows(found, name, folder, named, lists)
    return list(rows) if found.data.nbytes <= IN_MEMORY_BYTES else rows


def _name(names: Sequence[str], number: int | None) -> str | None:
    """The name of a class; None if its number is not a class (-1: unlabelled)."""
    return names[number] if number is not None and 0 <= number < len(names) else None


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
    return _of_splits(found, name, Path())
