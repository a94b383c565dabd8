"""Prints a run's ledger: bytes by client and round at both ends of the wire, and the purpose of every byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedalloy_adapters.words import one_line
from server_app.ledger.connections import OTHER
from server_app.ledger.reconciliation import Accounts, ClientRound
from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from server_app.tools.who import registrations


def print_traffic(run_dir: Path, console: Console) -> None:
    """Print the traffic of the run in ``run_dir``, which may also be running or killed.

    Raises:
        LedgerError: the folder has no readable ledger; names it.
    """
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        accounts, name, encodings = ledger.accounts(), ledger.run_name, ledger.by_encoding()
    refused = _refused(run_dir)
    rows = [replace(row, client=refused.get(row.client, row.client)) for row in accounts.rows()]
    console.print(f"[bold]Traffic of run {name}[/bold] (bytes)", highlight=False)
    if not rows:
        console.print("Nothing has been sent yet.")
        return
    console.print(_per_round(rows))
    console.print(_totals(rows, accounts))
    for direction, sizes in encodings.items():
        told = ", ".join(f"{encoding} {_bytes(nbytes)}" for encoding, nbytes in sizes.items())
        console.print(f"tensors {direction} by encoding: {told}", highlight=False)
    _print_where(accounts, console)
    _print_notes(accounts, console)


def _refused(run_dir: Path) -> dict[str, str]:
    """Names of refused clients by what the ledger calls them, which does not know who they are."""
    said = registrations(RunDirectory(run_dir))
    return {f"node {of['node']}": who for who, of in said.items() if of.get("status") == "rejected" and "node" in of}


def _per_round(rows: list[ClientRound]) -> Table:
    """A table with both directions of a client and round on two lines: 5 + 16 + 5 + 4 x 11 characters and gaps."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("round", justify="right")
    table.add_column("client", max_width=14, no_wrap=True, overflow="ellipsis")
    table.add_column("")
    for title in ("tensor", "message", "wire", "other end"):
        table.add_column(title, justify="right", no_wrap=True)
    shown: tuple[int, str] | None = None
    for row in rows:
        who = (row.round, row.client)
        first = who != shown
        shown = who
        table.add_row(
            str(row.round) if first else "",
            row.client if first else "",
            row.direction,
            _bytes(row.tensor),
            _bytes(row.message),
            _bytes(row.wire),
            _bytes(row.other_end),
        )
    return table


def _totals(rows: list[ClientRound], accounts: Accounts) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title="Total", title_justify="left")
    table.add_column("")
    for title in ("tensor", "message", "wire", "wire, other end", "wire / tensor"):
        table.add_column(title, justify="right", no_wrap=True)
    for direction, levels in accounts.totals().items():
        ends = [row.other_end for row in rows if row.direction == direction and row.other_end is not None]
        wire, tensor = levels["wire"], levels["tensor"]
        table.add_row(
            direction,
            _bytes(tensor),
            _bytes(levels["message"]),
            _bytes(wire),
            _bytes(sum(ends) if ends else None),
            f"{wire / tensor:.3f}" if wire is not None and tensor else "-",
        )
    return table


def _print_where(accounts: Accounts, console: Console) -> None:
    went = accounts.reconciliation()
    if not any(went.values()):
        return
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), title="Where every wire byte went", title_justify="left"
    )
    table.add_column("")
    for title in ("up", "%", "down", "%"):
        table.add_column(title, justify="right", no_wrap=True)
    names = next(categories for categories in went.values() if categories)
    for name in names:
        cells = []
        for direction in ("up", "down"):
            categories = went[direction]
            total = sum(categories.values())
            cells += [_bytes(categories.get(name)), f"{100 * categories[name] / total:.2f}" if total else "-"]
        table.add_row(name, *cells, style="bold" if name == "unexplained" else None)
    console.print(table)


def _print_notes(accounts: Accounts, console: Console) -> None:
    last = max(row.round for row in accounts.rows())
    delivery = next((row.round for row in accounts.messages if row.kind == "deliver"), None)
    told = ["round 0: registration, with the app's code"]
    told += [f"round {delivery}: delivery of the models"] if delivery is not None else []
    told += [f"round {last}: the clients' last counters"] if delivery is not None and last > delivery else []
    console.print(f"{'; '.join(told)}.", highlight=False)
    console.print(
        "tensor: encoded numbers; message: Flower's messages; wire: counted by the sender's kernel; other "
        "end: counted by the receiver's, read at other moments.",
        highlight=False,
    )
    if any(row.client == OTHER for row in accounts.rows()):
        console.print(f"{OTHER}: SuperNodes on the Fleet port that match no client of this run.")
    for client in accounts.unjoined():
        console.print(
            f"{client}: the server does not see this client under its own address (address translation?), so only the "
            "client's end counts, from its first reading on."
        )
    for who, why in sorted(accounts.not_measured().items()):
        console.print(f"wire not measured at {who}: {one_line(why)}", highlight=False, markup=False)


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"
