"""The size of the app bundle that every client is sent once per run: Flower's own, and ways to make it smaller.

    python -m tests.benchmarks.bundle_size

It is built from the files that git knows. "Without comments" blanks comments and docstrings and keeps lines, so that
tracebacks stay right. "ClientApp" leaves out the folders that no client imports.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
import zipfile
from collections.abc import Mapping
from pathlib import Path

from flwr.cli.build import build_fab_from_files
from rich.console import Console
from rich.table import Table

from server_app.tools.bundle.pack import packed

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("server_app/", "strategies/")


def built() -> bytes:
    """The bundle that ``flwr run`` builds from a fresh clone."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files: dict[str, bytes | Path] = {name: ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()}
    return build_fab_from_files(files)[0]


def members(bundle: bytes) -> dict[str, bytes]:
    """The bundle's files."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: Mapping[str, bytes], how: int) -> bytes:
    """A ZIP of them, one by one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how, compresslevel=9) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def bare(source: bytes) -> bytes:
    """The same program on the same lines without comments and docstrings."""
    lines = source.decode().split("\n")
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for one in body if isinstance(body, list) else ():
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                lines[one.lineno - 1 : one.end_lineno] = [""] * ((one.end_lineno or one.lineno) - one.lineno + 1)
                if body == [one]:
                    lines[one.lineno - 1] = " " * one.col_offset + "pass"
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    ast.parse("\n".join(lines))
    return "\n".join(lines).encode()


def main() -> None:
    """Build, try, print."""
    stored = built()
    files = members(stored)
    short = {name: bare(data) if name.endswith(".py") else data for name, data in files.items()}
    clients = {name: data for name, data in files.items() if not name.startswith(SERVERS)}
    together = clients | {"server_app/app.py": b""}  # no bundle of ours is without one
    ways = {
        "flwr run: stored": stored,
        "each file compressed": zipped(files, zipfile.ZIP_DEFLATED),
        "each file compressed, without comments": zipped(short, zipfile.ZIP_DEFLATED),
        "what the ClientApp imports, each file compressed": zipped(clients, zipfile.ZIP_DEFLATED),
        "what the ClientApp imports, all files compressed together": packed(zipped(together, zipfile.ZIP_STORED)),
        "fedalloy submit: all files compressed together": packed(stored),
        "all files together, without comments": packed(zipped(short, zipfile.ZIP_STORED)),
    }
    table = Table()
    table.add_column("what every client is sent")
    table.add_column("kB", justify="right")
    for name, bundle in ways.items():
        table.add_row(name, f"{len(bundle) / 1000:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
