"""The ``fedalloy`` command. Everything that is not here is a stock ``flwr`` command."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from client_app.scenarios import FROM_FILES, NAMES

app = typer.Typer(
    help="Every client its own model: personalised federated LoRA on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cluster_app = typer.Typer(help="A local SuperLink and SuperNodes that stay up.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")

console = Console()
errors = Console(stderr=True)
DIRECTORY = Path(".fedalloy/cluster")

RunsDir = Annotated[Path, typer.Option(help="Where runs are written.")]
Directory = Annotated[Path, typer.Option("--dir", help="The cluster's own folder.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder with the data of scenarios on real data.")]


@app.command()
def demo(
    strategies: Annotated[str, typer.Option(help="Comma-separated.")] = "local,fedavg,fedmerge",
    clients: Annotated[int, typer.Option(min=1, help="How many SuperNodes.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Federated rounds.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Data, initial adapters and batches.")] = 0,
    runs_dir: RunsDir = Path("runs"),
    set_: Annotated[str, typer.Option("--set", help="More run-config, as for flwr run.")] = "",
    data: DataRoot = None,
    connection: Annotated[str, typer.Option(help="A flwr connection to a cluster that runs already.")] = "",
    collect_to: Annotated[Path | None, typer.Option(help="Copy finished runs to this folder.")] = None,
) -> None:
    """Compare strategies on a local cluster with real data, and print one table."""
    from server_app.tools.demo import demo as run_demo
    from strategies import STRATEGIES
    from strategies.framework.options import require_choice

    chosen = _listed(strategies)
    with _clear_errors():
        for name in chosen:
            require_choice("--strategies", name, STRATEGIES)
        extra = parse_run_config(set_) | _data_root(data)
        results = run_demo(chosen, clients, rounds, seed, runs_dir, console, extra, connection, collect_to)
    if any(result.summary is None for result in results):
        raise typer.Exit(1)


@app.command()
def compare(
    scenario: Annotated[str, typer.Argument(help=f"One of {', '.join((*NAMES, *FROM_FILES))}.")] = "digits",
    data: DataRoot = None,
    clients_file: Annotated[
        Path | None, typer.Option(help="Your own clients instead: TOML with a table of node-config for each.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help="Comma-separated, or all; local, fedavg and controls are added.")
    ] = "fedmerge",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from --first-seed.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Choose settings on others than you report.")] = 0,
    clients: Annotated[int, typer.Option(min=2, help="How many clients.")] = 4,
    rounds: Annotated[int, typer.Option(min=2, help="Federated rounds.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the results; finished runs in it are kept.")] = Path(
        "comparison"
    ),
    set_: Annotated[str, typer.Option("--set", help="More run-config, as for flwr run.")] = "",
    cluster: Annotated[
        bool, typer.Option("--cluster", help="On local SuperNodes, with bytes on the wire; slower.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="So many runs side by side, one process and thread each.")] = 1,
) -> None:
    """Which strategy for these clients, at what cost; by default in this process, without a network."""
    from server_app.tools.compare.command import compare as run_comparison
    from server_app.tools.compare.html import verdict
    from server_app.tools.compare.statistics import explanation, terminal_table

    chosen = range(first_seed, first_seed + seeds)
    with _clear_errors():
        extra = parse_run_config(set_) | _data_root(data)
        found, failed = run_comparison(
            scenario,
            _listed(strategies),
            chosen,
            out,
            console,
            clients=clients,
            rounds=rounds,
            options=extra,
            place="cluster" if cluster else "process",
            workers=jobs,
            nodes=read_clients_file(clients_file) if clients_file else None,
        )
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
    if failed:
        raise typer.Exit(1)


@cluster_app.command()
def up(
    clients: Annotated[int, typer.Option(min=1, help="How many SuperNodes.")] = 4,
    client_ids: Annotated[str, typer.Option(help="Comma-separated names instead of client-0, ...")] = "",
    clients_file: Annotated[
        Path | None, typer.Option(help="TOML: a table of node-config keys for each client, by its name.")
    ] = None,
    directory: Directory = DIRECTORY,
    fleet_port: Annotated[int, typer.Option(help="gRPC port for SuperNodes; 0 chooses one.")] = 0,
    http_port: Annotated[int, typer.Option(help="Port for flwr run; 0 chooses one.")] = 0,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Start a SuperLink and SuperNodes with TLS and keys, and leave them running."""
    from server_app.tools.cluster.local import LocalCluster, Settings

    names = _listed(client_ids)
    with _clear_errors():
        node_config = read_clients_file(clients_file) if clients_file else {}
        names = names or list(node_config) or [f"client-{index}" for index in range(clients)]
        settings = Settings(tuple(names), runs_dir, fleet_port=fleet_port, http_port=http_port, node_config=node_config)
        cluster = LocalCluster(directory, settings, lambda text: console.print(text, highlight=False))
        cluster.up()
        console.print("\nNow, for example:\n", highlight=False)
        console.print(cluster.stop_hint(), highlight=False, soft_wrap=True)


