"""Signatures: a server signs its messages to a client whose owner knows its key (proto/README.md, section 8.3)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from google.protobuf.message import DecodeError

from proto.fedalloy.v1 import plan_pb2

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
Scalar = bool | bytes | float | int | str
SECONDS = 86_400
"""How long a signature is valid."""


class SignatureError(ValueError):
    """A key cannot be read, or a message is not signed with a key that the client's owner knows."""

    @property
    def told(self) -> str:
        """What the server may read of this error."""
        return str(self)


def signed_words(asked: bytes, run_config: Mapping[str, Scalar], blobs: Mapping[str, bytes], not_after: int) -> bytes:
    """The digest that is signed, 32 bytes.

    Args:
        asked: the serialised message.
        run_config: the run's.
        blobs: the blobs that come with it, by slot.
        not_after: seconds since the epoch.
    """
    config = json.dumps(dict(run_config), sort_keys=True, separators=(",", ":")).encode()
    items = [b"fedalloy signed 1", not_after.to_bytes(8, "little"), asked, config]
    for slot, blob in sorted(blobs.items()):
        items += [slot.encode(), hashlib.sha256(blob).digest()]
    digest = hashlib.sha256()
    for item in items:
        digest.update(len(item).to_bytes(8, "little") + item)
    return digest.digest()


class Signer:
    """Signs with a private key: a PEM file with an Ed25519 key, or one on an elliptic curve (as certificates have).

    Raises:
        SignatureError: the file has no such key.
    """

    def __init__(self, path: Path) -> None:
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SignatureError(f"{path} has no private key in PEM that can be read: {error}") from None
        if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
            raise SignatureError(
                f"{path} has a {type(key).__name__}, expected an Ed25519 key or one on an elliptic curve"
            )
        self._key: PrivateKey = key
        self.public_key = _der(key.public_key())

    def sign(self, asked: bytes, run_config: Mapping[str, Scalar], blobs: Mapping[str, bytes]) -> bytes:
        """A serialised ``Signature``; arguments as in :func:`signed_words`."""
        not_after = int(time.time()) + SECONDS
        words = signed_words(asked, run_config, blobs, not_after)
        key = self._key
        if isinstance(key, ed25519.Ed25519PrivateKey):
            made = key.sign(words)
        else:
            made = key.sign(words, ec.ECDSA(hashes.SHA256()))
        return plan_pb2.Signature(public_key=self.public_key, not_after=not_after, signature=made).SerializeToString()


def require_signed(
    signature: bytes,
    asked: bytes,
    run_config: Mapping[str, Scalar],
    blobs: Mapping[str, bytes],
    known: Mapping[str, str],
) -> str:
    """Check a signature; returns the signer's name.

    Args:
        signature: a serialised ``Signature``; empty if there was none.
        asked: see :func:`signed_words`.
        run_config: the same.
        blobs: the same.
        known: names by the fingerprint of a public key (:func:`fingerprint`).

    Raises:
        SignatureError: there is no signature, its key is unknown, it has expired, or it is of another message.
    """
    found = plan_pb2.Signature()
    try:
        found.ParseFromString(signature)
        who = fingerprint(found.public_key)
        if not signature:
            raise SignatureError("this site accepts signed plans only, and this one has no signature (sign-with)")
        if who not in known:
            raise SignatureError(f"signed by {who}, which is no server of this site's")
        if found.not_after < time.time():
            raise SignatureError(f"the signature of {known[who]} has expired")
        key = serialization.load_der_public_key(found.public_key)
        words = signed_words(asked, run_config, blobs, found.not_after)
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(found.signature, words)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(found.signature, words, ec.ECDSA(hashes.SHA256()))
        else:
            raise SignatureError(f"{known[who]} has a key of an unknown kind")
    except DecodeError:
        raise SignatureError("the signature cannot be read") from None
    except InvalidSignature:
        raise SignatureError(f"{known[who]} signed another message than this one") from None
    return known[who]


def fingerprint(public_key: bytes) -> str:
    """``sha256:`` and 64 digits, of a public key in DER."""
    return f"sha256:{hashlib.sha256(public_key).hexdigest()}"


def fingerprint_of(path: Path) -> str:
    """The fingerprint of the public key in a PEM file: a public key, a certificate, or a private key.

    Raises:
        SignatureError: it has none.
    """
    try:
        data = path.read_bytes()
        if b"CERTIFICATE" in data:
            return fingerprint(_der(x509.load_pem_x509_certificate(data).public_key()))
        if b"PRIVATE KEY" in data:
            return fingerprint(Signer(path).public_key)
        return fingerprint(_der(serialization.load_pem_public_key(data)))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} has no public key in PEM that can be read: {error}") from None


def new_key() -> tuple[bytes, bytes]:
    """A new Ed25519 key: private and public, in PEM."""
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public


def _der(key: object) -> bytes:
    if not isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise SignatureError(f"a {type(key).__name__}, expected an Ed25519 key or one on an elliptic curve")
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
