"""Checks that a client's record (:mod:`client_app.guard.record`) is whole, and adds up what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client_app.guard.record import digest


class AuditError(ValueError):
    """The record cannot be read."""


@dataclass
class RunSums:
    """What left for one run, in bytes: ``uploads``, ``reports``, and ``numbers`` for encoded numbers alone."""

    plans: int = 0
    refused: int = 0
    registrations: int = 0
    uploads: int = 0
    numbers: int = 0
    reports: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, Any] = field(default_factory=dict)
    epsilon: float | None = None


@dataclass
class Audit:
    """``problems`` lists what does not fit, by line; ``torn`` the lines torn by a kill; ``newest`` is the last hash."""

    lines: int = 0
    problems: list[str] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    newest: str = ""
    runs: dict[str, RunSums] = field(default_factory=dict)

    def of(self, run: str) -> RunSums:
        """The sums of a run."""
        return self.runs.setdefault(run, RunSums())


def audit(path: Path, expected: str = "") -> Audit:
    """Verify a record's chain and add up what left.

    Args:
        path: the JSONL file.
        expected: a hash that was noted earlier; a line must have it.

    Raises:
        AuditError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            return audit_lines(file, expected)
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None


def audit_lines(lines: Iterable[bytes], expected: str = "") -> Audit:
    """See :func:`audit`."""
    found, previous, torn, seen = Audit(), "", "", False
    for number, raw in enumerate(lines, 1):
        whole, line = raw.endswith(b"\n"), raw.rstrip(b"\n")
        found.lines, found.newest = number, digest(line)
        seen = seen or found.newest == expected
        try:
            said = json.loads(line)
            if not isinstance(said, dict) or not whole:
                raise ValueError
        except ValueError:
            if torn:
                found.problems.append(f"line {number - 1} is torn, and the next one does not say so")
            found.torn.append(number)
            torn = found.newest
            continue
        if said.get("previous") != previous:
            found.problems.append(f"line {number} does not follow the one before it: changed, or one was taken out")
        if said.get("torn", "") != torn:
            found.problems.append(f"line {number}: the torn line before it is not the one that it names")
        previous, torn = found.newest, ""
        _add(found, said)
    if expected and not seen:
        found.problems.append(f"no line has the hash {expected}: the record was cut, or is another one")
    return found


def _add(found: Audit, said: dict[str, Any]) -> None:
    event = said.get("event")
    if event not in ("left", "refused", "ignored", "registered"):
        return
    run = found.of(str(said.get("run", "")))
    if event == "left":
        run.plans += 1
        run.uploads += sum(int(slot["bytes"]) for slot in said["slots"].values())
        run.numbers += sum(int(slot.get("numbers", 0)) for slot in said["slots"].values())
        run.reports += int(said["report"]["bytes"])
        for kind in said["steps"]:
            run.steps[kind] = run.steps.get(kind, 0) + 1
        privacy = said["report"].get("values", {}).get("privacy")
        if privacy is not None:
            run.epsilon = float(privacy["epsilon"])
    elif event == "refused":
        run.refused += 1
    elif event == "ignored":
        run.ignored |= said.get("values", {})
    elif event == "registered":
        run.registrations += 1
        run.reports += int(said.get("bytes", 0))