@cluster_app.command()
def down(directory: Directory = DIRECTORY) -> None:
    """Stop the cluster."""
    from server_app.tools.cluster.local import stop

    with _clear_errors():
        count = stop(directory)
    console.print(f"stopped {count} processes" if count else "no cluster is running", highlight=False)


@cluster_app.command()
def status(directory: Directory = DIRECTORY) -> None:
    """Show what is running."""
    from server_app.tools.cluster.local import Process, read_state

    state = read_state(directory)
    if state is None:
        console.print(f"no cluster was started from {directory}", highlight=False)
        raise typer.Exit(1)
    table = Table()
    for column in ("process", "pid", "state"):
        table.add_column(column)
    alive = True
    for item in state["processes"]:
        found = Process(**item).find()
        alive = alive and found is not None
        table.add_row(item["name"], str(item["pid"]), "running" if found else "ended")
    console.print(table)
    console.print(f"SuperNodes connect to {state['host']}:{state['fleet_port']}", highlight=False)
    console.print(f"flwr connects to 127.0.0.1:{state['http_port']}", highlight=False)
    if not alive:
        raise typer.Exit(1)


@app.command()
def traffic(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Print where every byte of a run went."""
    from server_app.tools.print_traffic import print_traffic

    with _clear_errors():
        print_traffic(run, console)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Every client's models next to each other, and the weights that merged them."""
    from server_app.tools.print_run import print_report

    with _clear_errors():
        print_report(run, console)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    client: Annotated[str, typer.Argument(help="A client id.")],
    destination: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Copy a client's personal model to a PEFT directory of its own."""
    from server_app.tools.export import export_adapter, is_in_parts

    with _clear_errors():
        export_adapter(run, client, destination)
    console.print(f"exported to {destination}", highlight=False, soft_wrap=True)
    if is_in_parts(destination):
        console.print(
            "Its coefficients depend on the input, so it cannot be one PEFT adapter: each slot is a PEFT directory of "
            "its own, gates.safetensors holds the gates, and mixture.json says how they add up.",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def align(
    scenario: Annotated[str, typer.Argument(help="A scenario with several architectures, as digits-mixed.")] = "",
    data: DataRoot = None,
    models: Annotated[str, typer.Option(help="Or: base models of your own, comma-separated, the smallest first,")] = "",
    public: Annotated[str, typer.Option(help="and data for them: \"data-path='public.jsonl' text-column='q'\".")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="lora-blocks of the runs it is for.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="lora-r of the runs it is for.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Decides the pivot's A and B.")] = 0,
    penalty: Annotated[float, typer.Option(min=0, help="Weight of A's orthogonality.")] = 0.5,
    orthonormal_b: Annotated[bool, typer.Option(help="Make B's columns orthonormal at the end.")] = False,
    state_dir: Annotated[Path, typer.Option(help="The clients' state-dir.")] = Path("runs"),
) -> None:
    """Align the frozen A and B of different architectures; run it again to go on where it was stopped."""
    from server_app.tools.align import Aligned, align_models

    with _clear_errors():
        what = Aligned(scenario, _listed(models), parse_run_config(public), str(data or ""))
        path = align_models(what, blocks, rank, seed, penalty, orthonormal_b, state_dir, console)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    console.print(f"run-config: lora-blocks={blocks} lora-r={rank} lora-alignment='{path.stem}'", soft_wrap=True)


@app.command()
def collect(
    runs: Annotated[Path, typer.Argument(help="Where a cluster keeps its runs.")],
    destination: Annotated[Path, typer.Argument(help="A folder of yours.")],
) -> None:
    """Copy all runs of a cluster's own storage to a folder, owned by who owns that folder."""
    from server_app.tools.copy_runs import collect_all

    with _clear_errors():
        for copy in collect_all(runs, destination):
            console.print(str(copy), highlight=False, soft_wrap=True)


@app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(help="Files that are there already stay.")],
    hosts: Annotated[str, typer.Option(help="Comma-separated names and addresses of the server.")] = "",
    clients: Annotated[str, typer.Option(help="Comma-separated client ids.")] = "",
    renew: Annotated[str, typer.Option(help="Comma-separated client ids, or server: make these anew.")] = "",
    owner: Annotated[int, typer.Option(help="User id that the files shall belong to (needs root).")] = -1,
) -> None:
    """Make what a federation lacks: certificate authority, server certificate, a key pair for each client."""
    from server_app.tools.cluster.certificates import make_missing

    with _clear_errors():
        for line in make_missing(folder, _listed(hosts), _listed(clients), _listed(renew)):
            console.print(line, highlight=False)
    if owner >= 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, owner, owner)


