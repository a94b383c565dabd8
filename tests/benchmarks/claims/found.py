"""Finished runs: a line of JSON for each client, in a file of an experiment, appended and on disk before the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.accuracy import resumable

Line = Mapping[str, Any]
FOLDER = Path(__file__).parents[1] / "found" / "claims"


def read(path: Path) -> list[Line]:
    """The lines of complete runs; if a kill has cut off a line, all lines of its run are left out."""
    lines: list[Line] = list(resumable.read(path))
    counts: dict[tuple[str, int], set[str]] = {}
    for line in lines:
        counts.setdefault((line["digest"], line["seed"]), set()).add(line["client"])
    return [line for line in lines if len(counts[line["digest"], line["seed"]]) == line["clients"]]


def done(lines: Sequence[Line]) -> set[tuple[str, int]]:
    """Digest and seed of every run that need not be run again."""
    return {(line["digest"], line["seed"]) for line in lines}
