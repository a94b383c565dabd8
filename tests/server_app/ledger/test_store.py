"""The ledger's file: kills, readers beside the writer, names, refusals."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from server_app.ledger.store import Ledger, LedgerError
from tests.server_app.ledger.samples import (
    two_rounds,
)

ROOT = Path(__file__).parents[3]
WRITER = """
import sys
from pathlib import Path
from server_app.ledger.store import Ledger
ledger = Ledger(Path(sys.argv[1]), "test")
number = 0
while True:
    ledger.message(number, "berlin", "up", "train", 10, 1)
    ledger.tensor(number, "berlin", "up", "train", 7)
    number += 1
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_readable_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = 0
    while said < 200:
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    said = max([said, *(int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n"))])
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Ledger(path, read_only=True) as ledger:
        assert ledger.run_name == "test"
        assert said * 10 <= (ledger.totals()["up"]["message"] or 0) <= (said + 1) * 10
        assert said * 7 <= (ledger.totals()["up"]["tensor"] or 0) <= (said + 1) * 7
    with Ledger(path, "test") as ledger:  # and can be continued
        ledger.tensor(0, "berlin", "down", "train", 5)
        assert ledger.totals()["down"]["tensor"] == 5


def test_it_can_be_read_while_it_is_written(ledger: Ledger) -> None:
    two_rounds(ledger)
    with Ledger(ledger.path, read_only=True) as other:
        assert other.totals() == ledger.totals()
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            other.tensor(0, "berlin", "up", "train", 1)


def test_a_finished_ledger_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "ro" / "ledger.sqlite"
    path.parent.mkdir()
    with Ledger(path, "test") as ledger:
        ledger.tensor(0, "berlin", "up", "train", 7)
    before = path.read_bytes()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with Ledger(path, read_only=True) as ledger:
            assert ledger.totals()["up"]["tensor"] == 7
            assert [found.name for found in path.parent.iterdir()] == [path.name]
    finally:
        path.parent.chmod(0o755)
    assert path.read_bytes() == before


def test_tensor_bytes_are_added_up_by_encoding(ledger: Ledger) -> None:
    assert ledger.by_encoding() == {}
    ledger.encoded(1, "berlin", "down", {"int4": 100})
    ledger.encoded(1, "berlin", "up", {"int8": 30, "bf16": 7})
    ledger.encoded(2, "paris", "down", {"int4": 1, "fp32": 8})
    assert ledger.by_encoding() == {"down": {"fp32": 8, "int4": 101}, "up": {"bf16": 7, "int8": 30}}


def test_renaming_moves_what_was_booked(ledger: Ledger) -> None:
    ledger.tensor(0, "node 7", "up", "train", 3)
    ledger.message(0, "node 7", "up", "train", 4, 1)
    ledger.rename("node 7", "berlin")
    (row,) = ledger.accounts().rows()
    assert (row.client, row.tensor, row.message) == ("berlin", 3, 4)


def test_refuses_what_is_not_its_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger(tmp_path / "none.sqlite", read_only=True)
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(LedgerError, match="cannot open the ledger"):
        Ledger(tmp_path / "text", read_only=True)
    Ledger(tmp_path / "ledger.sqlite", "one").close()
    with pytest.raises(LedgerError, match="run 'one', expected 'two'"):
        Ledger(tmp_path / "ledger.sqlite", "two")
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(LedgerError, match="format '99', expected '1'"):
        Ledger(tmp_path / "ledger.sqlite")


def test_refuses_an_unknown_direction(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="direction 'sideways', expected 'up' or 'down'"):
        ledger.tensor(0, "berlin", "sideways", "train", 1)
