"""Commands for a federation on several machines: certificates, keys, and why a SuperNode does not get in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from server_app.tools.commands.arguments import Connection, listed
from server_app.tools.commands.terminal import clear_errors, console


def certificates(
    folder: Annotated[Path, typer.Argument(help="Existing files stay.")],
    hosts: Annotated[str, typer.Option(help="Comma-separated names and addresses of the server.")] = "",
    clients: Annotated[str, typer.Option(help="Comma-separated client ids.")] = "",
    renew: Annotated[str, typer.Option(help="Client ids, or server, comma-separated: make new keys for these.")] = "",
    owner: Annotated[int, typer.Option(help="User id of the files' owner (needs root).")] = -1,
) -> None:
    """Make missing files of a federation: certificate authority, server certificate, and a key pair for each client."""
    from server_app.tools.cluster.certificates import make_missing

    with clear_errors():
        for line in make_missing(folder, listed(hosts), listed(clients), listed(renew)):
            console.print(line, highlight=False)
    if owner >= 0:
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, owner, owner)


def register(
    public: Annotated[Path, typer.Argument(help="A folder with a file <client-id>.pub for each client.")],
    connection: Connection,
    remembered: Annotated[Path, typer.Option(help="Where to remember what was registered.")],
) -> None:
    """Let the SuperLink accept the keys in a folder, and no others."""
    from server_app.tools.cluster.superlink import SuperLink
    from server_app.tools.cluster.supernode_keys import register_clients

    with clear_errors():
        for line in register_clients(SuperLink(connection, remembered.parent), public, remembered):
            console.print(line, highlight=False)


def check(
    address: Annotated[str, typer.Argument(help="The SuperLink's Fleet port, HOST:PORT.")],
    root_certificates: Annotated[Path | None, typer.Option(help="As for flower-supernode; none: no TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="The SuperNode's private key.")] = None,
) -> None:
    """Say why a SuperNode on this machine cannot connect, and what to do."""
    from server_app.tools.cluster.link_check import check_key, check_link, check_registered

    with clear_errors():
        if key is not None:
            console.print(check_key(key), soft_wrap=True)
        console.print(check_link(address, root_certificates), soft_wrap=True)
        if key is not None:
            console.print(check_registered(address, root_certificates, key), soft_wrap=True)
