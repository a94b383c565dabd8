"""The command that lists and checks run-config."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from server_app.tools.commands.arguments import parse_run_config
from server_app.tools.commands.terminal import clear_errors, console


def options(
    run_config: Annotated[str, typer.Argument(help="Run-config to check, as for flwr run.")] = "",
) -> None:
    """List every run-config key with its default, or check some."""
    from server_app.run.options import known_keys, read_run_options
    from strategies import strategy_from_run_config

    if run_config:
        with clear_errors():
            given = parse_run_config(run_config)
            read_run_options(given)
            strategy_from_run_config(given)
        console.print("run-config is valid", highlight=False)
        return
    table = Table()
    table.add_column("key")
    table.add_column("default")
    for key, default in known_keys().items():
        table.add_row(key, repr(default))
    console.print(table)
