"""The printed report of a ledger: 80 columns, sums, and what was not measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from server_app.ledger.store import Ledger, LedgerError
from server_app.run.run_directory import RunDirectory
from server_app.tools.print_traffic import print_traffic
from tests.server_app.ledger.samples import (
    at_client,
    reading,
    reconciled,
)


def printed(path: Path) -> str:
    out = io.StringIO()
    print_traffic(path, Console(file=out, width=80))
    return out.getvalue()


def test_report_fits_80_columns_and_adds_up(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        reconciled(ledger, extra_up=777)
        ledger.tensor(1000, "a-client-with-a-very-long-name", "down", "train", 12_345_678_901)
        ledger.message(1000, "a-client-with-a-very-long-name", "down", "train", 12_345_678_999, 6)
        text, totals = printed(tmp_path), ledger.totals()
    assert max(map(len, text.splitlines())) <= 80
    assert "12,345,678,901" in text
    for levels in totals.values():
        assert f"{levels['wire']:,}" in text
    assert "unexplained" in text
    assert "777" in text


@pytest.mark.parametrize("measured", [True, False])
def test_report_says_what_was_not_measured(tmp_path: Path, measured: bool) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        assert "Nothing has been sent yet." in printed(tmp_path)
        ledger.message(0, "berlin", "up", "train", 30, 6)
        if not measured:
            ledger.server_reading(0, "", "start", [], not_measured="a simulation has no network")
        ledger.client_reading(0, "berlin", reading(at_client(100, 100)))
    text = " ".join(printed(tmp_path).split())
    assert ("wire not measured at server: a simulation has no network" in text) is not measured
    assert "the server does not see this client under its own address" in text


def test_refused_clients_have_their_names(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "test") as ledger:
        ledger.message(0, "node 15765050123", "up", "query", 30, 6)
        ledger.message(0, "node 26", "up", "query", 30, 6)
    clients = {
        "shop": {"status": "rejected", "reason": "DataError: line 1", "node": "15765050123"},
        "bank": {"status": "ok", "node": "26"},
    }
    RunDirectory(tmp_path).append_round({"phase": "register", "round": 0, "clients": clients})
    text = printed(tmp_path)
    assert "0 shop " in text
    assert "0 node 26 " in text


def test_report_of_a_folder_without_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger at"):
        printed(tmp_path)
