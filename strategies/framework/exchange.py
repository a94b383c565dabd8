"""What a strategy and its caller exchange: clients, briefs, answers and states, and the errors that refuse them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.blocks import MemoryRow, Row
from fedalloy_adapters.bank.store import Bank, FileRow, tensor_of
from fedalloy_adapters.layout import Layout
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import plan_pb2, report_pb2

MAX_NUMBER = 1e9
"""No trained adapter comes near this; products of larger numbers would overflow in a merge and stop the server."""
MAX_REASON = 400
"""Longest reason, in characters, that may contain a stranger's words."""


@dataclass(frozen=True)
class Client:
    """A registered client. ``examples`` counts its training examples; ``id`` is stable across runs and restarts.

    ``registration`` is what it said, without the layouts. ``reference`` is the layout of the gradient that its sketches
    are made from; None if it cannot make any.
    """

    id: str
    node_id: int
    layout: Layout
    examples: int
    base_model: str = ""
    registration: report_pb2.Registration = field(default_factory=report_pb2.Registration, compare=False, repr=False)
    reference: Layout | None = None

    def registration_kept(self) -> bytes:
        """The part of its registration that a run keeps: all but its counters."""
        said = report_pb2.Registration()
        said.CopyFrom(self.registration)
        said.layout.CopyFrom(self.layout.to_proto())
        if self.reference is not None:
            said.reference.CopyFrom(self.reference.to_proto())
        said.ClearField("wire")
        return said.SerializeToString(deterministic=True)

    @cached_property
    def registration_sha256(self) -> str:
        """SHA-256 of :meth:`registration_kept`, in hex digits; every checkpoint names it."""
        return hashlib.sha256(self.registration_kept()).hexdigest()

    @property
    def claimed(self) -> int:
        """Training examples that the client registered; ``examples`` is the number that it counts for."""
        return sum(int(task.examples.get("train", 0)) for task in self.registration.tasks)

    @property
    def kinds(self) -> list[str]:
        """The kinds of its tasks."""
        return sorted({task.kind for task in self.registration.tasks})

    @property
    def held_out(self) -> int:
        """Validation examples that the client registered."""
        return sum(int(task.examples.get("validation", 0)) for task in self.registration.tasks)


@dataclass(frozen=True)
class Brief:
    """What one client gets in one round: steps to run, and adapters to install in slots before running them.

    Adapters for one client alone are recipes (:class:`fedalloy_adapters.bank.store.Made`): they are made with the
    message, and again when its answer needs them. So a round never holds one for every client.
    """

    steps: Sequence[plan_pb2.Step]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one client answered, checked.

    ``adapters`` by slot, in the layout that was asked for; ``received`` is what the client started from, after decoding
    (it differs from what was sent if the encoding is lossy); ``metrics`` by label of the evaluate step; ``clipped``
    has the norms of updates that were longer than ``max-update-norm``, by slot.
    """

    adapters: Mapping[str, Adapter]
    received: Mapping[str, Adapter]
    metrics: Mapping[str, Mapping[str, float]]
    examples: int
    report: report_pb2.Report
    clipped: Mapping[str, float] = field(default_factory=dict)


@dataclass
class State:
    """A strategy's state between rounds: tensors by name, and values that JSON can hold exactly.

    ``rows`` are tensors that are in files: a checkpoint links them and does not copy them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, FileRow] = field(default_factory=dict)

    def keep(self, prefix: str, bank: Bank) -> None:
        """All adapters of a bank, as ``<prefix>/<name>``; nobody writes to a row, so there is nothing to copy."""
        for name, row in zip(bank, bank.rows(), strict=True):
            if isinstance(row, FileRow):
                self.rows[f"{prefix}/{name}"] = row
            else:
                self.tensors[f"{prefix}/{name}"] = tensor_of(row)

    def row(self, name: str) -> Row:
        """A tensor of either kind."""
        return self.rows[name] if name in self.rows else MemoryRow(self.tensors[name])


class StrategyError(ValueError):
    """A client does not fit this strategy, or a strategy was asked for something it cannot do."""


class BadAnswerError(ValueError):
    """A client's reply is an error, or is not what the plan asked for.

    The message may contain a stranger's words and goes to logs, so it is cut to one line of printable text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, MAX_REASON))
