"""Certificates and keys: what is in them, and who may read them."""

from __future__ import annotations

import ipaddress
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server_app.tools.cluster.certificates import CertificateError, make_client_key, make_missing, make_server_files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_server_certificate_names_the_hosts_and_is_signed_by_the_authority(tmp_path: Path) -> None:
    files = make_server_files(tmp_path / "c", ["server.example.org", "10.1.2.3", "localhost"])
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "server.example.org"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("127.0.0.1"),
        ipaddress.ip_address("10.1.2.3"),
    ]
    certificate.verify_directly_issued_by(authority)
    now = datetime.now(UTC)
    assert certificate.not_valid_before_utc < now
    assert timedelta(days=364) < certificate.not_valid_after_utc - now < timedelta(days=826)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_openssl_accepts_the_chain_and_key(tmp_path: Path) -> None:
    files = make_server_files(tmp_path / "c", [])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)  # raises where key and certificate do not belong together
    client = ssl.create_default_context(cafile=str(files.authority))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    right = server.wrap_bio(outgoing, incoming, server_side=True)
    for _ in range(4):
        for side in (left, right):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert left.version() == "TLSv1.3"


def test_private_files_are_the_owners_and_the_authority_key_is_not_kept(tmp_path: Path) -> None:
    files = make_server_files(tmp_path / "c", [])
    private, public = make_client_key(tmp_path / "k", "berlin")
    assert mode(tmp_path / "c") == mode(tmp_path / "k") == 0o700
    assert mode(files.key) == mode(private) == 0o600
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"ca.crt", "server.pem", "server.key"}
    assert public.name == "berlin.pub"


def test_client_keys_are_fresh_p384_pairs_in_openssh_format(tmp_path: Path) -> None:
    private, public = make_client_key(tmp_path, "berlin")
    key = serialization.load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    loaded = serialization.load_ssh_public_key(public.read_bytes())
    assert loaded == key.public_key()
    again, _ = make_client_key(tmp_path, "berlin")
    assert serialization.load_ssh_private_key(again.read_bytes(), None).private_numbers() != key.private_numbers()  # type: ignore[union-attr]


def test_what_is_missing_is_made_and_what_is_there_stays(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert make_missing(folder, ["superlink"], ["berlin"]) == [
        "server: authority and certificate made",
        "berlin: key pair made",
    ]
    authority, berlin = (folder / "public" / "ca.crt").read_bytes(), (folder / "clients/berlin/berlin").read_bytes()
    assert make_missing(folder, ["superlink"], ["berlin", "paris"]) == ["paris: key pair made"]
    assert make_missing(folder, ["superlink"], ["berlin", "paris"]) == []
    assert (folder / "public" / "ca.crt").read_bytes() == authority
    assert (folder / "clients/berlin/berlin").read_bytes() == berlin
    public = serialization.load_ssh_public_key((folder / "public" / "berlin.pub").read_bytes())
    private = serialization.load_ssh_private_key(berlin, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert {path.name for path in (folder / "public").iterdir()} == {"ca.crt", "berlin.pub", "paris.pub"}


def test_a_client_or_the_server_can_be_renewed_alone(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    make_missing(folder, ["superlink"], ["berlin", "paris"])
    files = [folder / "public" / name for name in ("ca.crt", "berlin.pub", "paris.pub")]
    before = [path.read_bytes() for path in files]
    assert make_missing(folder, ["superlink"], ["berlin", "paris"], ["berlin"]) == ["berlin: key pair made"]
    assert [path.read_bytes() == old for path, old in zip(files, before, strict=True)] == [True, False, True]
    make_missing(folder, ["superlink", "10.0.0.1"], ["berlin", "paris"], ["server"])
    assert files[0].read_bytes() != before[0]
    with pytest.raises(CertificateError, match=r"cannot renew rome: expected server, berlin, paris"):
        make_missing(folder, ["superlink"], ["berlin", "paris"], ["rome"])


def test_renewing_needs_only_the_name_and_keeps_the_servers_names(tmp_path: Path) -> None:
    make_missing(tmp_path, ["superlink", "10.0.0.1"], ["berlin", "paris"])
    before = (tmp_path / "public" / "paris.pub").read_bytes()
    assert make_missing(tmp_path, [], [], ["berlin"]) == ["berlin: key pair made"]
    assert (tmp_path / "public" / "paris.pub").read_bytes() == before
    make_missing(tmp_path, [], [], ["server"])
    assert make_missing(tmp_path, ["superlink", "10.0.0.1"], []) == []  # else an error: it would not name them


def test_a_private_key_that_was_taken_away_is_not_replaced(tmp_path: Path) -> None:
    make_missing(tmp_path, ["superlink"], ["berlin"])
    public = (tmp_path / "public" / "berlin.pub").read_bytes()
    (tmp_path / "clients" / "berlin" / "berlin").unlink()
    assert make_missing(tmp_path, ["superlink"], ["berlin", "rome"]) == ["rome: key pair made"]
    assert (tmp_path / "public" / "berlin.pub").read_bytes() == public


def test_stopped_before_the_authority_was_published(tmp_path: Path) -> None:
    make_missing(tmp_path, ["superlink"], [])
    authority = (tmp_path / "public" / "ca.crt").read_bytes()
    (tmp_path / "public" / "ca.crt").unlink()
    make_missing(tmp_path, ["superlink"], [])
    assert (tmp_path / "public" / "ca.crt").read_bytes() == authority


def test_a_certificate_that_lacks_a_host_is_no_success(tmp_path: Path) -> None:
    make_missing(tmp_path, ["superlink"], [])
    make_missing(tmp_path, ["superlink", "127.0.0.1"], [])
    with pytest.raises(CertificateError, match=r"does not name other.example.org; renew 'server'"):
        make_missing(tmp_path, ["superlink", "other.example.org"], [])


def test_a_client_id_that_is_no_file_name_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for name in ("b/c", "../b", ""):
        with pytest.raises(CertificateError, match=r"client id .*, expected letters"):
            make_missing(tmp_path / "certs", ["localhost"], ["a", name])
    assert not (tmp_path / "certs").exists()
