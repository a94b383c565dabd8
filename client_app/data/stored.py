"""Encoded texts on disk: one Arrow file for each split, mapped into memory, padded when a batch is made of them.

A file is an Arrow stream (``datasets.Dataset.from_file`` opens one), with a row for each text and a column of lists of
32-bit numbers for each input that has one number for each token; ``labels`` is such a column where each token has one.
Any other answer of an example is in the column ``target``, which is in memory once the file is open. Everything else
that is known about a split is in a JSON file beside it. That file is written last: without it, the Arrow file does not
count. Only pyarrow writes and reads the files: importing ``datasets`` takes 70 MB of memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.dataset import MASK, Dataset
from client_app.data.targets import IGNORED
from fedalloy_adapters.files.atomic_files import FILE_MODE, private_folder, sync, write_durably

TOKENS, LABELS, LENGTH, TARGET = "input_ids", "labels", "length", "target"
ROWS_AT_ONCE = 64
"""Examples in a record batch, and so the most that are encoded and not yet written."""
MAPPED_BYTES = 2**24
"""After reading this many bytes, the file's pages are given back to the system; until then they count as resident
memory."""
_AROUND = 16
"""Pages that the system maps around a page that is read (Linux's fault_around_bytes, 64 KiB)."""
UNUSED_SECONDS = 30 * 24 * 3600.0
"""Files that nobody has opened for this many seconds are removed when another is written."""

Ints = NDArray[np.int32]


@dataclass
class TokenFile:
    """An Arrow file of examples; ``about`` is the JSON that was stored with it.

    ``lengths [n]`` are the examples' numbers of tokens, ``columns`` the names of the columns; ``extreme`` is the
    position of the example with the largest token id.
    """

    path: Path
    about: Mapping[str, Any]
    lengths: Tensor
    columns: tuple[str, ...]
    extreme: int
    _parts: list[dict[str, tuple[Ints, Ints]]] = field(default_factory=list)
    _ends: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    _pages: mmap.mmap | None = None
    _read: int = 0

    @classmethod
    def opened(cls, path: Path) -> TokenFile | None:
        """The file, if it is there and whole."""
        try:
            told = json.loads(_beside(path).read_text())
            found = cls(path, told["about"], torch.empty(0), tuple(told["columns"]), told["extreme"])
            found._map()
            found.lengths = found.column(LENGTH)
            os.utime(_beside(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if len(found.lengths) == told["rows"] else None

    def rows(self, positions: Sequence[int]) -> list[dict[str, Ints]]:
        """Examples by column, each ``[tokens]``: copies, in the order of ``positions``."""
        found = []
        for position in positions:
            number = int(np.searchsorted(self._ends, position, side="right"))
            part = self._parts[number]
            row = position - int(self._ends[number - 1] if number else 0)
            one = {}
            for name, (values, offsets) in part.items():
                if name != LENGTH:
                    one[name] = values[offsets[row] : offsets[row + 1]].copy()
                    self._count(one[name].nbytes)
            found.append(one)
        return found

    def column(self, name: str) -> Tensor:
        """All numbers of a column, one row after another: ``[n]`` where each row has one."""
        found = []
        for part in self._parts:
            found.append(part[name][0].astype(np.int64))
            self._count(mmap.PAGESIZE * _AROUND)
        return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.long)

    def lists(self, name: str, filling: int) -> Tensor:
        """A column of short lists, ``[n, longest]``; shorter lists end in ``filling``."""
        counts = np.concatenate([np.diff(part[name][1]) for part in self._parts])
        found = torch.full((len(counts), int(counts.max(initial=0))), filling)
        there = torch.arange(found.shape[1]) < torch.from_numpy(counts)[:, None]
        found[there] = self.column(name)
        return found

    def _count(self, read: int) -> None:
        """Give the file's pages back once enough of them have been read; later reads get them from the file again."""
        self._read += read
        if self._read >= MAPPED_BYTES and self._pages is not None:
            self._read = 0
            if hasattr(mmap, "MADV_DONTNEED"):
                self._pages.madvise(mmap.MADV_DONTNEED)

    def _map(self) -> None:
        """Find each record batch's columns as numbers, and where each row begins, without any copy."""
        import pyarrow

        with self.path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for batch in pyarrow.ipc.open_stream(pyarrow.py_buffer(self._pages)):
            part: dict[str, tuple[Ints, Ints]] = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                values = column if name == LENGTH else column.values
                offsets = np.arange(len(column) + 1, dtype=np.int32) if name == LENGTH else column.offsets.to_numpy()
                part[name] = (values.to_numpy(), offsets)
            self._parts.append(part)
            self._count(mmap.PAGESIZE * _AROUND * len(part))
        self._ends = np.cumsum([len(part[LENGTH][0]) for part in self._parts], dtype=np.int32)


def write_tokens(
    path: Path, examples: Iterable[Mapping[str, Sequence[int] | Ints]], about: Callable[[], Mapping[str, Any]]
) -> TokenFile:
    """Write a split, with only a few examples in memory at a time.

    Args:
        path: the Arrow file.
        examples: numbers by column, ``input_ids`` among them; all have the same columns.
        about: called after the last of ``examples``: what :attr:`TokenFile.about` will be, as JSON.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    import pyarrow

    private_folder(path.parent)
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    columns: tuple[str, ...] = ()
    written, largest, extreme = 0, -1, 0
    waiting = iter(examples)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE))
        with contextlib.ExitStack() as stack:
            stream: Any = None
            while some := list(itertools.islice(waiting, ROWS_AT_ONCE)):
                if stream is None:
                    columns = tuple(some[0])
                    lists = [(name, pyarrow.list_(pyarrow.int32())) for name in columns]
                    schema = pyarrow.schema([*lists, (LENGTH, pyarrow.int32())])
                    stream = stack.enter_context(
                        pyarrow.ipc.new_stream(stack.enter_context(temporary.open("wb")), schema)
                    )
                ids = [np.asarray(one[TOKENS], np.int32) for one in some]
                lengths = pyarrow.array([len(one) for one in ids], pyarrow.int32())
                stream.write_batch(pyarrow.record_batch([*(_lists(some, name) for name in columns), lengths], schema))
                for found in (int(one.max(initial=0)) for one in ids):
                    if found > largest:
                        largest, extreme = found, written
                    written += 1
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    told = {"rows": written, "columns": columns, "extreme": extreme, "about": about()}
    write_durably(_beside(path), json.dumps(told, allow_nan=False).encode())
    opened = TokenFile.opened(path)
    if opened is None:
        raise OSError(f"{path} does not contain what was written to it")
    return opened


@dataclass(frozen=True)
class StoredDataset(Dataset):
    """A split whose texts lie in a file; ``chosen [n]`` are its examples' positions there.

    ``labels`` are the examples' own, ``[n, ...]``; ``[n, 0]`` if each token has a label: those are in the file.
    """

    file: TokenFile = field(kw_only=True)
    chosen: Tensor = field(kw_only=True)
    padding: int = field(kw_only=True, default=0)

    @classmethod
    def of(cls, file: TokenFile, kind: str, labels: Tensor | None = None, padding: int = 0) -> StoredDataset:
        """All examples of a file; ``labels [n, ...]`` if each example has one, not each token."""
        count = len(file.lengths)
        own = torch.empty(count, 0, dtype=torch.long) if labels is None else labels
        return cls({}, own, kind, file=file, chosen=torch.arange(count), padding=padding)

    @property
    def lengths(self) -> Tensor | None:
        """See :attr:`Dataset.lengths`."""
        return self.file.lengths[self.chosen]

    def telling(self) -> Tensor:
        """Positions of a few: some of the first, the shortest, the longest, and the one with the largest token."""
        lengths = self.file.lengths[self.chosen]
        found = {*range(min(8, len(self))), int(lengths.argmin()), int(lengths.argmax())}
        found |= {int(place) for place in (self.chosen == self.file.extreme).nonzero().flatten()}
        return torch.tensor(sorted(found))

    def sample(self) -> Dataset:
        """See :meth:`Dataset.sample`."""
        return self.batch(self.telling())

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`; padded to the longest of the batch."""
        positions = self.chosen[indices].tolist()
        found = self.file.rows(positions)
        width = max((len(one[TOKENS]) for one in found), default=0)
        inputs = {}
        for name in [name for name in self.file.columns if found and name != TARGET]:
            filling = {TOKENS: self.padding, LABELS: IGNORED}.get(name, 0)
            padded = torch.full((len(found), width), filling, dtype=torch.long)
            for row, one in enumerate(found):
                padded[row, : len(one[name])] = torch.from_numpy(one[name])
            inputs[name] = padded
        counts = self.file.lengths[self.chosen[indices]]
        inputs[MASK] = (torch.arange(width) < counts[:, None]).long()
        labels = inputs.pop(LABELS, self.labels[indices])
        return Dataset(inputs, labels, self.kind, self.task)

    def subset(self, indices: Tensor) -> StoredDataset:
        """See :meth:`Dataset.subset`; nothing is read yet."""
        return replace(self, labels=self.labels[indices], chosen=self.chosen[indices])


@dataclass(frozen=True)
class StoredGroups(Dataset):
    """A split whose examples have ``each`` texts; an example's texts follow one another in ``texts``.

    Inputs are ``[n, each, L]``, with the names in ``names``; if each token has a label, labels are inputs, too.
    """

    texts: StoredDataset = field(kw_only=True)
    each: int = field(kw_only=True)
    names: Mapping[str, str] = field(kw_only=True)

    def batch(self, indices: Tensor) -> Dataset:
        """See :meth:`Dataset.batch`; padded to the longest text of the batch."""
        rows = (indices[:, None] * self.each + torch.arange(self.each)).flatten()
        found = self.texts.batch(rows)
        told = {**found.inputs, LABELS: found.labels}
        inputs = {own: told[name].reshape(len(indices), self.each, -1) for name, own in self.names.items()}
        return Dataset(inputs, self.labels[indices], self.kind, self.task)

    def subset(self, indices: Tensor) -> StoredGroups:
        """See :meth:`Dataset.subset`; nothing is read yet."""
        rows = (indices[:, None] * self.each + torch.arange(self.each)).flatten()
        return replace(self, labels=self.labels[indices], texts=self.texts.subset(rows))

    def sample(self) -> Dataset:
        """See :meth:`Dataset.sample`."""
        return self.batch(torch.tensor(sorted({text // self.each for text in self.texts.telling().tolist()})))


def give_back_memory() -> None:
    """Give freed memory back to the system, if the C library can do that (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _lists(some: Sequence[Mapping[str, Sequence[int] | Ints]], name: str) -> Any:
    """A column of lists as Arrow has it: all numbers, and where each list begins."""
    import pyarrow

    numbers = [np.asarray(one[name], np.int32) for one in some]
    offsets = np.cumsum([0, *map(len, numbers)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(numbers)))


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _sweep(folder: Path) -> None:
    """Remove files that nobody has used for a long time; a process that has mapped one keeps it."""
    with contextlib.suppress(OSError):
        for told in folder.glob("*.json"):
            if time.time() - told.stat().st_mtime > UNUSED_SECONDS:
                told.unlink(missing_ok=True)
                told.with_suffix(".arrow").unlink(missing_ok=True)
