"""Commands that start runs and show running ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server_app.tools.commands.arguments import RunDirectory, parse_run_config, read_clients
from server_app.tools.commands.cluster import DIRECTORY, Directory, started_from
from server_app.tools.commands.terminal import clear_errors, console, errors, say_errors

if TYPE_CHECKING:
    from server_app.tools.live.start import Order

ON_INTERRUPT = ("ask", "stop", "leave")


def run(
    run_config: Annotated[str, typer.Argument(help="Run-config, as for flwr run.")] = "",
    connection: Annotated[str, typer.Option(help="A flwr connection; default: the cluster of fedalloy cluster.")] = "",
    directory: Directory = DIRECTORY,
    runs_dir: Annotated[
        Path | None, typer.Option(help="With --connection: the folder of runs, if this machine has it.")
    ] = None,
    clients_file: Annotated[
        Path | None, typer.Option(help="TOML: clients whose files are on this machine, which are tried first.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Try clients' data, model and one batch before the start.")] = True,
    on_interrupt: Annotated[str, typer.Option(help="At Ctrl-C: ask, stop or leave; without a terminal stop.")] = "ask",
) -> None:
    """Check everything, start a run and show its progress; exit code 0 only if it succeeded."""
    from server_app.tools.demo import terminate_as_interrupt
    from server_app.tools.live import start
    from strategies.framework.options import require_choice

    left = False

    def stops() -> bool:
        nonlocal left
        wish = on_interrupt if on_interrupt != "ask" or console.is_terminal else "stop"
        if wish == "ask":
            try:
                wish = "stop" if typer.confirm("Stop the run? (no: it continues without this command)") else "leave"
            except (typer.Abort, KeyboardInterrupt, EOFError):
                wish = "leave"
        left = wish == "leave"
        return not left

    with clear_errors():
        require_choice("--on-interrupt", on_interrupt, ON_INTERRUPT)
        config = parse_run_config(run_config)
        clients, unknown = read_clients(clients_file) if clients_file else ({}, [])
        order = _order(config, connection, directory, runs_dir, clients)
        order = start.completed(order if check else start.Order(order.config, order.superlink, order.runs))
        wrong = [*unknown, *start.checked(order, console)]
        say_errors(wrong)
        if wrong:
            raise typer.Exit(1)
        path = start.run_path(order)
        if path is not None:
            console.print(f"run {path}", highlight=False, soft_wrap=True)
        try:
            with terminate_as_interrupt():
                good, said = start.run(order, console, stops)
        except KeyboardInterrupt:
            how = f"it continues: fedalloy watch {path}" if left else "it was told to stop"
            errors.print(f"interrupted; {how}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    _end(good, said)


def _order(
    config: Mapping[str, Any],
    connection: str,
    directory: Path,
    runs_dir: Path | None,
    clients: Mapping[str, Mapping[str, Any]],
) -> Order:
    """The order: on the connection's SuperLink, else on the cluster that was started from ``directory``."""
    from server_app.tools.cluster.local import LocalCluster, Settings
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.live.start import Order

    if connection:
        return Order(config, SuperLink(connection, Path("logs")), runs_dir, clients)
    state = started_from(directory)
    runs = Path(state["runs_dir"])
    here = {"state-dir": str(runs), "client.accept-keys": "all"}
    known = {name: here | state["node_config"].get(name, {}) for name in state["client_ids"]}
    return Order(config, LocalCluster(directory, Settings((), runs)), runs, clients or known)


def watch(run: RunDirectory) -> None:
    """Show a run's progress until it ends; exit code 0 only if it succeeded. Ctrl-C leaves it running."""
    from server_app.tools.live.follow import watch as follow

    with clear_errors():
        try:
            good, said = follow(run, console)
        except KeyboardInterrupt:
            errors.print("no longer watching; the run continues", highlight=False)
            raise typer.Exit(130) from None
    _end(good, said)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where runs are written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For other programs.")] = False,
) -> None:
    """List runs with their state and score."""
    from server_app.tools.live.listing import as_list, as_row, runs_in

    with clear_errors():
        rows = [as_row(found) for found in runs_in(folder)]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        console.print(f"no run in {folder}", highlight=False)
        return
    console.print(as_list(rows))
    for row in rows:
        if row["why"]:
            console.print(f"{row['run']}: {row['why']}", highlight=False, markup=False, soft_wrap=True)


def _end(good: bool, said: str) -> None:
    if good:
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        return
    errors.print(f"error: {said}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)
