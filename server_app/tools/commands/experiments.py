"""Commands that run strategies and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client_app.scenarios import FROM_FILES, NAMES
from server_app.tools.commands.arguments import (
    DataRoot,
    MoreRunConfig,
    RunsDir,
    data_root,
    listed,
    parse_run_config,
    read_clients_file,
)
from server_app.tools.commands.terminal import clear_errors, console, errors

if TYPE_CHECKING:
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.compare.statistics import Comparison


def demo(
    strategies: Annotated[str, typer.Option(help="Comma-separated.")] = "local,fedavg,fedmerge",
    clients: Annotated[int, typer.Option(min=1, help="How many SuperNodes.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Data, initial adapters and batches.")] = 0,
    runs_dir: RunsDir = Path("runs"),
    set_: MoreRunConfig = "",
    data: DataRoot = None,
    connection: Annotated[str, typer.Option(help="A flwr connection to a running cluster.")] = "",
    collect_to: Annotated[Path | None, typer.Option(help="Copy finished runs to this folder.")] = None,
) -> None:
    """Compare strategies on a local cluster with real data, and print one table."""
    from server_app.tools.demo import demo as run_demo
    from strategies import STRATEGIES
    from strategies.framework.options import require_choice

    chosen = listed(strategies)
    with clear_errors():
        for name in chosen:
            require_choice("--strategies", name, STRATEGIES)
        extra = parse_run_config(set_) | data_root(data)
        results = run_demo(chosen, clients, rounds, seed, runs_dir, console, extra, connection, collect_to)
    if any(result.summary is None for result in results):
        raise typer.Exit(1)


def submit(context: typer.Context) -> None:
    """Start a run like flwr run, with the same arguments, but send each client a quarter of the bytes of code.

    With --stream, a run that fails ends with the reason in one line, and exit code 1; --verbose shows all of Flower's.
    """
    from server_app.tools.bundle.start import flwr_run

    with clear_errors():
        flwr_run(context.args)


def compare(
    scenario: Annotated[str, typer.Argument(help=f"One of {', '.join((*NAMES, *FROM_FILES))}.")] = "digits",
    data: DataRoot = None,
    clients_file: Annotated[
        Path | None, typer.Option(help="Your own clients instead: TOML with a table of node-config for each.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="Comma-separated, or all. local, fedavg and the controls are added.")
    ] = "fedmerge",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from --first-seed.")] = 3,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first seed; choose settings on other seeds than you report.")
    ] = 0,
    clients: Annotated[
        int | None, typer.Option(min=2, help="How many clients; default 4, with --connection all that are online.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Federated rounds.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the results; finished runs in it are kept.")] = Path(
        "comparison"
    ),
    set_: MoreRunConfig = "",
    cluster: Annotated[
        bool, typer.Option("--cluster", help="On local SuperNodes, with bytes on the wire; slower.")
    ] = False,
    connection: Annotated[
        str, typer.Option(help="On the federation behind a flwr connection, on the SuperLink's machine.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, one process and thread each.")] = 1,
    encodings: Annotated[
        str, typer.Option(help="Comma-separated, as uplink-encoding: the strategies at each of these, too.")
    ] = "",
) -> None:
    """Find out which strategy suits these clients and at what cost; by default in this process, without a network."""
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.compare.command import compare as run_comparison

    chosen = range(first_seed, first_seed + seeds)
    with clear_errors():
        extra = parse_run_config(set_) | data_root(data)
        superlink = SuperLink(connection, out / "logs") if connection else None
        found, failed = run_comparison(
            scenario,
            listed(strategies),
            chosen,
            out,
            console,
            clients=clients or _how_many(superlink),
            rounds=rounds,
            options=extra,
            place=f"connection {connection}" if connection else "cluster" if cluster else "process",
            superlink=superlink,
            workers=jobs,
            nodes=read_clients_file(clients_file) if clients_file else None,
            encodings=listed(encodings),
        )
    _print(found, failed, out)
    if failed:
        raise typer.Exit(1)


def _how_many(superlink: SuperLink | None) -> int:
    """The number of clients of a comparison that does not set it.

    Raises:
        OptionError: fewer than two SuperNodes are online.
    """
    from strategies.framework.options import OptionError

    if superlink is None:
        return 4
    if (online := superlink.online()) < 2:
        raise OptionError(f"--connection {superlink.connection}: SuperNodes online = {online}, expected at least 2")
    return online


def _print(found: Comparison, failed: Mapping[str, str], out: Path) -> None:
    """Print the table of results, and why runs failed."""
    from server_app.tools.compare.html import verdict
    from server_app.tools.compare.statistics import explanation, terminal_table

    if found.lines:
        for line in verdict(found):
            console.print(f"* {line}", highlight=False, markup=False)
        console.print()
        console.print(terminal_table(found))
        for line in explanation(found, brief=True):
            console.print(line, highlight=False, markup=False)
        console.print(f"written: {out}: report.html, table.md, results.csv, runs/", highlight=False, soft_wrap=True)
    for why in dict.fromkeys(failed.values()):
        names = ", ".join(name for name, reason in failed.items() if reason == why)
        errors.print(f"failed: {names}: {why}", highlight=False, markup=False, soft_wrap=True)
