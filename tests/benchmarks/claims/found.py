"""Finished runs: a line of JSON for each client, in a file of an experiment, appended and on disk before the next."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedalloy_adapters.files.atomic_files import locked

Line = Mapping[str, Any]
FOLDER = Path(__file__).parents[1] / "found" / "claims"


def read(path: Path) -> list[Line]:
    """The lines of complete runs; if a kill has cut off a line, all lines of its run are left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:  # empty, or cut off
            continue
    counts: dict[tuple[str, int], set[str]] = {}
    for line in lines:
        counts.setdefault((line["digest"], line["seed"]), set()).add(line["client"])
    return [line for line in lines if len(counts[line["digest"], line["seed"]]) == line["clients"]]


def append(path: Path, lines: Iterable[Line]) -> None:
    """Add the lines of one run with one write, and remove a line that a kill has cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
    with locked(path.with_suffix(".lock")):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with os.fdopen(os.dup(handle), "rb") as file:
                there = file.read()
            os.ftruncate(handle, there.rfind(b"\n") + 1)
            os.lseek(handle, 0, os.SEEK_END)
            os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)


def done(lines: Sequence[Line]) -> set[tuple[str, int]]:
    """Digest and seed of every run that need not be run again."""
    return {(line["digest"], line["seed"]) for line in lines}
