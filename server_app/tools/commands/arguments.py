"""Options that several commands have, and functions that read their text."""

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
OWN_FILES = ("state-dir", "alignments", "start-adapter", "data-root")
"""Keys of node-config that are paths on this machine."""
PATH_KEYS = (*OWN_FILES, "data-path", "base-model", "reference-model")
"""Keys that may be such paths, or names on the Hugging Face hub."""
MoreRunConfig = Annotated[str, typer.Option("--set", help="More run-config, as for flwr run.")]


def read_clients_file(path: Path) -> dict[str, dict[str, Any]]:
    """Node-config by client id, from a TOML file with one table for each client; its relative paths made absolute.

    Raises:
        OptionError: the file cannot be read, or has something else in it; a line for each client with a key that nobody
            reads.
    """
    from strategies.framework.options import OptionError

    found, wrong = read_clients(path)
    if wrong:
        raise OptionError("\n".join(wrong))
    return found


def read_clients(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The clients of such a file whose keys are all known, and what is wrong with the others, one line each.

    Raises:
        OptionError: the file cannot be read.
    """
    from strategies.framework.options import OptionError

    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    found: dict[str, dict[str, Any]] = {}
    wrong = []
    for client, table in tables.items():
        said = _wrong_with(client, table)
        if said:
            wrong.append(f"{path}: {said}")
        else:
            found[client] = {key: _beside(path.parent, key, value) for key, value in table.items()}
    return found, wrong


def _wrong_with(client: str, table: Any) -> str:
    """What is wrong with a client's table, whose nested keys (``client.allow-steps = "..."``) become dotted ones."""
    from client_app.settings import SettingsError, require_node_keys

    if not isinstance(table, dict):
        return f"{client!r} is not a table, expected [client-id] and its node-config keys below"
    for prefix in [key for key, value in table.items() if isinstance(value, dict)]:
        table |= {f"{prefix}.{key}": value for key, value in table.pop(prefix).items()}
    for key, value in table.items():
        if not isinstance(value, bool | int | float | str):
            return f"{client}.{key} = {value!r}, expected a number, true, false or text"
    try:
        require_node_keys(table, f"client {client!r}")
    except SettingsError as error:
        return str(error)
    return ""


def _beside(folder: Path, key: str, value: Any) -> Any:
    """A path in a clients file is relative to the file; what is not there may be a name of the Hugging Face hub."""
    if key not in PATH_KEYS or not isinstance(value, str) or not value:
        return value
    path = folder / Path(value).expanduser()
    own = key in OWN_FILES or (key == "data-path" and (Path(value).suffix or value.startswith(".")))
    return str(path.resolve()) if own or path.exists() else value


def parse_run_config(text: str) -> dict[str, Any]:
    """``key=value`` pairs separated by spaces, values as in TOML, as ``flwr run --run-config`` reads them.

    Raises:
        OptionError: a pair is not valid.
    """
    from strategies.framework.options import OptionError

    pair = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")
    try:
        if left := pair.sub("", text).strip():  # Flower's own reader skips what it does not understand
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
