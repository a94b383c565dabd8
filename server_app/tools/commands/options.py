"""The command that lists and checks run-config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from server_app.tools.commands.arguments import PATH_KEYS, parse_run_config, read_clients
from server_app.tools.commands.terminal import clear_errors, console, say_errors


def options(
    run_config: Annotated[str, typer.Argument(help="Run-config to check, as for flwr run, or a part of a key.")] = "",
) -> None:
    """Explain run-config keys (all, or those that contain a word), or check some; validate checks clients."""
    from server_app.run.options import OPTIONS, known_keys
    from server_app.tools.cluster.validate import check_run_config
    from server_app.tools.reference import options_of

    chosen = [key for key in known_keys() if run_config in key]
    if chosen and "=" not in run_config:
        shown = {option.key: option for prefix, kind in OPTIONS for option in options_of(kind, prefix)}
        for key in chosen:
            option = shown[key]
            console.print(f"[bold]{key}[/bold] = {escape(literal_of(option.default))}", highlight=False, soft_wrap=True)
            console.print(Padding(Text(option.meaning.replace("`", "").replace("\\|", "|")), (0, 0, 0, 4)))
        return

    with clear_errors():
        given = parse_run_config(run_config)
        _say_all(check_run_config(given))
    console.print("run-config is valid", highlight=False)
    for key in PATH_KEYS:
        value = str(given.get(key, ""))
        if value.startswith(("/", "~", ".")) and not Path(value).expanduser().exists():
            line = f"{key} = {value!r} is not on this machine; each client needs it (fedalloy validate tries a client)"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def literal_of(value: object) -> str:
    """A default in TOML."""
    from server_app.run.options import as_toml

    return as_toml({"x": value}).removeprefix("x = ").rstrip()  # type: ignore[dict-item]


def validate(
    clients_file: Annotated[Path, typer.Argument(help="TOML: a table of node-config keys for each client.")],
    run_config: Annotated[str, typer.Argument(help="Run-config, as for flwr run.")] = "",
) -> None:
    """Check run-config and each client's keys, data, model and three batches, without a network; all errors at once."""
    from server_app.tools.cluster.validate import check_clients, check_run_config

    with clear_errors():
        given = parse_run_config(run_config)
        clients, unknown = read_clients(clients_file)
        wrong = check_run_config(given) + unknown
        for client, line, sound in check_clients(clients, given):
            if sound:
                first, *more = line.splitlines()
                console.print(f"client {client!r}: {first}", highlight=False, markup=False)
                for text in more:
                    console.print(Padding(Text(text), (0, 0, 0, 4)))
            else:
                wrong.append(f"client {client!r}: {line}")
        _say_all(wrong)
    console.print("everything is valid; to run it:", highlight=False)
    command = "flwr run . <connection> --stream" + (f' --run-config "{run_config}"' if run_config else "")
    console.print(command, highlight=False, markup=False, soft_wrap=True)


def _say_all(wrong: list[str]) -> None:
    say_errors(wrong)
    if wrong:
        raise typer.Exit(1)
