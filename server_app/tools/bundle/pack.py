"""A Flower App Bundle whose sources are one compressed member.

Flower builds a bundle with uncompressed members and sends it to every client once per run. Its SuperLink and its
SuperNodes unpack any ZIP. So this one has the same sources, byte for byte, in one archive that is compressed as a whole
(LZMA, because files of one project have much in common), and a few lines that unpack it beside themselves before the
first import (:mod:`server_app.tools.bundle.shipped`). Nothing is stripped: a client's disk gets the repository's files,
with comments and the same digests. Members that are compressed one by one would need no such lines, but would be two
thirds larger.

A bundle has

    pyproject.toml             the parts that Flower reads: [project] and [tool.flwr]
    LICENSE
    fedalloy_bundle/           the lines that unpack, and ``size``: how many bytes this bundle has
    fedalloy_bundle/sources    the archive
    .info/CONTENT              Flower's list with the SHA-256 of each file but ``size``; Flower checks the whole, too
"""

from __future__ import annotations

import hashlib
import io
import re
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from server_app.tools.cluster.superlink import ClusterError

SHIPPED = Path(__file__).parent / "shipped"
FOLDER = "fedalloy_bundle"
DATE = (2024, 10, 1, 0, 0, 0)
"""The time of all members, as Flower sets it: the same sources give the same bytes."""
SIZE_DIGITS = 10
CONFIG, LICENSE, CONTENT = "pyproject.toml", "LICENSE", ".info/CONTENT"


def packed(plain: bytes) -> bytes:
    """The packed form of a bundle that Flower built; the same bytes for the same bundle and version of Python.

    Raises:
        ClusterError: Flower built something other than expected.
    """
    with zipfile.ZipFile(io.BytesIO(plain)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if missing := {CONFIG, LICENSE, CONTENT, "client_app/app.py", "server_app/app.py"} - files.keys():
        raise ClusterError(f"the app bundle has no {', '.join(sorted(missing))}, expected a FedAlloy checkout's")
    sources = {name: data for name, data in files.items() if name not in (CONFIG, LICENSE, CONTENT)}
    members = {CONFIG: _config(files[CONFIG].decode()), LICENSE: files[LICENSE]}
    members |= {f"{FOLDER}/{path.name}": path.read_bytes() for path in sorted(SHIPPED.glob("*.py"))}
    members[f"{FOLDER}/sources"] = _zip(sources, zipfile.ZIP_STORED)
    listed = (f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}" for name, data in members.items())
    members[CONTENT] = "\n".join(listed).encode()
    size = len(_bundle(members, 0))
    return _bundle(members, size)


def _bundle(members: Mapping[str, bytes], size: int) -> bytes:
    # The size is stored in a fixed number of digits, so the bundle's size does not depend on it.
    return _zip(members, zipfile.ZIP_LZMA, {f"{FOLDER}/size": f"{size:0{SIZE_DIGITS}d}".encode()})


def _zip(members: Mapping[str, bytes], how: int, stored: Mapping[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data, how)
        for name, data in (stored or {}).items():
            archive.writestr(zipfile.ZipInfo(name, DATE), data, zipfile.ZIP_STORED)
    return buffer.getvalue()


def _config(text: str) -> bytes:
    """The parts of pyproject.toml that Flower reads, with the apps in their new place."""
    tables = re.split(r"(?m)^(?=\[)", text)
    wanted = ("[project]", "[tool.flwr.")
    kept = "".join(table for table in tables if table.startswith(wanted))
    for part in ("server", "client"):
        kept = kept.replace(f'"{part}_app.app:app"', f'"{FOLDER}.{part}:app"')
    before, after = tomllib.loads(text), tomllib.loads(kept)
    components = {f"{part}app": f"{FOLDER}.{part}:app" for part in ("server", "client")}
    expected = {"project": {k: v for k, v in before["project"].items() if not isinstance(v, dict)}}
    expected |= {"tool": {"flwr": {"app": before["tool"]["flwr"]["app"] | {"components": components}}}}
    if after != expected:
        raise ClusterError("pyproject.toml is not written as expected: its tables cannot be told apart")
    return kept.encode()