@app.command()
def register(
    public: Annotated[Path, typer.Argument(help="A folder with a file <client-id>.pub for each client.")],
    connection: Annotated[str, typer.Argument(help="A flwr connection to the SuperLink.")],
    remembered: Annotated[Path, typer.Option(help="Where to remember what was registered.")],
) -> None:
    """Let the SuperLink accept the keys of a folder and no others."""
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.cluster.supernode_keys import register_clients

    with _clear_errors():
        for line in register_clients(SuperLink(connection, remembered.parent), public, remembered):
            console.print(line, highlight=False)


@app.command()
def check(
    address: Annotated[str, typer.Argument(help="The SuperLink's Fleet port, HOST:PORT.")],
    root_certificates: Annotated[Path | None, typer.Option(help="As for flower-supernode; none: no TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="The SuperNode's private key.")] = None,
) -> None:
    """Say why a SuperNode on this machine does not get in, and what to do."""
    from server_app.tools.cluster.link_check import check_key, check_link

    with _clear_errors():
        if key is not None:
            console.print(check_key(key), soft_wrap=True)
        console.print(check_link(address, root_certificates), soft_wrap=True)


@app.command()
def options(
    run_config: Annotated[str, typer.Argument(help="Run-config to check, as for flwr run.")] = "",
) -> None:
    """List every run-config key with its default, or check some."""
    from server_app.run.options import known_keys, read_run_options
    from strategies import strategy_from_run_config

    if run_config:
        with _clear_errors():
            given = parse_run_config(run_config)
            read_run_options(given)
            strategy_from_run_config(given)
        console.print("run-config is valid", highlight=False)
        return
    table = Table()
    table.add_column("key")
    table.add_column("default")
    for key, default in known_keys().items():
        table.add_row(key, repr(default))
    console.print(table)


def read_clients_file(path: Path) -> dict[str, dict[str, Any]]:
    """Node-config by client id, from a TOML file with one table for each client.

    Raises:
        OptionError: the file cannot be read, or has something else in it.
    """
    from strategies.framework.options import OptionError

    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    for client, table in found.items():
        if not isinstance(table, dict):
            raise OptionError(f"{path}: {client!r} is not a table, expected [client-id] and its node-config keys below")
        for key, value in table.items():
            if not isinstance(value, bool | int | float | str):
                raise OptionError(f"{path}: {client}.{key} = {value!r}, expected a number, true, false or text")
    return found


def parse_run_config(text: str) -> dict[str, Any]:
    """``key=value`` pairs separated by spaces, values as in TOML, as ``flwr run --run-config`` reads them.

    Raises:
        OptionError: a pair is not valid.
    """
    from strategies.framework.options import OptionError

    pair = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")
    try:
        if left := pair.sub("", text).strip():  # Flower's own reader passes over what it does not understand
            raise ValueError(f"{left!r} is not a key=value pair")
        return tomllib.loads("\n".join(f'"{key}" = {value}' for key, value in pair.findall(text)))
    except ValueError as error:
        raise OptionError(f"cannot read {text!r}: {error}; expected pairs like \"strategy='fedavg' seed=1\"") from None


def _data_root(folder: Path | None) -> dict[str, Any]:
    return {} if folder is None else {"data-root": str(folder.expanduser().resolve())}


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Our own errors are one line and exit code 1; Ctrl-C is exit code 130."""
    from server_app.run.run_directory import RunDirectoryError
    from server_app.tools.align import AlignCommandError
    from server_app.tools.cluster.certificates import CertificateError
    from server_app.tools.cluster.link_check import LinkError
    from server_app.tools.cluster.superlink import ClusterError
    from server_app.tools.copy_runs import CollectError
    from server_app.tools.export import ExportError
    from strategies.framework.options import OptionError

    try:
        yield
    except (
        AlignCommandError,
        CertificateError,
        ClusterError,
        CollectError,
        ExportError,
        LinkError,
        RunDirectoryError,
        OptionError,
    ) as error:
        errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted; every process was stopped, run directories are as they were", highlight=False)
        raise typer.Exit(130) from None
