"""Reads the kernel's table of TCP sockets over netlink (``sock_diag``, man page sock_diag(7)), without privileges.

This module uses the structures of ``linux/inet_diag.h`` and ``linux/tcp.h`` directly: a library that wraps them takes
six times as long for a table of forty sockets, and cannot ask for a single one. A dump walks all of the kernel's
buckets, which takes milliseconds however few sockets there are; the time of :meth:`SockDiag.find` does not depend on
the number of sockets.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FAMILY, _PROTOCOL = 16, 4  # AF_NETLINK, NETLINK_SOCK_DIAG; Python has them on Linux only
_BY_FAMILY, _ERROR, _DONE = 20, 2, 3
_REQUEST, _DUMP = 1, 0x300
_INFO = 2  # the attribute that has the counters; asked for by bit 1
_HEADER = struct.Struct("=IHHII")
_ASKED = struct.Struct("=BBBBI")
_PORTS = struct.Struct(">HH")
_INTERFACE_AND_COOKIE = struct.Struct("=III")
_ANY = 0xFFFFFFFF
_ATTRIBUTE = struct.Struct("=HH")
_FOUND_HEAD = struct.Struct("=BBBB")
_COOKIE, _INODE = struct.Struct("=II"), struct.Struct("=I")
_FOUND_BYTES = 72
_CODE = struct.Struct("=i")
_BYTES, _SEGMENTS, _DATA_SEGMENTS, _SENT = (struct.Struct(form) for form in ("=QQ", "=II", "=II", "=QQ"))
_COUNTERS_BYTES = 216
"""Bytes of ``tcp_info`` up to ``tcpi_bytes_retrans``, which Linux has had since 4.19."""
_ANSWER_BYTES = 2**18
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Counters:
    """The fields of ``tcp_info`` that are read."""

    options: int
    bytes_acked: int
    bytes_received: int
    segments_out: int
    segments_in: int
    data_segments_in: int
    data_segments_out: int
    bytes_sent: int
    bytes_retransmitted: int


@dataclass(frozen=True, slots=True)
class Socket:
    """One row; ``counters`` is None if they were not requested, or the kernel is too old for them."""

    family: int
    state: int
    local: tuple[str, int]
    remote: tuple[str, int]
    cookie: int
    inode: int
    counters: Counters | None


class SockDiag:
    """A netlink socket; for one thread.

    Raises:
        OSError: the kernel does not speak ``sock_diag``.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(_FAMILY, socket.SOCK_RAW, _PROTOCOL)
        self._socket.settimeout(_PATIENCE)
        self._count = itertools.count(1)

    def close(self) -> None:
        """Close the netlink socket."""
        self._socket.close()

    def dump(self, family: int, state: int, local_port: int = 0, *, counters: bool = True) -> list[Socket]:
        """Sockets of a family in a state, at one local port or (0) at all; kernels may take the port as a hint.

        Raises:
            OSError: the kernel refuses.
        """
        return self._ask(family, 1 << state, (("", local_port), ("", 0)), counters=counters, flags=_DUMP)

    def find(self, local: tuple[str, int], remote: tuple[str, int]) -> Socket | None:
        """The socket between these addresses and ports, with its counters; None if it does not exist (any more).

        Raises:
            OSError: the kernel refuses.
        """
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        try:
            return next(iter(self._ask(family, _ANY, (local, remote), counters=True, flags=0)), None)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _ask(
        self, family: int, states: int, ends: tuple[tuple[str, int], tuple[str, int]], *, counters: bool, flags: int
    ) -> list[Socket]:
        number = next(self._count)
        (local, local_port), (remote, remote_port) = ends
        body = _ASKED.pack(family, socket.IPPROTO_TCP, (1 << (_INFO - 1)) if counters else 0, 0, states)
        body += _PORTS.pack(local_port, remote_port) + _address(family, local) + _address(family, remote)
        body += _INTERFACE_AND_COOKIE.pack(0, _ANY, _ANY)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST | flags, number, 0) + body)
        found: list[Socket] = []
        while True:
            for kind, sequence, message in _messages(self._socket.recv(_ANSWER_BYTES)):
                if sequence != number:
                    continue  # part of an answer that came too late
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    (code,) = _CODE.unpack_from(message)
                    raise OSError(-code, os.strerror(-code))
                found.append(_socket_of(message))
                if not flags:
                    return found


def _address(family: int, text: str) -> bytes:
    return (socket.inet_pton(family, text) if text else b"").ljust(16, b"\0")


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return
        yield kind, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _socket_of(message: bytes) -> Socket:
    family, state, _, _ = _FOUND_HEAD.unpack_from(message)
    local_port, remote_port = _PORTS.unpack_from(message, 4)
    width = 16 if family == socket.AF_INET6 else 4
    local, remote = (socket.inet_ntop(family, message[at : at + width]) for at in (8, 24))
    low, high = _COOKIE.unpack_from(message, 44)
    (inode,) = _INODE.unpack_from(message, _FOUND_BYTES - 4)
    cookie = low | high << 32
    return Socket(family, state, (local, local_port), (remote, remote_port), cookie, inode, _counters_in(message))


def _counters_in(message: bytes) -> Counters | None:
    at = _FOUND_BYTES
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        info = at + _ATTRIBUTE.size
        if kind == _INFO and length - _ATTRIBUTE.size >= _COUNTERS_BYTES:
            acked, received = _BYTES.unpack_from(message, info + 120)
            segments_out, segments_in = _SEGMENTS.unpack_from(message, info + 136)
            data_in, data_out = _DATA_SEGMENTS.unpack_from(message, info + 152)
            sent, again = _SENT.unpack_from(message, info + 200)
            options = message[info + 5]
            return Counters(options, acked, received, segments_out, segments_in, data_in, data_out, sent, again)
        if length < _ATTRIBUTE.size:
            return None
        at += (length + 3) & ~3
    return None
