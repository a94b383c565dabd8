"""Kernel counters of the Fleet connection: what TCP really sent and received.

Linux keeps counters per TCP connection and returns them over netlink (``sock_diag``), without privileges. One segment
of a connection costs ``header_bytes`` on an Ethernet (14) with IPv4 (20) or IPv6 (40) and TCP (20, plus 12 if the
connection uses timestamps), so ``bytes_sent + header_bytes * segments_out`` is what a packet capture at the sender
shows, except for the options of the handshake (82 bytes per connection).

A ClientApp is a process of its own below the SuperNode (``flower-supernode`` > ``flower-superexec`` > ClientApp), and
the connection belongs to the SuperNode: it is found through ``/proc``. A ServerApp lives in the network namespace of
the SuperLink and sees the same connections from the other end. With process isolation in containers the SuperNode is
no parent process and does not appear in ``/proc``. If a SuperNode and its SuperExec have a network namespace of their
own, set ``FEDALLOY_FLEET_PORT``: then every connection to that port in the namespace is the SuperNode's. Otherwise a
reading says ``not_measured`` and why; it never guesses.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client_app.sock_diag import SockDiag, Socket
from proto.fedalloy.v1 import report_pb2

FLEET_PORT = 9092
OWN_NAMESPACE = "FEDALLOY_FLEET_PORT"
"""Environment variable: the Fleet port, set if the network namespace belongs to a single SuperLink or SuperNode."""

_ETHERNET, _IPV4, _IPV6, _TCP, _TCP_TIMESTAMPS = 14, 20, 40, 20, 12
_ESTABLISHED, _LISTEN = 1, 10  # enum in the kernel's net/tcp_states.h
_OPTION_TIMESTAMPS = 1  # TCPI_OPT_TIMESTAMPS


class WireError(RuntimeError):
    """The wire cannot be read here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Counters of one established TCP connection, as the kernel keeps them; bytes are TCP payload.

    ``bytes_sent`` includes retransmissions; ``data_segments_*`` are the segments that carried payload, the others were
    pure acknowledgements (and the handshake).
    """

    local_address: str
    local_port: int
    remote_address: str
    remote_port: int
    cookie: int
    inode: int
    header_bytes: int
    bytes_sent: int
    bytes_acked: int
    bytes_received: int
    bytes_retransmitted: int
    segments_out: int
    segments_in: int
    data_segments_out: int
    data_segments_in: int

    def to_proto(self) -> report_pb2.ConnectionReading:
        """The same as a wire message (which has no field for the inode and the data segments)."""
        return report_pb2.ConnectionReading(
            local_address=self.local_address,
            local_port=self.local_port,
            remote_address=self.remote_address,
            remote_port=self.remote_port,
            cookie=self.cookie,
            bytes_sent=self.bytes_sent,
            bytes_acked=self.bytes_acked,
            bytes_received=self.bytes_received,
            bytes_retransmitted=self.bytes_retransmitted,
            segments_out=self.segments_out,
            segments_in=self.segments_in,
            header_bytes=self.header_bytes,
        )


class SocketTable:
    """This network namespace's TCP sockets; use in one thread.

    Raises:
        WireError: there is no ``sock_diag`` here (not Linux, or a kernel without it).
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise WireError(f"TCP counters need Linux, this is {sys.platform}")
        try:
            self._kernel = SockDiag()
        except OSError as error:
            raise WireError(f"cannot open a sock_diag socket ({error!r})") from None

    def __enter__(self) -> SocketTable:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the netlink socket."""
        self._kernel.close()

    def connections(self, local_port: int = 0) -> list[Connection]:
        """Established connections, at one local port or (0) at all.

        Raises:
            WireError: the kernel did not answer, or left out the counters that are needed.
        """
        return [_to_connection(row) for row in self._dump(_ESTABLISHED, local_port)]

    def again(self, connection: Connection) -> Connection | None:
        """The same connection now, without reading any other; None if it has ended.

        Raises:
            WireError: the kernel did not answer.
        """
        local = (connection.local_address, connection.local_port)
        try:
            row = self._kernel.find(local, (connection.remote_address, connection.remote_port))
        except OSError as error:
            raise WireError(f"sock_diag does not answer ({error!r})") from None
        if row is None or row.state != _ESTABLISHED or row.cookie != connection.cookie:
            return None
        return _to_connection(row)

    def listeners(self, local_port: int = 0) -> dict[int, int]:
        """Inode to local port of every listening socket."""
        return {row.inode: row.local[1] for row in self._dump(_LISTEN, local_port, counters=False)}

    def _dump(self, state: int, local_port: int, *, counters: bool = True) -> list[Socket]:
        rows: list[Socket] = []
        # A dual-stack socket lists its IPv4 peers in the IPv6 table, as ::ffff:a.b.c.d.
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                found = self._kernel.dump(family, state, local_port, counters=counters)
            except OSError as error:
                raise WireError(f"sock_diag does not answer ({error!r})") from None
            rows += [row for row in found if row.state == state and local_port in (0, row.local[1])]
        return rows


def _to_connection(row: Socket) -> Connection:
    info = row.counters
    if info is None:  # Linux before 4.19 has no tcpi_bytes_sent
        raise WireError("this kernel's TCP counters lack tcpi_bytes_sent")
    local, remote = _plain(row.local[0]), _plain(row.remote[0])
    timestamps = _TCP_TIMESTAMPS if info.options & _OPTION_TIMESTAMPS else 0
    return Connection(
        local_address=local,
        local_port=row.local[1],
        remote_address=remote,
        remote_port=row.remote[1],
        cookie=row.cookie,
        inode=row.inode,
        header_bytes=_ETHERNET + (_IPV6 if ":" in remote else _IPV4) + _TCP + timestamps,
        bytes_sent=info.bytes_sent,
        bytes_acked=info.bytes_acked,
        bytes_received=info.bytes_received,
        bytes_retransmitted=info.bytes_retransmitted,
        segments_out=info.segments_out,
        segments_in=info.segments_in,
        data_segments_out=info.data_segments_out,
        data_segments_in=info.data_segments_in,
    )


def _plain(address: str) -> str:
    """An address without IPv6's mapping, if an IPv6 socket carries IPv4."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


