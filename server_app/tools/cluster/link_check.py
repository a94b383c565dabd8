"""Finds out why a SuperNode cannot connect: checks the key and the SuperLink's port, and says what to do.

Flower's SuperNode retries a failing link forever and says little; this tries once, with the same files.
"""

from __future__ import annotations

import socket
import ssl
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedalloy_adapters.words import one_line
from server_app.tools.errors import ToolError

_NEW_CERTIFICATE = "make a new one at the server (fedalloy certificates --renew server) and restart the SuperLink"
_REFUSALS = {
    "Failed to activate SuperNode": (
        "the SuperLink does not know its key: at the server, flwr supernode register KEY.pub CONNECTION (or a "
        "SuperNode with this key was online less than a minute ago: start it again then)"
    ),
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate was not accepted: fedalloy check HOST:PORT says why",
    "WRONG_VERSION_NUMBER": "one end speaks TLS and the other does not: fedalloy check HOST:PORT says which",
}


class LinkError(ToolError):
    """The link cannot work; the message says what was found and what to do."""


def advice(log: str) -> str:
    """What to do about the last refusal in a SuperNode's log; empty if the log has no known reason."""
    found = [(log.rfind(words), what) for words, what in _REFUSALS.items() if words in log]
    return max(found)[1] if found else ""


def check_link(address: str, authority: Path | None, timeout: float = 10.0) -> str:
    """Connect to a SuperLink's Fleet port once, as a SuperNode would; returns a line that says what is there.

    Args:
        address: ``host:port``.
        authority: the SuperNode's ``--root-certificates``; None: ``--insecure``.
        timeout: seconds.

    Raises:
        LinkError: nothing listens, one end speaks TLS and the other does not, or the certificate is not accepted.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise LinkError(f"{address!r}: expected HOST:PORT, for example superlink.example.org:9092")
    context = ssl.create_default_context()
    if authority is not None:
        try:
            context = ssl.create_default_context(cafile=str(authority))
        except OSError as error:
            raise LinkError(
                f"{authority} is not a certificate: {error.strerror or error}; get the server's ca.crt"
            ) from None
    try:
        with socket.create_connection((host, int(port)), timeout) as plain:
            if authority is None:
                return _check_plain(address, plain)
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return f"{address}: TLS ({secure.version()}), and the certificate is accepted"
    except ssl.SSLCertVerificationError as error:
        raise LinkError(f"{address}: {_why(error, host)}") from None
    except (ssl.SSLError, ConnectionResetError) as error:
        found = getattr(error, "reason", error)
        raise LinkError(
            f"{address} does not speak TLS ({found}): start the SuperNode with --insecure, or "
            "the SuperLink with --ssl-certfile, --ssl-keyfile and --ssl-ca-certfile"
        ) from None
    except OSError as error:
        raise LinkError(
            f"nobody answers at {address} ({error.strerror or error}): is the SuperLink up, and is this its Fleet port?"
        ) from None


def check_key(key: Path) -> str:
    """Check that only the owner can read a SuperNode's private key, and that Flower accepts its kind.

    Raises:
        LinkError: it is not so.
    """
    try:
        mode, data = stat.S_IMODE(key.stat().st_mode), key.read_bytes()
    except OSError as error:
        raise LinkError(f"cannot read the key {key}: {error.strerror}") from None
    if mode & 0o077:
        raise LinkError(f"the key {key} can be read by others (mode {mode:04o}, expected 0600): chmod 600 {key}")
    private: object
    try:
        try:
            private = serialization.load_ssh_private_key(data, None)
        except ValueError:
            private = serialization.load_pem_private_key(data, None)
    except (ValueError, UnsupportedAlgorithm):
        raise LinkError(f"{key} holds no private key: make one with fedalloy certificates") from None
    except TypeError:
        raise LinkError(
            f"the key {key} is protected by a passphrase, for which Flower cannot ask: make one without, with fedalloy "
            "certificates"
        ) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise LinkError(f"{key} is not an elliptic-curve key, which Flower needs: make one with fedalloy certificates")
    return f"{key}: a private key that only its owner can read"


def check_registered(address: str, authority: Path | None, key: Path, timeout: float = 10.0) -> str:
    """Ask the SuperLink whether it knows a key that :func:`check_key` has accepted; nothing changes there.

    This sends a SuperNode's first request with an invalid heartbeat interval: Flower 1.39 looks up the key first.

    Raises:
        LinkError: it does not know the key, or the clocks of both ends differ.
    """
    import grpc
    from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    private = serialization.load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    public = private.public_key()
    credentials = grpc.ssl_channel_credentials(authority.read_bytes()) if authority else None
    plain = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    signing = NodeAuthClientInterceptor(private, public)
    versioned = RuntimeVersionClientInterceptor(component_name="SuperNode")
    with plain, grpc.intercept_channel(plain, versioned, signing) as channel:
        request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=-1.0)
        try:
            FleetStub(channel).ActivateNode(request, timeout=timeout)
        except grpc.RpcError as error:
            said = str(error.details()) if isinstance(error, grpc.Call) else str(error)
            found = FlowerError.from_json(said)
            if found is not None and found.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                return f"{address}: the SuperLink knows this key"
            if found is not None and found.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise LinkError(
                    f"the SuperLink at {address} does not know the key {key}: at the server, flwr supernode register "
                    f"{key.name}.pub CONNECTION --name CLIENT-ID"
                ) from None
            if "Invalid timestamp" in said:
                raise LinkError(
                    f"{address} finds this machine's clock wrong: compare the clocks of both ends"
                ) from None
            raise LinkError(f"{address} does not say whether it knows the key: {one_line(said, 200)}") from None
    return f"{address}: the SuperLink knows this key"


def _check_plain(address: str, plain: socket.socket) -> str:
    """A gRPC server without TLS sends its HTTP/2 settings at once; one with TLS waits for a hello, or hangs up."""
    plain.settimeout(3.0)
    try:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        said = plain.recv(9)
    except (TimeoutError, ConnectionResetError):
        said = b""
    if said[3:4] == b"\x04":
        return f"{address}: HTTP/2 without TLS"
    raise LinkError(
        f"{address} does not speak plain HTTP/2; if it speaks TLS, start the SuperNode with --root-certificates ca.crt "
        "instead of --insecure"
    )


def _why(error: ssl.SSLCertVerificationError, host: str) -> str:
    if error.verify_code == 10:
        return f"the server's certificate has expired: {_NEW_CERTIFICATE}"
    if error.verify_code == 9:
        return "the server's certificate is not valid yet: compare the clocks of both machines"
    if error.verify_code in (62, 64):
        return f"the server's certificate does not name {host!r}: {_NEW_CERTIFICATE}, with this name among --hosts"
    return (
        f"the server's certificate was signed by another authority ({error.verify_message}): give this client the "
        "server's present ca.crt"
    )
