"""Many adapters in one place: in memory while they fit, otherwise one file each; merged block by block.

A row is written once, when a client's answer is decoded, and never changed: a new upload of the same client is a new
row. So a holder of a row (a merge that waits to be sent, a checkpoint) can rely on it. The row and its file are freed
when nobody holds it any longer. Rows that a checkpoint keeps are hard links to the same files, not copies.

Rows in files are read, not mapped: pages of a mapping count as memory of the process, and a file that has become
shorter would be a fatal signal instead of an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedalloy_adapters.adapter import Adapter, require_same_layout
from fedalloy_adapters.bank.blocks import MemoryRow, Numbers, Part, Row, combine
from fedalloy_adapters.layout import Layout

_NAME = "row"
_CHUNK = 2**20


class BankError(RuntimeError):
    """A row cannot be written or read; the message says which file and why."""


class FileRow:
    """A row of float32 in a safetensors file.

    Raises:
        BankError: the file is not there, or is not as long as its header says.
    """

    in_memory = False
    dtype = torch.float32

    def __init__(self, path: Path, largest: float | None = None) -> None:
        self.path = path
        self._largest = largest
        try:
            with path.open("rb") as file:
                self._offset = 8 + int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - self._offset
        except OSError as error:
            raise BankError(f"cannot read {path}: {error.strerror or error}") from None
        if size < 0 or size % 4:
            raise BankError(f"{path} is torn: {size} bytes of float32 numbers")
        self.size = size // 4

    @property
    def largest(self) -> float:
        """:func:`largest_of` the row: known from writing it, or computed once, block by block."""
        if self._largest is None:
            self._largest = _largest_in_blocks(self)
        return self._largest

    @cached_property
    def sha256(self) -> str:
        """:func:`digest_of` the row, computed once because a row never changes."""
        return digest_of(self)

    def read(self, start: int, out: Numbers) -> None:
        """Read straight into ``out``. The file is opened each time: there may be more rows than files allowed open."""
        view = memoryview(out.data).cast("B")
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                position = self._offset + 4 * start
                while view:
                    count = os.preadv(descriptor, [view], position)
                    if not count:
                        raise BankError(f"{self.path} has become shorter: no data at byte {position}")
                    view, position = view[count:], position + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BankError(f"cannot read {self.path}: {error.strerror or error}") from None


StoredRow = MemoryRow | FileRow


def tensor_of(row: Row) -> Tensor:
    """The row as a tensor ``[P]``: its own memory, or read from its file."""
    if isinstance(row, MemoryRow):
        return row.vector
    found = torch.empty(row.size, dtype=row.dtype)
    row.read(0, found.numpy())
    return found


def largest_of(tensor: Tensor) -> float:
    """The largest magnitude, in one pass without a copy; NaN if any number is NaN, 0 for an empty row."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())  # a tenth of the time of the norm, and NaN propagates, too
    return float(torch.maximum(low.abs(), high.abs()))


def _largest_in_blocks(row: Row) -> float:
    buffer, found = torch.empty(min(row.size, _CHUNK), dtype=row.dtype), torch.zeros((), dtype=row.dtype)
    for start in range(0, row.size, _CHUNK):
        piece = buffer[: min(_CHUNK, row.size - start)]
        row.read(start, piece.numpy())
        found = torch.maximum(found, torch.tensor(largest_of(piece), dtype=row.dtype))  # propagates NaN
    return float(found)


def digest_of(row: Row) -> str:
    """SHA-256 of the numbers, little-endian."""
    found = hashlib.sha256()
    buffer = torch.empty(min(row.size, _CHUNK), dtype=row.dtype).numpy()
    for start in range(0, row.size, _CHUNK):
        piece = buffer[: min(_CHUNK, row.size - start)]
        row.read(start, piece)
        found.update((piece if sys.byteorder == "little" else piece.byteswap()).data)
    return found.hexdigest()


