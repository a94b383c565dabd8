"""The ledger: bytes per client, round and direction at three levels, kept in one SQLite file.

*tensor*: what the algorithm meant to send (encoded adapters). *message*: what Flower serialised for it. *wire*: what
the kernel's TCP counters say, headers included, counted at each direction's sender (:mod:`client_app.sockets`).

Tables (times are seconds since the epoch, bytes are bytes):

* ``meta(key, value)``: ``format`` (1), ``run_name``, ``tls`` (1 or 0, when known).
* ``tensor(round, client, direction, kind, bytes)``: one row per payload; direction is ``up`` or ``down``; kind is the
  message's, or ``sketch``.
* ``encoded(round, client, direction, encoding, bytes)``: the same bytes by how numbers are stored, with sketches.
* ``message(round, client, direction, kind, bytes, objects, calls, control_bytes, tls_records)``: one row per Flower
  message; it took ``calls`` gRPC calls, whose small halves add ``control_bytes`` in the *other* direction, and
  ``tls_records`` TLS records beyond each call's first.
* ``bundle(client, up, down, tls_records)``: app bundle and run description, which a SuperNode fetches once per run.
* ``reading(seq, end, event, round, client, kind, time, not_measured)``: one moment at which counters were read; end is
  ``client`` (event ``handler``: a message had arrived) or ``server`` (``start``, ``push``: about to send a message,
  ``handler``: the moment at which the client took its reading, ``reply``, ``gone``: a connection's last, ``final``).
* ``connection(seq, local_address, ..., data_segments_in)``: the counters of that moment, per connection.
* ``activity(round, address, port, cookie, kind, events, up, down, ...)``: changes of the server's counters between
  readings, by :mod:`server_app.ledger.sampler`: kind ``setup``, ``idle`` (polling, heartbeats), ``ping`` or
  ``burst``.
* ``small_call(address, port, cookie, phase, up, down, data_in, data_out, count)``: histogram of lone small calls: phase
  ``poll`` (the SuperNode was idle) or ``heartbeat`` (it was busy with a message, during which it does not poll).

Every call commits (write-ahead log, no fsync per commit), so a kill at any moment leaves a readable ledger. There may
be one writer and any number of readers. The arithmetic is in :mod:`server_app.ledger.connections` and
:mod:`server_app.ledger.reconciliation`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID

from client_app.sockets import Connection
from fedalloy_adapters.files.atomic_files import open_private
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import report_pb2
from server_app.ledger.flower_costs import BundleCost, MessageCost, message_cost
from server_app.ledger.reconciliation import Accounts
from server_app.ledger.rows import (
    ActivityRow,
    BundleRow,
    ConnectionRow,
    MessageRow,
    ReadingRow,
    SmallCallRow,
    TensorRow,
)

Row = TypeVar("Row")
FORMAT = "1"
COUNTERS = (
    "bytes_sent",
    "bytes_acked",
    "bytes_received",
    "bytes_retransmitted",
    "segments_out",
    "segments_in",
    "header_bytes",
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tensor (
    round INTEGER NOT NULL, client TEXT NOT NULL, direction TEXT NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS encoded (
    round INTEGER NOT NULL, client TEXT NOT NULL, direction TEXT NOT NULL, encoding TEXT NOT NULL,
    bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS message (
    round INTEGER NOT NULL, client TEXT NOT NULL, direction TEXT NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
    objects INTEGER NOT NULL, calls INTEGER NOT NULL, control_bytes INTEGER NOT NULL, tls_records INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS bundle (
    client TEXT PRIMARY KEY, up INTEGER NOT NULL, down INTEGER NOT NULL, tls_records INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS reading (
    seq INTEGER PRIMARY KEY, end TEXT NOT NULL, event TEXT NOT NULL, round INTEGER NOT NULL, client TEXT NOT NULL,
    kind TEXT NOT NULL, time REAL NOT NULL, not_measured TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS connection (
    seq INTEGER NOT NULL REFERENCES reading, local_address TEXT NOT NULL, local_port INTEGER NOT NULL,
    remote_address TEXT NOT NULL, remote_port INTEGER NOT NULL, cookie TEXT NOT NULL, bytes_sent INTEGER NOT NULL,
    bytes_acked INTEGER NOT NULL, bytes_received INTEGER NOT NULL, bytes_retransmitted INTEGER NOT NULL,
    segments_out INTEGER NOT NULL, segments_in INTEGER NOT NULL, header_bytes INTEGER NOT NULL,
    data_segments_out INTEGER, data_segments_in INTEGER);
CREATE INDEX IF NOT EXISTS connection_seq ON connection (seq);
CREATE TABLE IF NOT EXISTS activity (
    round INTEGER NOT NULL, address TEXT NOT NULL, port INTEGER NOT NULL, cookie TEXT NOT NULL, kind TEXT NOT NULL,
    events INTEGER NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL, segments_in INTEGER NOT NULL,
    segments_out INTEGER NOT NULL, data_in INTEGER NOT NULL, data_out INTEGER NOT NULL,
    PRIMARY KEY (round, address, port, cookie, kind));
CREATE TABLE IF NOT EXISTS small_call (
    address TEXT NOT NULL, port INTEGER NOT NULL, cookie TEXT NOT NULL, phase TEXT NOT NULL,
    up INTEGER NOT NULL, down INTEGER NOT NULL, data_in INTEGER NOT NULL, data_out INTEGER NOT NULL,
    count INTEGER NOT NULL, PRIMARY KEY (address, port, cookie, phase, up, down, data_in, data_out));
"""


