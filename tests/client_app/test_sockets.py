from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format

from client_app import sock_diag, sockets
from client_app.sockets import Connection, SocketTable, WireError
from proto.fedalloy.v1 import report_pb2

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP counters need Linux")


@contextmanager
def pair(host: str, bind: str | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected client and server socket on loopback."""
    family = socket.AF_INET6 if ":" in (bind or host) else socket.AF_INET
    with ExitStack() as stack:
        dual = family == socket.AF_INET6 and ":" not in host
        try:
            listener = socket.create_server((bind or host, 0), family=family, dualstack_ipv6=dual)
        except OSError as error:
            pytest.skip(f"no {bind or host} on this machine: {error}")
        stack.enter_context(listener)
        client = stack.enter_context(socket.create_connection((host, listener.getsockname()[1])))
        server = stack.enter_context(listener.accept()[0])
        yield client, server


def send(sender: socket.socket, receiver: socket.socket, nbytes: int) -> None:
    sender.sendall(b"x" * nbytes)
    left = nbytes
    while left:
        left -= len(receiver.recv(min(left, 65536)))


def ends(client: socket.socket) -> tuple[Connection, Connection]:
    """Client's and server's counters, once everything is acknowledged."""
    ours, theirs = client.getsockname()[1], client.getpeername()[1]
    while True:
        with SocketTable() as table:
            (near,) = [c for c in table.connections(ours) if c.remote_port == theirs]
            (far,) = [c for c in table.connections(theirs) if c.remote_port == ours]
        if near.bytes_acked - 1 == near.bytes_sent and far.bytes_acked == far.bytes_sent:
            return near, far


@linux
@pytest.mark.parametrize(
    ("host", "bind", "header"),
    [("127.0.0.1", None, 66), ("127.0.0.1", "::", 66), ("::1", None, 86)],
    ids=["ipv4", "ipv4-in-ipv6", "ipv6"],
)
def test_counters_are_what_was_sent(host: str, bind: str | None, header: int) -> None:
    with pair(host, bind) as (client, server):
        send(client, server, 123_456)
        send(server, client, 789)
        near, far = ends(client)
    assert (near.bytes_sent, near.bytes_received) == (123_456, 789)
    assert (far.bytes_sent, far.bytes_received) == (789, 123_456)
    assert near.segments_out >= near.data_segments_out > 0
    assert (near.data_segments_out, near.data_segments_in) == (far.data_segments_in, far.data_segments_out)
    assert near.local_address == far.remote_address == host
    assert near.local_port == far.remote_port
    assert near.cookie != far.cookie
    timestamps = Path("/proc/sys/net/ipv4/tcp_timestamps").read_text().strip() != "0"
    assert near.header_bytes == header - (0 if timestamps else 12)


@linux
def test_the_wire_message_has_the_same_counters() -> None:
    with pair("127.0.0.1") as (client, server):
        send(client, server, 1000)
        near, _ = ends(client)
    message = near.to_proto()
    for field in report_pb2.ConnectionReading.DESCRIPTOR.fields:
        assert getattr(message, field.name) == getattr(near, field.name), field.name


SUPERNODE = """
    import socket, subprocess, sys
    # A second connection, opened by somebody else to a port that this process serves.
    listener = socket.create_server(("127.0.0.1", 0))
    stranger = socket.create_connection(listener.getsockname())
    served, _ = listener.accept()
    host, port = sys.argv[sys.argv.index("--superlink") + 1].split(":")
    fleet = socket.create_connection((host, int(port)))
    fleet.sendall(b"x" * 4321)
    assert fleet.recv(1)
    # superexec and ClientApp
    app = "from client_app.sockets import read_fleet_wire; from google.protobuf import json_format; "
    app += "print(json_format.MessageToJson(read_fleet_wire()))"
    middle = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    sys.exit(subprocess.run([sys.executable, "-c", middle, app]).returncode)
"""


@linux
def test_client_app_finds_the_supernodes_connection(tmp_path: Path) -> None:
    program = tmp_path / "flower-supernode"
    program.write_text(textwrap.dedent(SUPERNODE))
    with socket.create_server(("127.0.0.1", 0)) as superlink:
        port = superlink.getsockname()[1]
        command = [sys.executable, str(program), "--insecure", "--superlink", f"127.0.0.1:{port}"]
        process = subprocess.Popen(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
        connection, peer = superlink.accept()
        with connection:
            left = 4321
            while left:
                left -= len(connection.recv(left))
            connection.sendall(b"!")
            output, _ = process.communicate(timeout=120)
    reading = json_format.Parse(output, report_pb2.WireReading())
    assert reading.not_measured == ""
    (found,) = reading.connections
    assert (found.local_address, found.local_port) == peer
    assert (found.bytes_sent, found.bytes_received) == (4321, 1)


@linux
def test_server_reads_all_connections_of_its_port() -> None:
    with pair("127.0.0.1") as (client, server):
        send(client, server, 500)
        ends(client)
        with sockets.SocketTable() as table:
            found = sockets.server_connections(table, server.getsockname()[1])
        assert [(c.remote_port, c.bytes_received) for c in found] == [(client.getsockname()[1], 500)]


@linux
def test_not_below_a_supernode_is_not_measured() -> None:
    reading = sockets.read_fleet_wire()
    assert "no flower-supernode among the parent processes" in reading.not_measured
    assert not reading.connections


@linux
def test_a_port_without_listener_is_not_measured() -> None:
    with socket.socket() as held:  # bound and no listener, so that nobody else takes the port meanwhile
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with (
            sockets.SocketTable() as table,
            pytest.raises(sockets.WireError, match=f"nobody listens on the Fleet port {port}"),
        ):
            sockets.server_connections(table, port)


def test_without_linux_or_sock_diag_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(sockets.WireError, match="need Linux, this is darwin"), sockets.SocketTable():
            pass
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sock_diag, "_PROTOCOL", 999)
    with pytest.raises(sockets.WireError, match="cannot open a sock_diag socket"), sockets.SocketTable():
        pass


def test_a_kernel_without_the_counters_is_not_measured() -> None:
    row = sock_diag.Socket(socket.AF_INET, 1, ("10.0.0.1", 1), ("10.0.0.2", 2), 3, 4, None)
    with pytest.raises(WireError, match="lack tcpi_bytes_sent"):
        sockets._to_connection(row)


@linux
@pytest.mark.parametrize(
    ("host", "bind"), [("127.0.0.1", None), ("127.0.0.1", "::"), ("::1", None)], ids=["ipv4", "ipv4-in-ipv6", "ipv6"]
)
def test_one_connection_is_read_alone(host: str, bind: str | None) -> None:
    with pair(host, bind) as (client, server), SocketTable() as table:
        before = ends(client)
        send(client, server, 4000)
        after = ends(client)
        assert tuple(table.again(connection) for connection in before) == after
        assert table.again(replace(before[0], cookie=before[0].cookie + 1)) is None
    with SocketTable() as table:
        assert table.again(before[1]) is None


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        (["python", "/bin/flower-superlink", "--insecure"], 9092),
        (["flower-superlink", "--fleet-api-address", "0.0.0.0:1234"], 1234),
        (["flower-superlink", "--fleet-api-address=[::]:4321"], 4321),
    ],
)
def test_fleet_port_comes_from_the_superlinks_command_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], port: int
) -> None:
    monkeypatch.setattr(sockets, "ancestors", lambda: iter([(7, ["flower-superexec"]), (6, arguments)]))
    assert sockets.fleet_port() == port


def test_fleet_port_without_superlink_is_flowers_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "ancestors", lambda: iter([(7, ["flower-superexec"])]))
    assert sockets.fleet_port() == 9092


def test_a_simulation_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "ancestors", lambda: iter([(7, ["python", "/bin/flower-superlink", "--simulation"])]))
    with pytest.raises(sockets.WireError, match="a simulation has no network"):
        sockets.fleet_port()


def test_importing_it_is_cheap() -> None:
    """A request for counters is answered by a fresh process each time."""
    script = "import sys, client_app.sockets; print(sorted({'torch', 'flwr'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@linux
def test_a_declared_namespace_gives_all_connections_to_the_fleet_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair("127.0.0.1") as (client, server):
        port = client.getpeername()[1]
        send(client, server, 1000)
        # The listener of this test would be on another machine.
        monkeypatch.setattr(SocketTable, "listeners", lambda self, local_port=0: {})
        monkeypatch.setenv(sockets.OWN_NAMESPACE, str(port))
        (found,) = sockets.read_fleet_wire().connections
        assert (found.local_port, found.remote_port) == (client.getsockname()[1], port)
        assert found.bytes_sent == 1000


@linux
@pytest.mark.parametrize("declared", ["", "fleet", "-1"])
def test_a_declaration_that_is_no_port_is_not_measured(declared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sockets.OWN_NAMESPACE, declared)
    assert f"{declared!r}, expected a port number" in sockets.read_fleet_wire().not_measured


@linux
def test_a_declaration_that_cannot_be_true_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pair("127.0.0.1") as (client, _):
        port = client.getpeername()[1]
        monkeypatch.setenv(sockets.OWN_NAMESPACE, str(port))
        assert f"listens on the Fleet port {port}" in sockets.read_fleet_wire().not_measured
    assert "no established connection" in sockets.read_fleet_wire().not_measured


def test_a_serverapp_apart_from_its_superlink_takes_the_declared_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "find_ancestor", lambda program: None)
    monkeypatch.setenv(sockets.OWN_NAMESPACE, "9443")
    assert sockets.fleet_port() == 9443
