"""``fedalloy cluster``: a SuperLink and SuperNodes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from server_app.tools.commands.arguments import RunsDir, listed, read_clients_file
from server_app.tools.commands.terminal import clear_errors, console

if TYPE_CHECKING:
    from server_app.tools.cluster.superlink import SuperLink

DIRECTORY = Path(".fedalloy/cluster")
Directory = Annotated[Path, typer.Option("--dir", help="The cluster's own folder.")]


def up(
    clients: Annotated[int, typer.Option(min=1, help="How many SuperNodes.")] = 4,
    client_ids: Annotated[str, typer.Option(help="Comma-separated names instead of client-0, ...")] = "",
    clients_file: Annotated[
        Path | None, typer.Option(help="TOML: a table of node-config keys for each client, by its name.")
    ] = None,
    directory: Directory = DIRECTORY,
    fleet_port: Annotated[int, typer.Option(help="gRPC port for SuperNodes; 0 chooses one.")] = 0,
    http_port: Annotated[int, typer.Option(help="Port for flwr run; 0 chooses one.")] = 0,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Start a SuperLink and SuperNodes with TLS and keys, and leave them running; or restart those that have ended."""
    from server_app.tools.cluster.local import LocalCluster, Settings, running
    from server_app.tools.cluster.restart import restart_ended

    names = listed(client_ids)
    with clear_errors():
        node_config = read_clients_file(clients_file) if clients_file else {}
        if running(directory):
            for name in restart_ended(directory, lambda text: console.print(text, highlight=False), node_config):
                console.print(f"{name} is running again", highlight=False)
            return
        names = names or list(node_config) or [f"client-{index}" for index in range(clients)]
        settings = Settings(tuple(names), runs_dir, fleet_port=fleet_port, http_port=http_port, node_config=node_config)
        cluster = LocalCluster(directory, settings, lambda text: console.print(text, highlight=False))
        cluster.up()
        console.print("\nNow, for example:\n", highlight=False)
        console.print(cluster.stop_hint(), highlight=False, soft_wrap=True)


def down(directory: Directory = DIRECTORY) -> None:
    """Stop the cluster."""
    from server_app.tools.cluster.local import stop

    with clear_errors():
        count = stop(directory)
    console.print(f"stopped {count} processes" if count else "no cluster is running", highlight=False)


def status(directory: Directory = DIRECTORY) -> None:
    """Show what is running."""
    from server_app.run.known_runs import known_runs
    from server_app.tools.cluster.local import Process, read_state
    from server_app.tools.who import last_registrations, who_table

    state = read_state(directory)
    if state is None:
        console.print(f"no cluster was started from {directory}", highlight=False)
        raise typer.Exit(1)
    nodes = state.get("nodes", {})
    registered = last_registrations(Path(state["runs_dir"]), known_runs(directory / "homes" / "superlink"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("process", "pid", "state"):
        table.add_column(column, overflow="fold")
    alive = True
    for item in state["processes"]:
        found = Process(**item).find()
        alive = alive and found is not None
        table.add_row(item["name"], str(item["pid"]), "running" if found else "ended")
    console.print(table)
    known = {name: {"node": str(nodes.get(name, "")), "key": name} for name in state.get("client_ids", [])}
    console.print()
    console.print(who_table(known | {name: known.get(name, {}) | dict(said) for name, said in registered.items()}))
    for client, said in registered.items():
        if "reason" in said:
            word = "absent from" if said.get("status") == "left" else "refused by"
            line = f"{client} was {word} run {said['run']}: {said['reason']}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"SuperNodes connect to {state['host']}:{state['fleet_port']}", highlight=False)
    console.print(f"flwr connects to 127.0.0.1:{state['http_port']}", highlight=False)
    if not alive:
        console.print("fedalloy cluster up restarts what has ended", highlight=False)
        raise typer.Exit(1)


def started_from(directory: Path) -> dict[str, Any]:
    """What is known of the cluster that was started from a folder.

    Raises:
        ClusterError: none was.
    """
    from server_app.tools.cluster.local import read_state
    from server_app.tools.cluster.superlink import ClusterError

    state = read_state(directory)
    if state is None:
        raise ClusterError(f"no cluster was started from {directory}: fedalloy cluster up, or --connection NAME")
    return state


def superlink_of(run: Path, connection: str, directory: Path) -> SuperLink:
    """The SuperLink for commands on a finished run: that of the connection, or of the cluster from ``directory``.

    Raises:
        ClusterError: there is no such cluster.
    """
    from server_app.tools.cluster.local import LocalCluster, Settings
    from server_app.tools.cluster.superlink import SuperLink

    if connection:
        return SuperLink(connection, run / "logs")
    started_from(directory)
    return LocalCluster(directory, Settings((), run.parent))
