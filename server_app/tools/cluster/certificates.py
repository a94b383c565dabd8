"""Makes certificates and SuperNode keys; only the files' owner can read the private ones."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server_app.tools.errors import ToolError

VALID = timedelta(days=825)
"""Longest lifetime of a server certificate that common TLS clients accept."""
_CLOCK_SKEW = timedelta(minutes=5)


class CertificateError(ToolError):
    """Certificates are not as expected; the message says what to do."""


@dataclass(frozen=True)
class ServerFiles:
    """Paths of the authority's certificate, and of the server's certificate and key."""

    authority: Path
    certificate: Path
    key: Path


def make_server_files(folder: Path, hosts: Iterable[str]) -> ServerFiles:
    """A fresh certificate authority and one server certificate that it signed, in ``folder`` (0700).

    One certificate serves the Fleet link and the control API, which the ServerApp reaches as 127.0.0.1. The
    authority's key is not kept: nobody can sign a second server with it.

    Args:
        folder: made if needed; files in it are replaced.
        hosts: names and addresses that clients use for the server; ``localhost`` and ``127.0.0.1`` are always in.
    """
    private_folder(folder)
    authority_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedAlloy local authority")])
    authority = (
        _builder(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedAlloy SuperLink")])
    names = [_general_name(host) for host in dict.fromkeys(["localhost", "127.0.0.1", *hosts])]
    certificate = (
        _builder(subject, issuer, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    files = ServerFiles(folder / "ca.crt", folder / "server.pem", folder / "server.key")
    _write(files.authority, authority.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    pem = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(files.key, pem, 0o600)
    return files


def require_client_ids(names: Sequence[str]) -> None:
    """Require names that can be files and node-config values, each once.

    Raises:
        CertificateError: names the first that cannot.
    """
    from strategies.framework.answers import CLIENT_ID  # this also imports Flower

    for number, name in enumerate(names):
        if not CLIENT_ID.fullmatch(name):
            raise CertificateError(f"client id {name!r}, expected letters, digits and ._- only, 64 at most")
        if name in names[:number]:
            raise CertificateError(f"client id {name!r} occurs twice, expected one SuperNode for each")


def make_client_key(folder: Path, client_id: str) -> tuple[Path, Path]:
    """A P-384 key pair in OpenSSH format: ``<folder>/<client-id>`` (0600) and ``<client-id>.pub``."""
    private_folder(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    private, public = folder / client_id, folder / f"{client_id}.pub"
    openssh = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _write(private, openssh, 0o600)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, line + b"\n", 0o644)
    return private, public


def make_missing(folder: Path, hosts: Iterable[str], clients: Iterable[str], renew: Iterable[str] = ()) -> list[str]:
    """Make what a federation needs and ``folder`` lacks; returns a line for everything that was made.

    ``public/`` gets ``ca.crt`` and ``<client-id>.pub`` and may be shown to anybody, ``server/`` ``server.pem`` and
    ``server.key``, ``clients/<client-id>/`` the private key ``<client-id>``. Every private file has a folder of its
    own, so that each machine can be given its folder and no other.

    Args:
        folder: made if needed; existing files stay. A client with a public key has its pair, wherever the private key
            is now.
        hosts: names and addresses of the server; it is an error if its certificate lacks one. A renewed certificate
            keeps the old names.
        clients: client ids.
        renew: make these anew: ids of clients, or ``server`` (every client then needs the new ``ca.crt``).

    Raises:
        CertificateError: the server's certificate does not name a host; an unknown name to renew; a client id that is
            not a file name.
    """
    public, server = folder / "public", folder / "server"
    clients, renew, hosts = list(clients), set(renew), set(hosts)
    require_client_ids(clients)
    known = dict.fromkeys([*clients, *sorted(path.stem for path in public.glob("*.pub"))])
    if unknown := renew - {*known, "server"}:
        raise CertificateError(f"cannot renew {', '.join(sorted(unknown))}: expected server, {', '.join(known)}")
    made = []
    if "server" in renew or not (server / "server.key").exists():
        old = _names(server / "server.pem") if (server / "server.pem").exists() else set()
        make_server_files(server, sorted(hosts | old))
        made.append("server: authority and certificate made")
    elif missing := hosts - _names(server / "server.pem"):
        raise CertificateError(
            f"the server's certificate in {server} does not name {', '.join(sorted(missing))}; "
            "renew 'server', and give every client the new ca.crt"
        )
    if made or not (public / "ca.crt").exists():  # missing if an earlier call was stopped
        public.mkdir(parents=True, exist_ok=True)
        _write(public / "ca.crt", (server / "ca.crt").read_bytes(), 0o644)
    for client_id in known:
        private = folder / "clients" / client_id
        if client_id in renew or not (public / f"{client_id}.pub").exists():
            _, line = make_client_key(private, client_id)
            _write(public / line.name, line.read_bytes(), 0o644)
            made.append(f"{client_id}: key pair made")
    return made


def _names(certificate: Path) -> set[str]:
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))}


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _builder(subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + VALID)
    )


def _usage(*, key_cert_sign: bool = False, crl_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write and rename; the file never exists with wider permissions than ``mode``."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
