"""The command that lists and checks run-config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from server_app.tools.commands.arguments import parse_run_config, read_clients_file
from server_app.tools.commands.terminal import clear_errors, console, errors


def options(
    run_config: Annotated[str, typer.Argument(help="Run-config to check, as for flwr run.")] = "",
) -> None:
    """List every run-config key with its default, or check some; what only clients can know is for validate."""
    from server_app.run.options import known_keys
    from server_app.tools.cluster.validate import check_run_config

    if run_config:
        with clear_errors():
            _say_all(check_run_config(parse_run_config(run_config)))
        console.print("run-config is valid", highlight=False)
        return
    table = Table()
    table.add_column("key")
    table.add_column("default")
    for key, default in known_keys().items():
        table.add_row(key, repr(default))
    console.print(table)


def validate(
    clients_file: Annotated[Path, typer.Argument(help="TOML: a table of node-config keys for each client.")],
    run_config: Annotated[str, typer.Argument(help="Run-config, as for flwr run.")] = "",
) -> None:
    """Check run-config and each client's keys, data, model and one batch, without a network; all errors at once."""
    from server_app.tools.cluster.validate import check_clients, check_run_config

    with clear_errors():
        given = parse_run_config(run_config)
        wrong = check_run_config(given)
        for client, line, sound in check_clients(read_clients_file(clients_file), given):
            if sound:
                console.print(f"client {client!r}: {line}", highlight=False, markup=False, soft_wrap=True)
            else:
                wrong.append(f"client {client!r}: {line}")
        _say_all(wrong)
    console.print("everything is valid", highlight=False)


def _say_all(wrong: list[str]) -> None:
    for line in wrong:
        errors.print(f"error: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
