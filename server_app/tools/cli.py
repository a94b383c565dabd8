"""The ``fedalloy`` command. For everything else there are stock ``flwr`` commands.

A command is a function in a module of :mod:`server_app.tools.commands` and a name in one of the lists here. Slow
imports (torch, Flower) are inside the function.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from server_app.tools.commands import alignment, cluster, experiments, federation, live, options, runs, site

GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "Start here": (experiments.demo, experiments.compare, options.options, options.validate),
    "Run": (live.run, live.watch, live.runs, experiments.submit),
    "Look at a run": (runs.report, runs.traffic),
    "Use a run": (runs.export, runs.deliver, runs.adopt, runs.collect),
    "Your own federation": (federation.certificates, federation.register, federation.check),
    "For some strategies": (alignment.align,),
}
"""Commands by their title in the help."""
FLOWERS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""All arguments of this command go to Flower's own."""
SITE_COMMANDS: tuple[Callable[..., None], ...] = (site.serve, site.audit, site.show, site.key)
CLUSTER_COMMANDS: tuple[Callable[..., None], ...] = (cluster.up, cluster.down, cluster.status)
EXAMPLES = """Every client its own model: personalised federated LoRA on Flower.

Examples:

  fedalloy demo\n
  fedalloy compare digits --strategies fedmerge,ditto --seeds 3\n
  fedalloy validate clients.toml "base-model='Qwen/Qwen3-0.6B'"\n
  fedalloy cluster up --clients-file clients.toml\n
  fedalloy report runs/NAME

A run is started with fedalloy run, or submit or flwr run; fedalloy options explains what can be set."""


class Suggesting(TyperGroup):
    """A group of commands; for an unknown command, its error names the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name.

        Raises:
            click.UsageError: there is no such command; names the nearest.
        """
        known = self.list_commands(ctx)
        if args and not args[0].startswith("-") and args[0] not in known:
            near = difflib.get_close_matches(args[0], known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; there are {', '.join(known)}"
            raise click.UsageError(f"No such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def _say_version(wanted: bool) -> None:
    if wanted:
        found: dict[str, Any] = {}
        for name in ("fedalloy", "flwr"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        print(", ".join(f"{name} {number}" for name, number in found.items()))
        raise typer.Exit


def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Versions of FedAlloy and Flower.")
    ] = False,
) -> None:
    """Take the options of ``fedalloy`` itself."""


app = typer.Typer(
    cls=Suggesting,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.callback(help=EXAMPLES)(main)
cluster_app = typer.Typer(cls=Suggesting, help="A local SuperLink and SuperNodes that stay up.", no_args_is_help=True)
for title, commands in GROUPS.items():
    for command in commands:
        settings = FLOWERS if command is experiments.submit else None
        app.command(rich_help_panel=title, context_settings=settings)(command)
    if title == "Start here":
        app.add_typer(cluster_app, name="cluster", rich_help_panel="Your own federation")
for command in CLUSTER_COMMANDS:
    cluster_app.command()(command)
site_app = typer.Typer(
    cls=Suggesting, help="A site under its owner's control: its own trainer, policy, record.", no_args_is_help=True
)
app.add_typer(site_app, name="site", rich_help_panel="Your own federation")
for command in SITE_COMMANDS:
    site_app.command()(command)
