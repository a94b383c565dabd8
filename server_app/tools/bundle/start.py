"""``flwr run`` as it is, but for the bundle that it sends.

    python -m server_app.tools.bundle.start . my-superlink --stream      # what `fedalloy submit` does

Flower 1.39 has no option for this. One name in the module of its command is replaced, the one that builds the bundle
from a folder; ``tests/server_app/tools/bundle`` sees that it is there and is what the command calls.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from unittest.mock import patch

from server_app.tools.bundle.pack import packed

COMMAND = "flwr.cli.run.run"
"""The module; its package has the function under the same name."""


def flwr_run(arguments: Sequence[str]) -> None:
    """Carry out ``flwr run`` with these arguments and a packed bundle; ends the process as ``flwr`` does."""
    from flwr.cli.app import app

    command = import_module(COMMAND)
    plain = command.build_fab_from_disk
    with patch.object(command, "build_fab_from_disk", lambda folder: packed(plain(folder))):
        app(["run", *arguments], prog_name="flwr")


if __name__ == "__main__":
    flwr_run(sys.argv[1:])
