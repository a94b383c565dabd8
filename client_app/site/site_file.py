"""``site.toml``: what a site allows servers to ask. Only the site's own service reads it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedalloy_adapters.wire.signing import SignatureError, fingerprint_of

ANYBODY = "any"
_TOP = ("socket", "socket-group", "servers", "runs", "base-models", "client", "policy", "dp")
_PATHS = ("data-path", "data-root", "state-dir", "start-adapter", "alignments")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


class SiteFileError(ValueError):
    """``site.toml`` is missing, is not TOML, or has keys or values that are not valid."""


@dataclass(frozen=True)
class Site:
    """The contents of the file.

    The service listens at ``socket``. The modes of the socket and its folder decide who may connect: this user, and
    ``socket_group`` if there is one. ``servers`` has names by the fingerprint of keys whose plans are carried out; if
    empty, any server's plans are. ``runs`` and ``base_models`` are patterns; without a pattern no run is allowed.
    ``client`` has what node-config would have: the client's id, data, policy and privacy.
    """

    path: Path
    socket: Path
    runs: tuple[str, ...]
    servers: Mapping[str, str] = field(default_factory=dict)
    base_models: tuple[str, ...] = ()
    client: Mapping[str, Any] = field(default_factory=dict)
    socket_group: str = ""

    @property
    def client_id(self) -> str:
        """This client."""
        return str(self.client["client-id"])

    @property
    def state_dir(self) -> Path:
        """The folder of slots, records and budgets."""
        return Path(self.client["state-dir"])


def read_site(path: Path) -> Site:
    """Read the file; its relative paths start at its own folder.

    Raises:
        SiteFileError: the file is not valid; names the key, what was expected, and what was found.
    """
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise SiteFileError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SiteFileError(f"{path} is not TOML: {error}") from None
    where = path.resolve().parent
    _require_known(path, found, _TOP)
    if "socket" not in found:
        raise SiteFileError(f"{path} has no socket, expected the path at which the service should listen")
    client = {key: _beside(where, key, value) for key, value in _table(path, found, "client").items()}
    for prefix, table in (("client.", "policy"), ("dp.", "dp")):
        client |= {f"{prefix}{key}": value for key, value in _table(path, found, table).items()}
    for key in ("client-id", "state-dir"):
        if not isinstance(client.get(key), str):
            raise SiteFileError(f"{path}: [client] has no {key}, expected a text")
    runs = _texts(path, found, "runs")
    if not runs:
        raise SiteFileError(f"{path}: runs names none, expected names or patterns like study-*")
    return Site(
        path=path,
        socket=(where / str(found["socket"])).absolute(),
        runs=runs,
        servers=_servers(path, where, _texts(path, found, "servers")),
        base_models=_texts(path, found, "base-models"),
        client=client,
        socket_group=str(found.get("socket-group", "")),
    )


def _servers(path: Path, where: Path, said: Collection[str]) -> dict[str, str]:
    if not said:
        raise SiteFileError(
            f"{path}: servers names none, expected PEM files of keys or certificates, fingerprints (sha256:...), or "
            f"{ANYBODY!r}"
        )
    if set(said) == {ANYBODY}:
        return {}
    found = {}
    for server in said:
        if _FINGERPRINT.fullmatch(server):
            found[server] = f"{server[:15]}..."
            continue
        try:
            found[fingerprint_of(where / server)] = Path(server).name
        except SignatureError as error:
            raise SiteFileError(f"{path}: servers: {error}") from None
    return found


def _table(path: Path, found: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = found.get(name, {})
    if not isinstance(table, dict) or any(isinstance(value, dict | list) for value in table.values()):
        raise SiteFileError(f"{path}: [{name}], expected a table of texts, numbers, true and false")
    return table


def _texts(path: Path, found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = found.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SiteFileError(f"{path}: {key} = {value!r}, expected a list of texts")
    return tuple(value)


def _beside(where: Path, key: str, value: Any) -> Any:
    """A path relative to the file; a data set or a model may also have a name that is not a path."""
    if key not in (*_PATHS, "base-model") or not isinstance(value, str):
        return value
    here = where / Path(value).expanduser()
    return str(here) if here.exists() or key == "state-dir" else value


def _require_known(path: Path, found: Mapping[str, Any], known: Collection[str]) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise SiteFileError(f"{path}: unknown key {key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
