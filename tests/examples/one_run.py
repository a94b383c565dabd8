"""What each example's test does: write it, parse the command that it prints, and carry out one short run of it."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server_app.tools.commands.arguments import parse_run_config, read_clients_file
from tests.in_process import run_config_of, run_in_process
from tests.test_docs import check


def run_example(main: Callable[[Path], None], folder: Path, **config: Any) -> dict[str, Any]:
    """The summary of one round with the clients, and the settings, that the example says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(folder)
    command = shlex.split(said.getvalue().replace("\\\n", " "))
    check(command)
    assert command[command.index("--clients-file") + 1] == str(folder / "clients.toml")
    clients = read_clients_file(folder / "clients.toml")
    tables = [{"client-id": client, **table} for client, table in clients.items()]
    settings = parse_run_config(command[command.index("--set") + 1])
    given = {"run-name": "example", "num-server-rounds": 1, "seed": 0} | settings | run_config_of(**config)
    runs = folder / "runs"
    run_in_process(runs, len(tables), node_config=tables.__getitem__, **given)
    summary: dict[str, Any] = json.loads((runs / "example" / "summary.json").read_text())
    assert set(summary["clients"]) == set(clients)
    return summary
