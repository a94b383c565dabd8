"""Commands for a site's owner: the service with the data, its record, a strategy's requests, a server's key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from server_app.tools.commands.arguments import parse_run_config
from server_app.tools.commands.terminal import clear_errors, console
from server_app.tools.errors import ToolError

SiteFile = Annotated[Path, typer.Argument(help="The site's file, site.toml.")]


class SiteCommandError(ToolError):
    """The site's file, its record or a key is not as expected; the message says what is wrong."""


def serve(site_file: SiteFile) -> None:
    """Serve this site's client as the owner's own trainer; only the site's file decides what it may do."""
    from client_app.site.service import serve as serve_site
    from client_app.site.site_file import SiteFileError, read_site

    with clear_errors():
        try:
            serve_site(read_site(site_file))
        except SiteFileError as error:
            raise SiteCommandError(str(error)) from None


def audit(
    record: Annotated[Path, typer.Argument(help="site.toml, or a record (records/<client-id>.jsonl).")],
    expect: Annotated[str, typer.Option(help="A hash that was noted earlier: some line must have it.")] = "",
) -> None:
    """Verify the record of what was sent and refused, and add it up by run."""
    from client_app.site.audit import AuditError, audit
    from client_app.site.site_file import SiteFileError, read_site

    with clear_errors():
        try:
            path = record
            if record.suffix == ".toml":
                site = read_site(record)
                path = site.state_dir / "records" / f"{site.client_id}.jsonl"
            found = audit(path, expect)
        except (AuditError, SiteFileError) as error:
            raise SiteCommandError(str(error)) from None
        table = Table()
        for column in ("run", "plans", "refused", "numbers", "uploads", "reports", "epsilon"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for name, run in found.runs.items():
            epsilon = "" if run.epsilon is None else f"{run.epsilon:.3f}"
            counts = (run.plans, run.refused, run.numbers, run.uploads, run.reports)
            table.add_row(name or "(none)", *(f"{count:,}" for count in counts), epsilon)
        console.print(table)
        console.print("numbers, uploads and reports in bytes; numbers are what the server's ledger books as tensors up")
        for name, run in found.runs.items():
            for key, value in run.ignored.items():
                console.print(f"{name}: asked for {key} = {value}; the site's file decides that", markup=False)
        for number in found.torn:
            console.print(f"line {number} was left incomplete by a kill; the chain includes it as it is")
        console.print(f"{found.lines} lines, newest {found.newest}", highlight=False, soft_wrap=True)
        if found.problems:
            raise SiteCommandError("; ".join(found.problems))
        console.print("the chain is whole")


def show(
    site_file: SiteFile,
    run_config: Annotated[
        str, typer.Argument(help="Run-config of the run, as for flwr run: strategy='fedmerge' ...")
    ] = "",
) -> None:
    """Explain what a run would ask of this site, and what the site's file allows."""
    from client_app.site.site_file import SiteFileError, read_site
    from server_app.tools.site.show import ShowError, words_of

    with clear_errors():
        try:
            for line in words_of(read_site(site_file), parse_run_config(run_config)):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        except (SiteFileError, ShowError) as error:
            raise SiteCommandError(str(error)) from None


def key(file: Annotated[Path, typer.Argument(help="The private key; <file>.pub becomes the public one.")]) -> None:
    """Make a key for a server to sign its messages with (sign-with), or show the fingerprint of an existing one."""
    from fedalloy_adapters.files.atomic_files import write_durably
    from fedalloy_adapters.wire.signing import SignatureError, fingerprint_of, new_key

    with clear_errors():
        try:
            if not file.exists():
                private, public = new_key()
                write_durably(file, private)
                write_durably(file.with_name(f"{file.name}.pub"), public)
                console.print(f"{file} signs; give sites {file.name}.pub, or the fingerprint", soft_wrap=True)
            console.print(fingerprint_of(file), highlight=False, soft_wrap=True)
        except (SignatureError, OSError) as error:
            raise SiteCommandError(str(error)) from None
