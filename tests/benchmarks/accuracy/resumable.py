"""Finished runs of a benchmark: lines of JSON in a file that only grows; and a process that is ready for them."""

from __future__ import annotations

import json
import logging
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from client_app.plan.training import set_up_torch
from fedalloy_adapters.files.atomic_files import locked


def read(path: Path, **meant: Any) -> list[dict[str, Any]]:
    """All lines but one that a kill has cut off; none if there is no file. ``meant`` is what older lines left out."""
    lines = []
    for text in path.read_text().split("\n") if path.exists() else []:
        try:
            lines.append(meant | json.loads(text))
        except ValueError:  # empty, or cut off
            continue
    return lines


def append(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
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


def has(found: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> bool:
    """Whether a run with these settings is among those that were found."""
    return any(about.items() <= one.items() for one in found)


def prepared(parser: ArgumentParser) -> Namespace:
    """The arguments, ``--cache`` among them; its folder is made, and this process is ready for runs."""
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    set_up_torch()
    return given
