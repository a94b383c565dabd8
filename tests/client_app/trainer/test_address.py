"""Where a trainer is found: its socket, its folder, and whose it is."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client_app.settings import SettingsError
from client_app.trainer.address import Owner, Residence, TrainerError, find_owner, read_trainer_settings
from tests.client_app.trainer.conftest import pid_of

# ------------------------------------------------------------------------------------------------------- where it is


def test_socket_and_folder_are_its_owners_only(shared: Owner) -> None:
    pid_of(shared)
    residence = Residence.of(shared)
    assert stat.S_IMODE(residence.folder.stat().st_mode) == 0o700
    assert stat.S_ISSOCK(residence.socket.stat().st_mode)
    assert stat.S_IMODE(residence.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(residence.lock.stat().st_mode) == 0o600


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    monkeypatch.setattr("client_app.trainer.address.temporary_folders", lambda: [str(short)])
    folder = short / f"fedalloy-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o755)
        with pytest.raises(TrainerError, match=r"expected a folder of user .* with mode 700, found drwxr-xr-x"):
            Residence.of(Owner.of(os.getpid()))
        folder.rmdir()
        folder.symlink_to(tmp_path)
        with pytest.raises(TrainerError, match="mode 700, found l"):
            Residence.of(Owner.of(os.getpid()))
    finally:
        shutil.rmtree(short)


def test_a_path_too_long_for_a_socket_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    owner = Owner.of(os.getpid())
    short = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    monkeypatch.setattr("client_app.trainer.address.temporary_folders", lambda: [str(long), str(short)])
    found = Residence.of(owner)
    shutil.rmtree(short)
    assert len(os.fsencode(found.socket)) <= 107
    assert not list(long.iterdir())
    monkeypatch.setattr("client_app.trainer.address.temporary_folders", lambda: [str(long)])
    with pytest.raises(TrainerError, match="bytes with the socket's name, expected at most 107"):
        Residence.of(owner)


def test_a_path_that_grpc_would_misread_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    strange = [short / name for name in ("a%20b", "a?b", "a#b", "a,b")]
    for folder in (*strange, short / "a b"):
        folder.mkdir()
    monkeypatch.setattr(
        "client_app.trainer.address.temporary_folders", lambda: [*map(str, strange), str(short / "a b")]
    )
    assert Residence.of(Owner.of(os.getpid())).folder.parent == short / "a b"
    monkeypatch.setattr("client_app.trainer.address.temporary_folders", lambda: [str(strange[0])])
    with pytest.raises(TrainerError, match="gRPC takes '%' for a part of an address"):
        Residence.of(Owner.of(os.getpid()))
    shutil.rmtree(short)


def test_a_home_that_cannot_be_written_is_named(
    home: Path, new_owner: Callable[[], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", "/proc/no-such-place")
    with pytest.raises(TrainerError, match=r"log /proc/no-such-place/fedalloy/trainer\.log cannot be written"):
        pid_of(new_owner())


def test_without_a_supernode_there_is_no_owner() -> None:
    """As in Flower's simulation engine and in a debugger: everything is done in the process itself."""
    assert find_owner() is None


def test_node_config_has_the_last_word_on_residence() -> None:
    def settings(node: dict[str, Any], run: dict[str, Any]) -> Any:
        return read_trainer_settings(Context(1, 1, node, RecordDict(), run))

    assert settings({}, {"trainer.resident": False}).resident is False
    assert settings({"trainer.resident": True}, {"trainer.resident": False}).resident is True
    assert settings({"trainer.idle-seconds": 5}, {"trainer.idle-seconds": 9.0}).idle_seconds == 5
    with pytest.raises(SettingsError, match="idle-seconds = 0, expected a positive number"):
        settings({}, {"trainer.idle-seconds": 0})
    with pytest.raises(SettingsError, match="idle-seconds = inf, expected a positive number, at most 1e"):
        settings({"trainer.idle-seconds": float("inf")}, {})
    with pytest.raises(SettingsError, match="resident = 'no', expected true or false"):
        settings({"trainer.resident": "no"}, {})
