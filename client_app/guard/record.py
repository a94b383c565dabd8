"""The client's own record of what left it and what it refused: ``<state-dir>/records/<client-id>.jsonl``, append-only.

A line is written, and on the disk, before what it tells of leaves. Each has the SHA-256 of the line before it, so that
a line that is changed or taken out is seen as long as the newest hash is known.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedalloy_adapters.files.atomic_files import locked, open_private, private_folder
from proto.fedalloy.v1 import plan_pb2, report_pb2

_TAIL = 2**20


class Record:
    """One client's record; several processes may append."""

    def __init__(self, state_dir: Path, client_id: str) -> None:
        self.path = state_dir / "records" / f"{client_id}.jsonl"

    def append(self, event: str, **said: Any) -> None:
        """One line: ``time``, ``event``, what is ``said`` of it (JSON values), and ``previous``.

        Raises:
            OSError: it cannot be written; then nothing may leave.
        """
        private_folder(self.path.parent)
        with locked(self.path.with_suffix(".lock")), open(self._open(), "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            before = file.read()
            if before and not before.endswith(b"\n"):  # a kill tore it
                file.write(b"\n")
            previous = hashlib.sha256(before.rstrip(b"\n").rpartition(b"\n")[2]).hexdigest() if before else ""
            when = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"time": when, "event": event, **said, "previous": previous}
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _open(self) -> int:
        return open_private(self.path, os.O_RDWR | os.O_APPEND)


def asked(plan: plan_pb2.Plan) -> dict[str, Any]:
    """What a record says of a plan."""
    kinds = [str(step.WhichOneof("kind")) for step in plan.steps]
    return {"run": plan.run_name, "round": plan.round, "steps": kinds}


def left(report: report_pb2.Report, uploads: Mapping[str, bytes]) -> dict[str, Any]:
    """What a record says of an answer: every upload and the report, by size and SHA-256."""
    said = report.SerializeToString(deterministic=True)
    return {
        "report": {"bytes": len(said), "sha256": hashlib.sha256(said).hexdigest()},
        "slots": {
            slot: {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()} for slot, blob in uploads.items()
        },
    }