# ------------------------------------------------------------------------------------------------- processes


def ancestors(pid: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """Process ids and command lines from the parent upwards.

    Raises:
        WireError: ``/proc`` does not show a process.
    """
    current = os.getpid() if pid is None else pid
    while current > 1:
        try:
            stat = Path(f"/proc/{current}/stat").read_text(errors="replace")
            # The second field is the name in parentheses and may contain anything, so count from its end.
            current = int(stat[stat.rindex(")") + 2 :].split()[1])
            if current < 1:
                return
            arguments = Path(f"/proc/{current}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError) as error:
            raise WireError(f"/proc does not show the parent processes ({error})") from None
        yield current, arguments


def find_ancestor(program: str) -> tuple[int, list[str]] | None:
    """The nearest parent process that runs ``program`` (found as ``program`` or ``python .../program``)."""
    for pid, arguments in ancestors():
        if any(os.path.basename(argument) == program for argument in arguments[:3]):
            return pid, arguments
    return None


def option(arguments: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``; the last one wins."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(name + "="):
            value = argument[len(name) + 1 :]
    return value


def _port(address: str | None) -> int:
    digits = (address or "").rpartition(":")[2]
    return int(digits) if digits.isdecimal() else FLEET_PORT


def _socket_inodes(pid: int) -> set[int]:
    inodes = set()
    try:
        entries = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise WireError(f"cannot look at the sockets of process {pid} ({error.strerror})") from None
    for entry in entries:
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue  # closed in between
        if target.startswith("socket:["):
            inodes.add(int(target[8:-1]))
    return inodes


# -------------------------------------------------------------------------------------------------- readings


def connections_of(pid: int, remote_port: int) -> list[Connection]:
    """Established connections that process ``pid`` opened to ``remote_port``.

    Raises:
        WireError: they cannot be read.
    """
    inodes = _socket_inodes(pid)
    with SocketTable() as table:
        # A connection whose local port the process listens on was opened by somebody else (the ClientApp, on loopback).
        served = {port for inode, port in table.listeners().items() if inode in inodes}
        return [
            connection
            for connection in table.connections()
            if connection.inode in inodes
            and connection.local_port not in served
            and connection.remote_port == remote_port
        ]


def read_fleet_wire() -> report_pb2.WireReading:
    """Counters of the SuperNode's connection to the SuperLink, read inside a ClientApp; never raises."""
    try:
        found = find_ancestor("flower-supernode")
        if found is None:
            return reading_of(_connections_of_namespace())
        pid, arguments = found
        port = _port(option(arguments, "--superlink"))
        connections = connections_of(pid, port)
        if not connections:
            raise WireError(f"flower-supernode (process {pid}) has no established connection to port {port}")
        return reading_of(connections)
    except Exception as error:  # a round matters more than its wire reading
        return _not_measured(error)


def _connections_of_namespace() -> list[Connection]:
    """Established connections from this network namespace to the Fleet port, if that is declared."""
    port = _declared_port()
    if port is None:
        raise WireError(
            "no flower-supernode among the parent processes (a simulation, or process isolation without "
            f"{OWN_NAMESPACE})"
        )
    with SocketTable() as table:
        if table.listeners(port):
            raise WireError(
                f"this network namespace listens on the Fleet port {port}, so it is not a SuperNode's alone"
            )
        connections = [connection for connection in table.connections() if connection.remote_port == port]
    if not connections:
        raise WireError(f"no established connection to port {port} in this network namespace")
    return connections


def _declared_port() -> int | None:
    text = os.environ.get(OWN_NAMESPACE)
    if text is None:
        return None
    if not text.isdecimal():
        raise WireError(f"{OWN_NAMESPACE}={text!r}, expected a port number")
    return int(text)


def fleet_port() -> int:
    """The SuperLink's Fleet port: from its command line if it is a parent process, else declared, else the default.

    Raises:
        WireError: the SuperLink only simulates.
    """
    found = find_ancestor("flower-superlink")
    if found is None:
        return _declared_port() or FLEET_PORT
    if "--simulation" in found[1]:
        raise WireError("a simulation has no network")
    return _port(option(found[1], "--fleet-api-address"))


def server_connections(table: SocketTable, port: int) -> list[Connection]:
    """Every SuperNode's connection, at the SuperLink's end.

    Raises:
        WireError: nothing listens on ``port`` in this network namespace, or the counters cannot be read.
    """
    if not table.listeners(port):
        raise WireError(f"nobody listens on the Fleet port {port} in this network namespace")
    return table.connections(port)


def reading_of(connections: list[Connection]) -> report_pb2.WireReading:
    """A reading, taken now."""
    return report_pb2.WireReading(unix_time=time.time(), connections=[c.to_proto() for c in connections])


def _not_measured(error: Exception) -> report_pb2.WireReading:
    reason = str(error) if isinstance(error, WireError) else repr(error)
    return report_pb2.WireReading(unix_time=time.time(), not_measured=reason or type(error).__name__)
