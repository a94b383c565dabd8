"""Keeps the keys that a SuperLink accepts equal to a folder of public keys, one per client id.

``<folder>/<client-id>.pub`` may join as ``<client-id>``. If a client's file changes, its old key is
refused; if the file is gone, the client is refused. The registered keys are remembered in a JSON file, because Flower's
list of SuperNodes shows neither names nor keys; keep it beside the SuperLink's database, so that both are lost
together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fedalloy_adapters.files.atomic_files import write_durably
from server_app.tools.cluster.superlink import ClusterError, SuperLink


def register_clients(superlink: SuperLink, folder: Path, remembered: Path) -> Iterator[str]:
    """Make the SuperLink accept exactly the clients of ``folder``; yields a line for every change.

    Raises:
        ClusterError: the SuperLink refused a key; the message has its reason.
    """
    known: dict[str, dict[str, str]] = json.loads(remembered.read_text()) if remembered.exists() else {}
    wanted = {path.stem: path.read_text().strip() for path in sorted(folder.glob("*.pub"))}
    for client_id, entry in list(known.items()):
        if wanted.get(client_id) != entry["key"]:
            superlink.flwr("supernode", "unregister", entry["node"], superlink.connection)
            del known[client_id]
            _remember(remembered, known)
            yield f"{client_id}: its old key is refused from now on"
    for client_id, key in wanted.items():
        if client_id in known:
            continue
        public = str(folder / f"{client_id}.pub")
        said = superlink.flwr(
            "supernode", "register", public, superlink.connection, "--name", client_id, "--format", "json"
        )
        known[client_id] = {"key": key, "node": str(node_id_of(said))}
        _remember(remembered, known)
        yield f"{client_id}: registered as node {known[client_id]['node']}"


def _remember(path: Path, known: dict[str, dict[str, str]]) -> None:
    write_durably(path, json.dumps(known, indent=2, sort_keys=True).encode())


def node_id_of(said: str) -> str:
    """The node id in the output of ``flwr supernode register --format json``.

    Raises:
        ClusterError: it has none.
    """
    try:
        return str(json.loads(said[said.index("{") :])["node-id"])
    except (ValueError, KeyError):
        raise ClusterError(f"flwr supernode register said {said.strip()[-200:]!r}, expected a node-id") from None
