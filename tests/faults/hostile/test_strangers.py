"""What a stranger says or holds open is no more than words: on the terminal, in the ledger, on a port."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
from rich.console import Console

from proto.fedalloy.v1 import report_pb2
from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from server_app.tools.print_traffic import print_traffic
from tests.faults.nodes import NodeGrid, nodes, run_nodes, statuses

ESCAPES = "\x1b]52;c;aGk=\x07\x1b[2J[/bold][link=http://x]here"


def test_what_a_client_says_of_its_wire_is_one_short_line_in_the_ledger_and_on_the_terminal(tmp_path: Path) -> None:
    connection = report_pb2.ConnectionReading(local_address=ESCAPES * 1000, remote_address=ESCAPES * 1000)
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        ledger.message(0, "berlin", "up", "train", 30, 6)
        said = report_pb2.WireReading(unix_time=1.0, not_measured=ESCAPES * 100_000, connections=[connection])
        ledger.client_reading(0, "berlin", said)
        ledger._write("UPDATE reading SET not_measured = ?", (ESCAPES * 10,))  # by an earlier version
    assert (tmp_path / "ledger.sqlite").stat().st_size < 2**17
    out = io.StringIO()
    print_traffic(tmp_path, Console(file=out, width=80))
    text = out.getvalue()
    assert "wire not measured at berlin" in text
    assert all(line.isprintable() and len(line) <= 400 for line in text.splitlines())


def test_nodes_of_this_process_have_no_wire_whoever_listens_on_the_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("FEDALLOY_FLEET_PORT", str(listener.getsockname()[1]))
        directory = run_nodes(tmp_path, NodeGrid(nodes()))
    assert [set(found.values()) for found in statuses(directory)] == [{"ok"}, {"ok"}]
    with Ledger(directory.path / "ledger.sqlite", read_only=True) as ledger:
        assert "no network" in ledger.accounts().not_measured()["server"]


def test_a_line_that_is_no_record_is_passed_over(tmp_path: Path) -> None:
    directory = run_nodes(tmp_path, NodeGrid(nodes()))
    before = directory.rounds()
    with (directory.path / "rounds.jsonl").open("a") as file:
        file.write('42\n"word"\n[1]\nnull\n{"round": 1}\n')
    assert RunDirectory(directory.path).rounds() == before
