"""Commands that show runs, and use their models and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from server_app.tools.commands.arguments import RunDirectory
from server_app.tools.commands.cluster import DIRECTORY, superlink_of
from server_app.tools.commands.terminal import clear_errors, console


def traffic(run: RunDirectory) -> None:
    """Print where every byte of a run went."""
    from server_app.tools.print_traffic import print_traffic

    with clear_errors():
        print_traffic(run, console)


def report(
    run: RunDirectory,
    metric: Annotated[str, typer.Option(help="Compare models by this metric, for example loss.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="Write a page with curves, weights, bytes and times instead.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write every client's metrics by round as CSV instead.")] = None,
) -> None:
    """Show the participants, all clients' models side by side, and the weights that merged them."""
    from server_app.tools.compare.html import ReportError
    from server_app.tools.errors import ToolError
    from server_app.tools.live.page import write_csv, write_page
    from server_app.tools.print_run import print_report, report_of

    with clear_errors():
        for destination, write in ((page, write_page), (csv, write_csv)):
            if destination is None:
                continue
            try:
                write(run, destination)
            except (OSError, ReportError) as error:
                raise ToolError(f"cannot write {destination}: {error}") from None
            console.print(f"wrote {destination}", highlight=False, soft_wrap=True)
        if page is not None or csv is not None:
            return
        if as_json:
            print(json.dumps(report_of(run, metric), indent=2))
        else:
            print_report(run, console, metric)


def export(
    run: RunDirectory,
    client: Annotated[str, typer.Argument(help="A client id; with --all the new folder.")],
    destination: Annotated[Path | None, typer.Argument(help="A new folder.")] = None,
    form: Annotated[str, typer.Option("--as", help="peft, merged, vllm, gguf or hub.")] = "peft",
    every: Annotated[bool, typer.Option("--all", help="All clients of this machine, a folder for each.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="The same as --as merged.")] = False,
) -> None:
    """Write a client's personal model to a new folder: an adapter, a whole model, or a form for a model server."""
    from server_app.tools.handover.export import FORMS, ExportError, export_adapter, export_all
    from strategies.framework.options import require_choice

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    with clear_errors():
        form = "merged" if merge else form
        require_choice("--as", form, FORMS)
        if every:
            for folder in export_all(run, destination or Path(client), form, say):
                say(f"exported to {folder}")
            return
        if destination is None:
            raise ExportError("no destination: fedalloy export RUN CLIENT DEST, or fedalloy export RUN DEST --all")
        export_adapter(run, client, destination, form, say)
    say(f"exported to {destination}")


def deliver(
    run: RunDirectory,
    client: Annotated[str, typer.Argument(help="Comma-separated ids, or all; default: those without a model.")] = "",
    connection: Annotated[str, typer.Option(help="A flwr connection; default: the cluster of fedalloy cluster.")] = "",
    directory: Annotated[Path, typer.Option("--dir", help="That cluster's folder.")] = DIRECTORY,
) -> None:
    """Give clients that were absent at the end of a run their models."""
    from server_app.tools.deliver import deliver as deliver_models

    with clear_errors():
        done = deliver_models(run, client, superlink_of(run, connection, directory))
    console.print(f"delivered: {', '.join(done)}" if done else "every client has its model already", highlight=False)


def adopt(
    run: RunDirectory,
    node: Annotated[
        str, typer.Option(help="Client ids, comma-separated; default: all online that never trained.")
    ] = "",
    run_config: Annotated[str, typer.Option(help="adopt-examples, adopt-evaluations, adopt-sources.")] = "",
    connection: Annotated[str, typer.Option(help="A flwr connection; default: the cluster of fedalloy cluster.")] = "",
    directory: Annotated[Path, typer.Option("--dir", help="That cluster's folder.")] = DIRECTORY,
) -> None:
    """Give clients that never trained the best sum of a run's models, by forward passes alone."""
    from server_app.tools.commands.arguments import parse_run_config
    from server_app.tools.deliver import adopt as adopt_models

    with clear_errors():
        config = parse_run_config(run_config)
        found = adopt_models(run, node, superlink_of(run, connection, directory), config)
    for name, said in found.items():
        console.print(f"{name}: {said}", highlight=False, markup=False, soft_wrap=True)


def collect(
    runs: Annotated[Path, typer.Argument(help="Where a cluster keeps its runs.")],
    destination: Annotated[Path, typer.Argument(help="A folder of yours.")],
) -> None:
    """Copy all runs from a cluster's storage to a folder; the copies belong to the folder's owner."""
    from server_app.tools.copy_runs import collect_all

    with clear_errors():
        for copy in collect_all(runs, destination):
            console.print(str(copy), highlight=False, soft_wrap=True)
