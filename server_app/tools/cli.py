"""The ``fedalloy`` command. Everything that is not here is a stock ``flwr`` command.

A command is a function in a module of :mod:`server_app.tools.commands` and a name in one of the lists here. What is
slow to import (torch, Flower) is imported inside the function.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from server_app.tools.commands import alignment, cluster, experiments, federation, options, runs

COMMANDS: tuple[Callable[..., None], ...] = (
    experiments.demo,
    experiments.run,
    experiments.compare,
    runs.traffic,
    runs.report,
    runs.export,
    runs.deliver,
    alignment.align,
    runs.collect,
    federation.certificates,
    federation.register,
    federation.check,
    options.options,
    options.validate,
)
CLUSTER_COMMANDS: tuple[Callable[..., None], ...] = (cluster.up, cluster.down, cluster.status)

app = typer.Typer(
    help="Every client its own model: personalised federated LoRA on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cluster_app = typer.Typer(help="A local SuperLink and SuperNodes that stay up.", no_args_is_help=True)
FLOWERS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Everything after the command's name is for Flower's own."""
for command in COMMANDS:
    app.command(context_settings=FLOWERS if command is experiments.run else None)(command)
app.add_typer(cluster_app, name="cluster")
for command in CLUSTER_COMMANDS:
    cluster_app.command()(command)
