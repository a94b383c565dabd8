"""``flwr run`` with two changes: the bundle that it sends, and the message for a failed run.

    python -m server_app.tools.bundle.start . my-superlink --stream      # what `fedalloy submit` does

Flower 1.39 has no option for these. So two names are replaced: the function that builds the bundle from a folder, in
the module of Flower's command, and the one that prints, in the module of its log. ``tests/server_app/tools/bundle``
checks that they exist and that the command calls them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from unittest.mock import patch

from server_app.tools.bundle.pack import packed
from server_app.tools.bundle.screen import Screen

COMMAND = "flwr.cli.run.run"
"""The module; its package has a function with the same name."""
LOG = "flwr.cli.log"
VERBOSE = "--verbose"
"""Also prints Flower's own messages about a failure: a traceback, and its exit code."""


def flwr_run(arguments: Sequence[str]) -> None:
    """Carry out ``flwr run`` with these arguments and a packed bundle; ends the process as ``flwr`` does.

    If the log is streamed and says that the run failed, the exit code is 1.
    """
    from flwr.cli.app import app

    command, log = import_module(COMMAND), import_module(LOG)
    plain = command.build_fab_from_disk
    verbose = VERBOSE in arguments
    given = [word for word in arguments if word != VERBOSE]
    screen = Screen((lambda text: None) if verbose else partial(print, end="", flush=True))

    def show(*words: object, end: str = "\n") -> None:
        said = " ".join(map(str, words)) + end
        screen.feed(said)
        if verbose:
            print(said, end="", flush=True)

    with (
        patch.object(command, "build_fab_from_disk", lambda folder: packed(plain(folder))),
        patch.object(log, "print", show, create=True),
    ):
        try:
            app(["run", *given], prog_name="flwr")
        finally:
            screen.end()
            if screen.failed:
                if screen.kept_back and not verbose:
                    print(f"the run failed; {VERBOSE} shows Flower's own words, too", flush=True)
                raise SystemExit(1)


if __name__ == "__main__":
    flwr_run(sys.argv[1:])
