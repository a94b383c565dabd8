"""The Flower ServerApp: reads run-config, runs the federation, and writes a run directory."""

from __future__ import annotations

import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

# Before torch is imported, because OpenMP reads it once: its threads sleep when they have nothing to do. They would
# turn in a loop for a while after every operation, which costs more than a server's many short operations themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from server_app.run.ending.failure import told_in_one_line
from server_app.run.loop import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from registration to summary."""
    with told_in_one_line():
        run(grid, context)