class Storage:
    """Where the rows of a run's banks are kept: up to a memory limit, then in a folder.

    The folder is scratch space of this process: files of an earlier process are removed. Without a folder everything
    stays in memory.
    """

    def __init__(self) -> None:
        self.used = 0
        self._memory = 0
        self._folder: Path | None = None
        self._count = itertools.count()

    def spill_to(self, folder: Path, memory_bytes: int) -> None:
        """From now on, rows beyond ``memory_bytes`` go to files in ``folder``.

        Raises:
            BankError: the folder cannot be written.
        """
        shutil.rmtree(folder, ignore_errors=True)
        self._make(folder)
        self._folder, self._memory = folder, memory_bytes

    def keep(self, vector: Tensor) -> StoredRow:
        """A row with these numbers, which must not change afterwards.

        Raises:
            BankError: it cannot be written (the disk is full).
        """
        size = vector.numel() * vector.element_size()
        if self._folder is None or vector.dtype != torch.float32 or self.used + size <= self._memory:
            row = MemoryRow(vector)
            self.used += size
            weakref.finalize(row, self._free, size)
            return row
        path = self._folder / f"{next(self._count):08d}.safetensors"
        try:
            save_file({_NAME: vector.detach().to("cpu").contiguous()}, path)
        except Exception as error:  # safetensors has its own kinds for a full disk
            path.unlink(missing_ok=True)
            raise BankError(f"cannot write {path} (bank-memory-mb bounds what stays in memory): {error}") from None
        return self._owned(path, largest_of(vector))

    def adopt(self, row: Row) -> StoredRow:
        """Take over a row from another file (a checkpoint's, which will be removed) into this storage.

        Raises:
            BankError: it cannot be linked, copied or read.
        """
        if not isinstance(row, FileRow) or self._folder is None:
            return self.keep(tensor_of(row))
        path = self._folder / f"{next(self._count):08d}.safetensors"
        link(row, path)
        return self._owned(path)

    def _owned(self, path: Path, largest: float | None = None) -> FileRow:
        row = FileRow(path, largest)
        weakref.finalize(row, _remove, path)
        return row

    def _free(self, size: int) -> None:
        self.used -= size

    @staticmethod
    def _make(folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BankError(f"cannot make the folder {folder}: {error.strerror or error}") from None


def link(row: FileRow, path: Path) -> None:
    """Another name for the row's file, which lives as long as any of its names; a copy if the file system has no links.

    Raises:
        BankError: neither is possible.
    """
    try:
        try:
            os.link(row.path, path)
        except OSError:
            shutil.copyfile(row.path, path)
    except OSError as error:
        raise BankError(f"cannot write {path}: {error.strerror or error}") from None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


class Made(Mapping[str, Adapter]):
    """Adapters by slot as recipes: each is computed when it is read and not kept, so any number of them may wait.

    What a recipe uses must not change: rows of a snapshot, or tensors that are not written to.
    """

    def __init__(self, recipes: Mapping[str, Callable[[], Adapter]]) -> None:
        self._recipes = dict(recipes)

    def __getitem__(self, slot: str) -> Adapter:
        return self._recipes[slot]()

    def __contains__(self, slot: object) -> bool:
        return slot in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


class Bank(MutableMapping[str, Adapter]):
    """Adapters by name, with any layouts. They are ordered by name, never by arrival.

    ``bank[name]`` reads an adapter. For sums over many use :meth:`combine`, which never holds all of them in memory.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        self._storage = storage or Storage()
        self._rows: dict[str, tuple[Layout, Row]] = {}

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        self._rows[name] = (adapter.layout, self._storage.keep(adapter.vector))

    def __getitem__(self, name: str) -> Adapter:
        layout, row = self._rows[name]
        return Adapter(layout, tensor_of(row))

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._rows))

    def __len__(self) -> int:
        return len(self._rows)

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter]) -> Bank:
        """A bank of these adapters, in memory; a bank is returned as it is."""
        if isinstance(adapters, Bank):
            return adapters
        bank = cls()
        bank.update(adapters)
        return bank

    def clear(self) -> None:
        """Drop all rows."""
        self._rows.clear()

    def parts(self, layout: Layout) -> Bank:
        """The tensors of ``layout`` from every adapter that has all of them; read from this bank's rows, not copied."""
        found = Bank(self._storage)
        for name, (whole, _) in self._rows.items():
            if whole.digest == layout.digest or whole.contains(layout):
                found._rows[name] = (layout, self._part(name, layout))
        return found

    def part(self, name: str, layout: Layout) -> Adapter:
        """The tensors of ``layout`` from one adapter, which must have them; nothing else of it is read."""
        return Adapter(layout, tensor_of(self._part(name, layout)))

    def _part(self, name: str, layout: Layout) -> Row:
        whole, row = self._rows[name]
        if whole.digest == layout.digest:
            return row
        slices = [whole.slice_of(entry.name) for entry in layout.entries]
        return Part(row, [(piece.start, piece.stop) for piece in slices])

    def taken(self) -> Bank:
        """Move all rows to a new bank; this one is empty afterwards."""
        other = Bank(self._storage)
        other._rows, self._rows = self._rows, {}
        return other

    def snapshot(self) -> Bank:
        """The rows as they are now, without a copy; later changes to this bank do not affect them."""
        other = Bank(self._storage)
        other._rows = dict(self._rows)
        return other

    def layout_of(self, name: str) -> Layout:
        """The adapter's layout; its numbers are not read."""
        return self._rows[name][0]

    def rows(self, names: Sequence[str] | None = None) -> list[Row]:
        """Rows in the order of the given names (without names: all, ordered by name); they never change."""
        return [self._rows[name][1] for name in (self if names is None else names)]

    def put_row(self, name: str, layout: Layout, row: Row) -> None:
        """Put in a row from a checkpoint.

        Raises:
            BankError: it is not of this layout's size, or cannot be taken over.
        """
        if row.size != layout.size:
            raise BankError(f"a row of {row.size} numbers for {name!r}, expected {layout.size}")
        self._rows[name] = (layout, self._storage.adopt(row))

    def combine(self, names: Sequence[str], weights: Tensor) -> list[Adapter]:
        """Weighted sums in factor space: ``weights [d, N]`` times these adapters gives d adapters.

        Raises:
            LayoutError: the layouts differ.
        """
        layout = self.common_layout(names)
        return [Adapter(layout, vector) for vector in combine(self.rows(names), weights)]

    def mean(self, counts: Mapping[str, float]) -> Adapter:
        """The average in factor space, weighted by ``counts``.

        Raises:
            LayoutError: the layouts differ.
        """
        names = list(self)
        total = sum(counts[name] for name in names)
        weights = torch.tensor([[counts[name] / total for name in names]], dtype=torch.float64)
        return self.combine(names, weights)[0]

    def common_layout(self, names: Sequence[str]) -> Layout:
        """The layout of all of these.

        Raises:
            LayoutError: two differ.
        """
        layout = self._rows[names[0]][0]
        for name in names[1:]:
            require_same_layout(layout, self._rows[name][0])
        return layout