class LedgerError(RuntimeError):
    """A ledger file cannot be opened; the message names it and says why."""


class Ledger:
    """One run's ledger, for writing and reading. Methods may be called from several threads.

    Args:
        path: the SQLite file; it is made if missing, else continued.
        run_name: goes into the file; a file of another run is refused.
        read_only: open an existing file without touching it (a running or killed run's).

    Raises:
        LedgerError: the file is not a ledger or another run's, or the folder cannot be written.
    """

    def __init__(self, path: Path, run_name: str = "", *, read_only: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if read_only and not path.exists():
                raise LedgerError(f"no ledger at {path}")
            if not read_only:
                os.close(open_private(path, os.O_RDWR))  # SQLite's other files get the same mode
            # If nobody has it open there is no log, and SQLite would make one, which fails in a read-only folder.
            unused = read_only and not path.with_name(f"{path.name}-wal").exists()
            place = f"file:{quote(str(path.resolve()))}" + ("?immutable=1" if unused else "")
            self._db = sqlite3.connect(place, uri=True, check_same_thread=False, isolation_level=None, timeout=30)
            if read_only:
                self._db.execute("PRAGMA query_only=1")
            else:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?), ('run_name', ?)", (FORMAT, run_name))
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"cannot open the ledger {path}: {error}") from error
        if meta.get("format") != FORMAT:
            raise LedgerError(f"{path} has ledger format {meta.get('format')!r}, expected {FORMAT!r}")
        if run_name and meta.get("run_name") != run_name:
            raise LedgerError(f"{path} is the ledger of run {meta.get('run_name')!r}, expected {run_name!r}")
        self.run_name = str(meta.get("run_name"))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --------------------------------------------------------------------------------------------- writing

    def tensor(self, round_: int, client: str, direction: str, kind: str, nbytes: int) -> None:
        """Record that the algorithm meant to send ``nbytes`` of tensors."""
        self._write("INSERT INTO tensor VALUES (?, ?, ?, ?, ?)", (round_, client, _direction(direction), kind, nbytes))

    def encoded(self, round_: int, client: str, direction: str, sizes: Mapping[str, int]) -> None:
        """Record bytes of a message's tensors by their encoding, with sketches and moments."""
        for encoding, nbytes in sizes.items():
            row = (round_, client, _direction(direction), encoding, nbytes)
            self._write("INSERT INTO encoded VALUES (?, ?, ?, ?, ?)", row)

    def message(
        self,
        round_: int,
        client: str,
        direction: str,
        kind: str,
        nbytes: int,
        objects: int,
        *,
        calls: int = 0,
        control_bytes: int = 0,
        tls_records: int = 0,
    ) -> None:
        """Record that Flower serialised ``nbytes`` in ``objects`` for a message; the rest is :func:`message_cost`'s."""
        row = (round_, client, _direction(direction), kind, nbytes, objects, calls, control_bytes, tls_records)
        self._write("INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def flower_message(
        self, round_: int, client: str, direction: str, kind: str, message: Message, tensor_bytes: int = 0
    ) -> MessageCost | None:
        """Record one message with its tensors, by :meth:`tensor` and :meth:`message`; returns Flower's cost for it.

        For an answer that the SuperLink made up itself (node unavailable, expired), nothing is recorded: None.
        """
        if direction == "up" and message.metadata.src_node_id == SUPERLINK_NODE_ID:
            return None
        cost = message_cost(message, direction)
        if tensor_bytes:
            self.tensor(round_, client, direction, kind, tensor_bytes)
        self.message(
            round_,
            client,
            direction,
            kind,
            cost.bytes,
            cost.objects,
            calls=cost.calls,
            control_bytes=cost.control_bytes,
            tls_records=cost.tls_records,
        )
        return cost

    def bundle(self, client: str, cost: BundleCost) -> None:
        """Record that a client's SuperNode fetched the app bundle and the run's description (once per run)."""
        self._write("INSERT OR REPLACE INTO bundle VALUES (?, ?, ?, ?)", (client, cost.up, cost.down, cost.tls_records))

    def forget_bundle(self, client: str) -> None:
        """What was noted under this name is another one's."""
        self._write("DELETE FROM bundle WHERE client = ?", (client,))

    def client_reading(
        self, round_: int, client: str, reading: report_pb2.WireReading, unix_time: float | None = None, kind: str = ""
    ) -> None:
        """Record a client's reading of its end when the message of ``round_`` had arrived."""
        when = reading.unix_time if unix_time is None else unix_time
        self._reading("client", "handler", round_, client, kind, when, reading.not_measured, reading.connections)

    def server_reading(
        self,
        round_: int,
        client: str,
        event: str,
        connections: Iterable[Connection],
        *,
        kind: str = "",
        unix_time: float | None = None,
        not_measured: str = "",
    ) -> None:
        """Record the server's reading of its end at ``start``, ``push``, ``handler``, ``reply`` or ``final``."""
        when = time.time() if unix_time is None else unix_time
        self._reading("server", event, round_, client, kind, when, not_measured, connections)

    def activity(self, rows: Sequence[tuple[Any, ...]], small_calls: Sequence[tuple[Any, ...]]) -> None:
        """Add what the sampler saw since the last call; rows are as in the tables."""
        with self._lock, _Transaction(self._db):
            self._db.executemany(
                "INSERT INTO activity VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                + ", ".join(
                    f"{name} = {name} + excluded.{name}"
                    for name in ("events", "up", "down", "segments_in", "segments_out", "data_in", "data_out")
                ),
                rows,
            )
            self._db.executemany(
                "INSERT INTO small_call VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET count = count + excluded.count",
                small_calls,
            )

    def note(self, key: str, value: str) -> None:
        """Remember a fact about the run (``tls``)."""
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def rename(self, old: str, new: str) -> None:
        """Move what is recorded for ``old`` (for example a node) to ``new``, because the client's name is known now."""
        with self._lock, _Transaction(self._db):
            for table in ("tensor", "encoded", "message", "reading"):
                self._db.execute(f"UPDATE {table} SET client = ? WHERE client = ?", (new, old))
            self._db.execute("UPDATE OR REPLACE bundle SET client = ? WHERE client = ?", (new, old))

    def close(self) -> None:
        """Close the file; nothing is lost if this is not called."""
        with self._lock:
            self._db.close()

    # --------------------------------------------------------------------------------------------- reading

    def accounts(self) -> Accounts:
        """Everything in the ledger at this moment, for arithmetic."""
        with self._lock, _Transaction(self._db):
            self._db.row_factory = sqlite3.Row
            try:
                return Accounts(
                    meta=dict(tuple(row) for row in self._db.execute("SELECT key, value FROM meta")),
                    tensors=self._rows(TensorRow, "SELECT * FROM tensor"),
                    messages=self._rows(MessageRow, "SELECT rowid, * FROM message ORDER BY rowid"),
                    bundles=self._rows(BundleRow, "SELECT * FROM bundle"),
                    readings=self._rows(ReadingRow, "SELECT * FROM reading ORDER BY seq"),
                    connections=self._rows(ConnectionRow, "SELECT * FROM connection ORDER BY seq, rowid"),
                    activity=self._rows(ActivityRow, "SELECT * FROM activity"),
                    small_calls=self._rows(SmallCallRow, "SELECT * FROM small_call"),
                )
            finally:
                self._db.row_factory = None

    def totals(self) -> dict[str, dict[str, int | None]]:
        """``{"up" | "down": {"tensor": bytes, "message": bytes, "wire": bytes or None}}``."""
        return self.accounts().totals()

    def by_client(self) -> dict[tuple[str, str], int]:
        """Bytes of Flower's messages so far, by client and direction."""
        query = "SELECT client, direction, SUM(bytes) FROM message GROUP BY client, direction"
        return {(client, direction): int(total) for client, direction, total in self._db.execute(query)}

    def by_encoding(self) -> dict[str, dict[str, int]]:
        """``{"up" | "down": {encoding: bytes}}`` of all tensors; empty in ledgers from before 0.2."""
        found: dict[str, dict[str, int]] = {}
        with self._lock:
            if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'encoded'").fetchone():
                for direction, encoding, nbytes in self._db.execute(
                    "SELECT direction, encoding, SUM(bytes) FROM encoded GROUP BY direction, encoding ORDER BY 1, 2"
                ):
                    found.setdefault(direction, {})[encoding] = nbytes
        return found

    def reconciliation(self) -> dict[str, dict[str, int]]:
        """Where every wire byte went, per direction; the values add up to the direction's wire bytes."""
        return self.accounts().reconciliation()

    def unexplained_fraction(self) -> float | None:
        """The larger direction's ``|unexplained| / wire``; None where the wire was not measured."""
        return self.accounts().unexplained_fraction()

    def _rows(self, kind: type[Row], query: str) -> list[Row]:
        return [kind(**dict(row)) for row in self._db.execute(query)]

    def _write(self, statement: str, values: tuple[Any, ...]) -> None:
        with self._lock:
            self._db.execute(statement, values)

    def _reading(
        self,
        end: str,
        event: str,
        round_: int,
        client: str,
        kind: str,
        when: float,
        not_measured: str,
        connections: Iterable[Connection | report_pb2.ConnectionReading],
    ) -> None:
        with self._lock, _Transaction(self._db):
            cursor = self._db.execute(
                "INSERT INTO reading (end, event, round, client, kind, time, not_measured) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (end, event, round_, client, kind, when, one_line(not_measured)),
            )
            self._db.executemany(
                f"INSERT INTO connection VALUES ({', '.join('?' * 15)})",
                [
                    (
                        cursor.lastrowid,
                        one_line(c.local_address),
                        c.local_port,
                        one_line(c.remote_address),
                        c.remote_port,
                        str(c.cookie),
                        *(getattr(c, name) for name in COUNTERS),
                        getattr(c, "data_segments_out", None),
                        getattr(c, "data_segments_in", None),
                    )
                    for c in connections
                ],
            )


class _Transaction:
    """All statements inside become visible together."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __enter__(self) -> None:
        self.db.execute("BEGIN")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.db.execute("COMMIT")
        elif self.db.in_transaction:  # on a full disk SQLite has already ended it
            self.db.execute("ROLLBACK")


def _direction(name: str) -> str:
    if name not in ("up", "down"):
        raise ValueError(f"direction {name!r}, expected 'up' or 'down'")
    return name
