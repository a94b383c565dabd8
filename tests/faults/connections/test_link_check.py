"""Refused links say what to do: no TLS, another authority, an expired certificate, another name, a key that is open."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from server_app.tools.cli import app
from server_app.tools.cluster import certificates
from server_app.tools.cluster.certificates import ServerFiles, make_client_key, make_missing, make_server_files
from server_app.tools.cluster.link_check import LinkError, advice, check_key, check_link


@contextmanager
def grpc_server(files: ServerFiles | None) -> Iterator[str]:
    """What a SuperLink's Fleet port is: a gRPC server with or without TLS."""
    server = grpc.server(ThreadPoolExecutor(1))
    if files is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (files.key.read_bytes(), files.certificate.read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_tls_and_plain_links_that_fit_are_good(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, [])
    with grpc_server(files) as address:
        assert "the certificate is accepted" in check_link(address, files.authority)
    with grpc_server(None) as address:
        assert "HTTP/2 without TLS" in check_link(address, None)


def test_plaintext_to_a_tls_port_and_tls_to_a_plaintext_port(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, [])
    with (
        grpc_server(files) as address,
        pytest.raises(LinkError, match=r"--root-certificates ca\.crt instead of --insec"),
    ):
        check_link(address, None)
    with (
        grpc_server(None) as address,
        pytest.raises(LinkError, match=r"does not speak TLS.*--insecure, or the SuperLink"),
    ):
        check_link(address, files.authority)


def test_a_certificate_of_another_authority(tmp_path: Path) -> None:
    files, others = make_server_files(tmp_path / "a", []), make_server_files(tmp_path / "b", [])
    with grpc_server(files) as address, pytest.raises(LinkError, match=r"another authority.*present ca\.crt"):
        check_link(address, others.authority)


@pytest.mark.parametrize(
    ("days", "found"), [(-900, "has expired: make a new one"), (30, "not valid yet: compare the c")]
)
def test_a_certificate_out_of_its_time(days: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhen(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Elsewhen)
    files = make_server_files(tmp_path, [])
    with grpc_server(files) as address, pytest.raises(LinkError, match=found):
        check_link(address, files.authority)


def test_a_certificate_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_server_files(tmp_path, ["superlink.example.org"])
    real = socket.create_connection
    with grpc_server(files) as address:
        port = address.rpartition(":")[2]
        monkeypatch.setattr(socket, "create_connection", lambda _, timeout: real(("127.0.0.1", int(port)), timeout))
        with pytest.raises(LinkError, match=r"does not name 'other\.example\.org'"):
            check_link(f"other.example.org:{port}", files.authority)
        assert "accepted" in check_link(f"superlink.example.org:{port}", files.authority)


def test_nobody_there_and_no_certificate(tmp_path: Path) -> None:
    with socket.socket() as held:  # bound and no listener, so that nobody else takes the port meanwhile
        held.bind(("127.0.0.1", 0))
        with pytest.raises(LinkError, match=r"nobody answers at .* is the SuperLink up"):
            check_link(f"127.0.0.1:{held.getsockname()[1]}", None)
    with pytest.raises(LinkError, match="expected HOST:PORT"):
        check_link("superlink", None)
    (tmp_path / "ca.crt").write_text("no")
    with pytest.raises(LinkError, match="is not a certificate"):
        check_link("127.0.0.1:1", tmp_path / "ca.crt")


def test_keys_are_the_owners_alone(tmp_path: Path) -> None:
    private, public = make_client_key(tmp_path, "berlin")
    assert private.stat().st_mode & 0o777 == 0o600
    assert "a private key" in check_key(private)
    private.chmod(0o644)
    with pytest.raises(LinkError, match=r"can be read by others \(mode 0644, expected 0600\): chmod 600"):
        check_key(private)
    public.chmod(0o600)
    with pytest.raises(LinkError, match="holds no private key"):
        check_key(public)
    make_missing(tmp_path / "all", ["127.0.0.1"], ["berlin", "paris"])
    keys = [path for path in (tmp_path / "all").rglob("*") if path.name in ("berlin", "paris", "server.key")]
    assert len([path for path in keys if path.is_file()]) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    private, _ = make_client_key(tmp_path, "berlin")
    private.chmod(0o640)
    done = CliRunner().invoke(app, ["check", "127.0.0.1:1", "--key", str(private)])
    assert done.exit_code != 0
    assert "chmod 600" in done.output


def test_a_supernodes_log_is_understood() -> None:
    assert "flwr supernode register KEY.pub" in advice("...\n[code: 2004] Failed to activate SuperNode.\n")
    assert "fedalloy check" in advice("Ssl handshake failed: SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED")
    assert advice("all is well") == ""
