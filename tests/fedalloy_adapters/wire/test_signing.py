"""Signatures of what a server asks: of known keys, of just this, and for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedalloy_adapters.wire import signing
from fedalloy_adapters.wire.signing import SignatureError, Signer, fingerprint, fingerprint_of, new_key, require_signed
from server_app.tools.cluster.certificates import make_server_files

CONFIG = {"a": 1, "b": 0.1, "c": True, "d": "ü"}
BLOBS = {"x": b"1", "y": b"2"}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    private, public = new_key()
    (tmp_path / "key").write_bytes(private)
    (tmp_path / "key.pub").write_bytes(public)
    return tmp_path / "key"


def test_what_was_signed_is_accepted_and_nothing_else(key: Path) -> None:
    signer = Signer(key)
    known = {fingerprint_of(key): "us"}
    made = signer.sign(b"plan", CONFIG, BLOBS)
    assert require_signed(made, b"plan", dict(reversed(CONFIG.items())), BLOBS, known) == "us"
    others = [(b"plam", CONFIG, BLOBS), (b"plan", CONFIG | {"a": 2}, BLOBS), (b"plan", CONFIG, {"x": b"1"})]
    others += [(b"plan", CONFIG, {"x": b"2", "y": b"1"}), (b"plan", CONFIG | {"a": 1.0}, BLOBS)]
    for asked, config, blobs in others:
        with pytest.raises(SignatureError, match="us signed another message"):
            require_signed(made, asked, config, blobs, known)
    with pytest.raises(SignatureError, match="no server of this site's"):
        require_signed(made, b"plan", CONFIG, BLOBS, {})
    with pytest.raises(SignatureError, match="has no signature"):
        require_signed(b"", b"plan", CONFIG, BLOBS, known)


def test_a_signature_counts_for_a_day(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "SECONDS", -1)
    made = Signer(key).sign(b"plan", CONFIG, BLOBS)
    with pytest.raises(SignatureError, match="has expired"):
        require_signed(made, b"plan", CONFIG, BLOBS, {fingerprint_of(key): "us"})


def test_the_key_of_a_superlinks_certificate_signs_and_the_certificate_is_enough_to_know_it(tmp_path: Path) -> None:
    files = make_server_files(tmp_path, ["localhost"])
    known = {fingerprint_of(files.certificate): "the SuperLink"}
    made = Signer(files.key).sign(b"plan", CONFIG, BLOBS)
    assert require_signed(made, b"plan", CONFIG, BLOBS, known) == "the SuperLink"


def test_one_key_has_one_fingerprint_in_every_form(key: Path) -> None:
    assert fingerprint_of(key) == fingerprint_of(key.with_suffix(".pub")) == fingerprint(Signer(key).public_key)


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "rsa").write_bytes(other)
    (tmp_path / "none").write_bytes(b"hello")
    with pytest.raises(SignatureError, match="RSAPrivateKey"):
        Signer(tmp_path / "rsa")
    for name in ("none", "missing"):
        with pytest.raises(SignatureError, match="no private key in PEM"):
            Signer(tmp_path / name)
        with pytest.raises(SignatureError, match="no public key in PEM"):
            fingerprint_of(tmp_path / name)
