"""Rows that are read from the ledger's tables; :mod:`server_app.ledger.store` says what each column means."""

from __future__ import annotations

from dataclasses import asdict, dataclass

Key = tuple[str, int, str]
"""The SuperNode's address and port, and the cookie of a socket."""


@dataclass(frozen=True)
class TensorRow:
    """Bytes that the algorithm meant to send."""

    round: int
    client: str
    direction: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class MessageRow:
    """One Flower message."""

    rowid: int
    round: int
    client: str
    direction: str
    kind: str
    bytes: int
    objects: int
    calls: int
    control_bytes: int
    tls_records: int


@dataclass(frozen=True)
class BundleRow:
    """One SuperNode's fetch of the app bundle."""

    client: str
    up: int
    down: int
    tls_records: int

    def to(self, direction: str) -> int:
        """Bytes in one direction."""
        return self.up if direction == "up" else self.down


@dataclass(frozen=True)
class ReadingRow:
    """A moment at which one end's counters were read."""

    seq: int
    end: str
    event: str
    round: int
    client: str
    kind: str
    time: float
    not_measured: str


@dataclass(frozen=True)
class ConnectionRow:
    """One connection's counters at the moment of a reading."""

    seq: int
    local_address: str
    local_port: int
    remote_address: str
    remote_port: int
    cookie: str
    bytes_sent: int
    bytes_acked: int
    bytes_received: int
    bytes_retransmitted: int
    segments_out: int
    segments_in: int
    header_bytes: int
    data_segments_out: int | None
    data_segments_in: int | None


@dataclass(frozen=True)
class Sample(ConnectionRow):
    """A connection's counters with the moment at which they were read."""

    end: str
    event: str
    round: int
    client: str
    kind: str
    time: float
    not_measured: str

    @classmethod
    def of(cls, connection: ConnectionRow, reading: ReadingRow) -> Sample:
        """The two rows of the same ``seq`` joined."""
        return cls(**asdict(connection) | asdict(reading))


@dataclass(frozen=True)
class ActivityRow:
    """Changes of the server's counters of a connection between readings, by kind."""

    round: int
    address: str
    port: int
    cookie: str
    kind: str
    events: int
    up: int
    down: int
    segments_in: int
    segments_out: int
    data_in: int
    data_out: int

    @property
    def key(self) -> Key:
        """The connection."""
        return self.address, self.port, self.cookie

    def to(self, direction: str) -> int:
        """Bytes in one direction."""
        return self.up if direction == "up" else self.down


@dataclass(frozen=True)
class SmallCallRow:
    """Lone small calls of one connection that look the same, and how many there were."""

    address: str
    port: int
    cookie: str
    phase: str
    up: int
    down: int
    data_in: int
    data_out: int
    count: int

    @property
    def key(self) -> Key:
        """The connection."""
        return self.address, self.port, self.cookie
