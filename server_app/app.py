"""The Flower ServerApp: reads run-config, runs the federation, and writes a run directory."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server_app.run.ending.failure import told_in_one_line
from server_app.run.loop import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from registration to summary."""
    with told_in_one_line():
        run(grid, context)
