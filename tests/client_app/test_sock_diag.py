"""What the kernel says about sockets, read by hand; numbers are compared in test_sockets.py."""

from __future__ import annotations

import socket
import sys

import pytest

from client_app.sock_diag import SockDiag, _counters_in, _messages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="netlink is Linux")


def test_a_dump_has_every_socket_in_the_state() -> None:
    kernel = SockDiag()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        clients = [socket.create_connection(listener.getsockname()) for _ in range(50)]
        served = [listener.accept()[0] for _ in clients]
        found = kernel.dump(socket.AF_INET, 1, port)
        assert {row.remote[1] for row in found} == {client.getsockname()[1] for client in clients}
        assert all(row.counters is not None and row.local == ("127.0.0.1", port) for row in found)
        assert [row.local[1] for row in kernel.dump(socket.AF_INET, 10, port, counters=False)] == [port]
        for each in [*clients, *served]:
            each.close()
    kernel.close()


def test_one_that_is_not_there_is_none_and_a_refusal_is_an_error() -> None:
    kernel = SockDiag()
    assert kernel.find(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    with pytest.raises(OSError, match=r"No such file|Invalid argument|not supported"):
        kernel.dump(200, 1)  # no such family
    kernel.close()


def test_what_is_cut_off_is_not_read() -> None:
    assert list(_messages(b"\0" * 16)) == []
    assert list(_messages(b"\x01")) == []
    attribute = (8).to_bytes(2, sys.byteorder) + (2).to_bytes(2, sys.byteorder) + b"\0" * 4
    assert _counters_in(b"\0" * 72 + attribute) is None  # an older kernel's
    assert _counters_in(b"\0" * 76) is None
