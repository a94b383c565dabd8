"""Examples that were checked once, and are read again from their rows whenever they are needed.

Memory holds the digest of each example's content and the numbers of its labels. That is enough to find copies, to
divide the examples into splits, and to count.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.example import Example
from client_app.kinds import Kind
from client_app.own.examples import read_example
from client_app.own.reading.text_files import Row
from client_app.own.reading.values import value_in
from client_app.settings import DataSettings

DIGEST = "S32"
"""A SHA-256 in a form that numpy compares and sorts."""


@dataclass(frozen=True)
class Checked(Sequence[Example]):
    """Examples of one client, or of one of its splits; a slice of them is a list.

    Args:
        rows: the rows that the examples are in.
        positions: those of the examples among the rows, ``[n]``.
        kind: the kind of task.
        settings: which columns are read.
        digests: SHA-256 of each example's :attr:`Example.content`, ``[n]``.
        names: all labels of the client, in the order in which they appear.
        labels: numbers in ``names`` of the examples' labels, one example after another.
        ends: where each example's labels end, ``[n]``.
        columns: the columns of all rows.
        chats: whether some conversation needs a chat template.
    """

    rows: Sequence[Row]
    positions: NDArray[np.int64]
    kind: Kind
    settings: DataSettings
    digests: NDArray[np.bytes_]
    names: tuple[str, ...]
    labels: NDArray[np.int32]
    ends: NDArray[np.int64]
    columns: frozenset[str]
    chats: bool

    @classmethod
    def of(cls, rows: Sequence[Row], kind: Kind, settings: DataSettings) -> Checked:
        """Read every row once.

        Raises:
            DataError: a row is not usable; names file, line and column.
        """
        digests, numbers, columns = bytearray(), dict[str, int](), set[str]()
        labels, ends, chats = array("i"), array("q"), False
        for row in rows:
            example = read_example(row, kind, settings)
            digests += hashlib.sha256(example.content.encode()).digest()
            for name in kind.labels_of(example) if kind.has_labels else ():
                labels.append(numbers.setdefault(name, len(numbers)))
            ends.append(len(labels))
            columns.update(row.values)
            chats |= bool(example.messages) and example.prompt is None
        return cls(
            rows=rows,
            positions=np.arange(len(ends)),
            kind=kind,
            settings=settings,
            digests=np.frombuffer(bytes(digests), DIGEST),
            names=tuple(numbers),
            labels=np.frombuffer(labels, np.int32),
            ends=np.frombuffer(ends, np.int64),
            columns=frozenset(columns),
            chats=chats,
        )

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Example]:
        for position in self.positions.tolist():
            yield read_example(self.rows[position], self.kind, self.settings)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        """One example, or some."""
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(len(self)))]
        return read_example(self.rows[int(self.positions[at])], self.kind, self.settings)

    def subset(self, chosen: NDArray[np.int64]) -> Checked:
        """The examples at these places, in that order."""
        begins = self.ends - np.diff(self.ends, prepend=0)
        kept = [self.labels[begins[n] : self.ends[n]] for n in chosen.tolist()] if len(self.labels) else []
        return replace(
            self,
            positions=self.positions[chosen],
            digests=self.digests[chosen],
            labels=np.concatenate(kept) if kept else self.labels[:0],
            ends=np.cumsum([len(own) for own in kept]) if kept else np.zeros(len(chosen), np.int64),
        )

    def counts(self) -> dict[str, int]:
        """How often each label of the client is here, by name."""
        found = np.bincount(self.labels, minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def numbered(self, column: str) -> Tensor:
        """Numbers ``[n]`` from 0 of the values in a column, in the order in which they appear in the data.

        Raises:
            DataError: a row lacks the column.
        """
        rows = [self.rows[position] for position in self.positions.tolist()]
        found = [str(value_in(row, column)) for row in rows]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(found))}
        return torch.tensor([numbers[value] for value in found])

    def shared_with(self, other: Checked) -> int:
        """How many of these examples are among ``other``, too."""
        return int(np.isin(self.digests, other.digests).sum())


def copies_among(splits: Iterable[Checked]) -> int:
    """How many of all examples are copies of others."""
    digests = np.concatenate([split.digests for split in splits])
    return len(digests) - len(np.unique(digests))
