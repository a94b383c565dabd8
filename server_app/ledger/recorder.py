"""The round loop's interface to the ledger: messages before they are sent, answers, and the totals at the end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from proto.fedalloy.v1 import report_pb2
from server_app.ledger.flower_costs import BundleCost, bundle_cost
from server_app.ledger.reconciliation import SKETCH
from server_app.ledger.sampler import FleetSampler
from server_app.ledger.store import Ledger, LedgerError
from strategies.framework.dispatch import Dispatch

INFO = 20


class WireLog:
    """One run's ledger and the sampler that feeds its server end; a context manager around the run."""

    def __init__(self, path: Path, run_name: str, grid: Grid) -> None:
        self.ledger = Ledger(path, run_name)
        self.sampler = FleetSampler(self.ledger)
        self.grid = grid

    def __enter__(self) -> WireLog:
        if isinstance(self.grid, HttpGrid):  # no other grid has a network, whoever listens on its port
            self.sampler.start()
        else:
            self.sampler.decline("clients in this process have no network")
        if not self.sampler.is_measuring:
            log(INFO, "wire bytes: not measured (%s)", self.sampler.not_measured)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sampler.stop()
        self.ledger.close()

    @property
    def is_measuring(self) -> bool:
        """Whether the server's counters can be read here."""
        return self.sampler.is_measuring

    def pushing(self, round_: int, client: str, kind: str) -> None:
        """Call just before a message to ``client`` is pushed."""
        self.sampler.push(round_, client, kind)

    def pushed(self, round_: int, client: str, kind: str, message: Message, tensors: Mapping[str, int]) -> None:
        """Call when a message has been pushed; ``tensors`` are bytes of the encoded numbers in it, by encoding."""
        self.ledger.flower_message(round_, client, "down", kind, message, sum(tensors.values()))
        self.ledger.encoded(round_, client, "down", tensors)

    def arrived(
        self,
        round_: int,
        client: str,
        kind: str,
        message: Message | None,
        reading: report_pb2.WireReading | None = None,
        asked: Dispatch | None = None,
    ) -> None:
        """Call when ``client`` has answered, or (with None) will not answer; ``asked`` describes the answer."""
        if message is not None:
            sizes = asked.upload_bytes if asked is not None else {}
            sketches = asked.sketches if asked is not None else frozenset()
            adapters = sum(size for slot, size in sizes.items() if slot not in sketches)
            booked = self.ledger.flower_message(round_, client, "up", kind, message, adapters)
            if booked is not None and asked is not None:
                self.ledger.encoded(round_, client, "up", asked.up_by_encoding())
            for slot in sketches if booked is not None else ():
                self.ledger.tensor(round_, client, "up", SKETCH, sizes[slot])
        self.sampler.reply(round_, client, kind, reading)

    def registered(self, node: str, client: str) -> None:
        """The node that was asked as ``node`` is ``client``; it has fetched the app bundle."""
        self.sampler.rename(node, client)
        self.ledger.forget_bundle(node)
        self.fetched(client)

    def fetched(self, client: str, has_answered: bool = True) -> None:
        """Who has answered, if only to say that it cannot take part, has fetched the app bundle."""
        bundle = self._bundle() if has_answered else None
        if bundle is not None:
            self.ledger.bundle(client, bundle)

    def totals(self) -> tuple[dict[str, dict[str, int | None]], float | None]:
        """End the measurement; returns bytes by direction and level, and the unexplained fraction if measured."""
        self.sampler.stop()
        return self.ledger.totals(), self.ledger.unexplained_fraction()

    def _bundle(self) -> BundleCost | None:
        """The cost of the app bundle; None if the grid has no network."""
        if not self.is_measuring:
            return None
        # Flower runs the app from the folder that it unpacked the bundle to.
        return bundle_cost(self.grid.run, Path(__file__).resolve().parents[2])


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Name the file in errors: SQLite's error for a full disk does not.

    Raises:
        LedgerError: the ledger cannot be written.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(f"cannot write the ledger {path}: {error}") from error


class Booking:
    """Records what one exchange pushes; see :class:`server_app.run.federation.Watch`."""

    def __init__(
        self, wire: WireLog, round_: int, kind: str, tensors: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        self.wire, self.round, self.kind = wire, round_, kind
        self.tensors = tensors if tensors is not None else {}  # filled while messages are made: empty at first

    def pushing(self, client_id: str) -> None:
        """A message is about to be pushed."""
        self.wire.pushing(self.round, client_id, self.kind)

    def pushed(self, client_id: str, message: Message) -> None:
        """It has been pushed."""
        self.wire.pushed(self.round, client_id, self.kind, message, self.tensors.get(client_id, {}))

    def lost(self, client_id: str, message: Message) -> None:
        """Flower reports that the client is gone."""
        self.wire.arrived(self.round, client_id, self.kind, message)
