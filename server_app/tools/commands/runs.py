"""Commands that show runs, and take things out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server_app.tools.commands.arguments import RunDirectory
from server_app.tools.commands.cluster import DIRECTORY
from server_app.tools.commands.terminal import clear_errors, console


def traffic(run: RunDirectory) -> None:
    """Print where every byte of a run went."""
    from server_app.tools.print_traffic import print_traffic

    with clear_errors():
        print_traffic(run, console)


def report(
    run: RunDirectory,
    metric: Annotated[str, typer.Option(help="Compare models by this one, for example loss.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object.")] = False,
) -> None:
    """Who took part, all clients' models next to each other, and the weights that merged them."""
    from server_app.tools.print_run import print_report, report_of

    with clear_errors():
        if as_json:
            print(json.dumps(report_of(run, metric), indent=2))
        else:
            print_report(run, console, metric)


def export(
    run: RunDirectory,
    client: Annotated[str, typer.Argument(help="A client id.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge it into its base model, in float32.")] = False,
) -> None:
    """Write a client's personal model to a folder of its own: a PEFT directory, or a whole model."""
    from server_app.tools.export import export_adapter

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    with clear_errors():
        export_adapter(run, client, destination, "merged" if merge else "peft", say)
    console.print(f"exported to {destination}", highlight=False, soft_wrap=True)


def deliver(
    run: RunDirectory,
    client: Annotated[str, typer.Argument(help="Client ids, comma-separated, or all; default: those without.")] = "",
    connection: Annotated[str, typer.Option(help="A flwr connection; default: the cluster of fedalloy cluster.")] = "",
    directory: Annotated[Path, typer.Option("--dir", help="That cluster's folder.")] = DIRECTORY,
) -> None:
    """Give clients that were absent at the end of a run their models."""
    from server_app.tools.cluster.local import LocalCluster, Settings
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.deliver import deliver as deliver_models

    here = SuperLink(connection, run / "logs") if connection else LocalCluster(directory, Settings((), run.parent))
    with clear_errors():
        done = deliver_models(run, client, here)
    console.print(f"delivered: {', '.join(done)}" if done else "every client has its model already", highlight=False)


def collect(
    runs: Annotated[Path, typer.Argument(help="Where a cluster keeps its runs.")],
    destination: Annotated[Path, typer.Argument(help="A folder of yours.")],
) -> None:
    """Copy all runs from a cluster's own storage to a folder; the copies belong to the folder's owner."""
    from server_app.tools.copy_runs import collect_all

    with clear_errors():
        for copy in collect_all(runs, destination):
            console.print(str(copy), highlight=False, soft_wrap=True)
