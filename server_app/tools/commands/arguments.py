"""Options that several commands have, and how their text is read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

RunsDir = Annotated[Path, typer.Option(help="Where runs are written.")]
RunDirectory = Annotated[Path, typer.Argument(help="A run directory.")]
Connection = Annotated[str, typer.Argument(help="A flwr connection to the SuperLink.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder with the data of scenarios on real data.")]
MoreRunConfig = Annotated[str, typer.Option("--set", help="More run-config, as for flwr run.")]


def read_clients_file(path: Path) -> dict[str, dict[str, Any]]:
    """Node-config by client id, from a TOML file with one table for each client.

    Raises:
        OptionError: the file cannot be read, or has something else in it.
    """
    from strategies.framework.options import OptionError

    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    for client, table in found.items():
        if not isinstance(table, dict):
            raise OptionError(f"{path}: {client!r} is not a table, expected [client-id] and its node-config keys below")
        for key, value in table.items():
            if not isinstance(value, bool | int | float | str):
                raise OptionError(f"{path}: {client}.{key} = {value!r}, expected a number, true, false or text")
    return found


def parse_run_config(text: str) -> dict[str, Any]:
    """``key=value`` pairs separated by spaces, values as in TOML, as ``flwr run --run-config`` reads them.

    Raises:
        OptionError: a pair is not valid.
    """
    from strategies.framework.options import OptionError

    pair = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")
    try:
        if left := pair.sub("", text).strip():  # Flower's own reader passes over what it does not understand
            raise ValueError(f"{left!r} is not a key=value pair")
        return tomllib.loads("\n".join(f'"{key}" = {value}' for key, value in pair.findall(text)))
    except ValueError as error:
        raise OptionError(f"cannot read {text!r}: {error}; expected pairs like \"strategy='fedavg' seed=1\"") from None


def data_root(folder: Path | None) -> dict[str, Any]:
    """Run-config for a folder of data."""
    return {} if folder is None else {"data-root": str(folder.expanduser().resolve())}


def listed(text: str) -> list[str]:
    """The names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]
