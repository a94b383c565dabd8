"""The consoles of commands, and the way that commands end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from server_app.tools.errors import ToolError

console = Console()
errors = Console(stderr=True)


def say_errors(lines: Iterable[str]) -> None:
    """Each on a line of its own, never folded: what it quotes can be copied."""
    for line in lines:
        errors.print(f"error: {line}", style="red", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn our own errors into one line for each cause and exit code 1, and Ctrl-C into exit code 130."""
    from server_app.run.run_directory import RunDirectoryError
    from strategies.framework.options import OptionError

    try:
        yield
    except (ToolError, RunDirectoryError, OptionError) as error:
        say_errors(str(error).split("\n"))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted; every process was stopped, run directories are as they were", highlight=False)
        raise typer.Exit(130) from None
