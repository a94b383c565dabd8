"""The keys that a SuperLink accepts follow a folder of public keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server_app.tools.cluster.superlink import ClusterError, SuperLink
from server_app.tools.cluster.supernode_keys import register_clients


class Recorder(SuperLink):
    """Answers as stock ``flwr`` does and keeps what it was asked."""

    def __init__(self, refuse: str = "") -> None:
        super().__init__("here", Path("logs"))
        self.asked: list[tuple[str, ...]] = []
        self.refuse = refuse
        self.next_node = 100

    def flwr(self, *arguments: str) -> str:
        self.asked.append(arguments)
        if self.refuse and self.refuse in arguments:
            raise ClusterError("Public key already in use")
        self.next_node += 1
        if arguments[1] == "register":
            return f"✅ SuperNode registered\n{json.dumps({'success': True, 'node-id': self.next_node})}"
        return ""


@pytest.fixture
def public(tmp_path: Path) -> Path:
    folder = tmp_path / "public"
    folder.mkdir()
    for name in ("berlin", "paris"):
        (folder / f"{name}.pub").write_text(f"ecdsa {name}\n")
    (folder / "ca.crt").write_text("not a client")
    return folder


def test_every_key_is_registered_once_under_its_name(public: Path, tmp_path: Path) -> None:
    superlink, remembered = Recorder(), tmp_path / "registered.json"
    assert len(list(register_clients(superlink, public, remembered))) == 2
    names = [arguments[arguments.index("--name") + 1] for arguments in superlink.asked]
    assert names == ["berlin", "paris"]
    assert all("here" in arguments for arguments in superlink.asked)
    assert list(register_clients(superlink, public, remembered)) == []
    assert len(superlink.asked) == 2


def test_a_changed_key_replaces_and_a_missing_one_revokes(public: Path, tmp_path: Path) -> None:
    superlink, remembered = Recorder(), tmp_path / "registered.json"
    list(register_clients(superlink, public, remembered))
    (public / "berlin.pub").write_text("ecdsa another\n")
    (public / "paris.pub").unlink()
    superlink.asked.clear()
    said = list(register_clients(superlink, public, remembered))
    assert [arguments[1:3] for arguments in superlink.asked[:2]] == [("unregister", "101"), ("unregister", "102")]
    assert superlink.asked[2][1] == "register"
    assert [line.split(":")[0] for line in said] == ["berlin", "paris", "berlin"]
    assert set(json.loads(remembered.read_text())) == {"berlin"}


def test_a_refusal_is_an_error_and_what_was_done_before_it_is_remembered(public: Path, tmp_path: Path) -> None:
    remembered = tmp_path / "registered.json"
    with pytest.raises(ClusterError, match="already in use"):
        list(register_clients(Recorder(refuse="paris"), public, remembered))
    assert set(json.loads(remembered.read_text())) == {"berlin"}
