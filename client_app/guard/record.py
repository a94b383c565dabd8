"""The client's own record of what it sent and what it refused: ``<state-dir>/records/<client-id>.jsonl``, append-only.

A line is on the disk before the data that it describes leave. Each has the SHA-256 of the line before it
(``previous``), so a changed or removed line is noticed as long as the newest hash is known. A line that a kill left
incomplete stays; the next line has its hash, too (``torn``), and is chained to the last complete line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fedalloy_adapters.files.atomic_files import locked, open_private, private_folder
from fedalloy_adapters.wire.codec import header_of
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2

_TAIL = 2**20


class Record:
    """One client's record; several processes may append."""

    def __init__(self, state_dir: Path, client_id: str) -> None:
        self.path = state_dir / "records" / f"{client_id}.jsonl"
        self.newest = ""
        """The hash of the line that was appended last."""

    def append(self, event: str, **said: Any) -> None:
        """Append a line: ``time``, ``event``, the values in ``said`` (JSON), and ``previous``.

        Raises:
            OSError: it cannot be written; then nothing may leave.
        """
        private_folder(self.path.parent)
        with locked(self.path.with_suffix(".lock")), open(self._open(), "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            before, torn = file.read(), b""
            if before and not before.endswith(b"\n"):
                file.write(b"\n")
                before, _, torn = before.rpartition(b"\n")
            previous = digest(before.rstrip(b"\n").rpartition(b"\n")[2]) if before.strip() else ""
            when = datetime.now(UTC).isoformat(timespec="seconds")
            line = {"time": when, "event": event, **said, "previous": previous}
            if torn:
                line["torn"] = digest(torn)
            written = json.dumps(line, allow_nan=False).encode()
            file.write(written + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.newest = digest(written)

    def last(self) -> str:
        """The hash of the newest line, from whichever process; empty if there is no line."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return ""
        return digest(lines[-1]) if lines else ""

    def _open(self) -> int:
        return open_private(self.path, os.O_RDWR | os.O_APPEND)


def asked(plan: plan_pb2.Plan) -> dict[str, Any]:
    """A plan as a record states it."""
    kinds = [str(step.WhichOneof("kind")) for step in plan.steps]
    return {"run": plan.run_name, "round": plan.round, "steps": kinds}


def left(report: report_pb2.Report, uploads: Mapping[str, bytes]) -> dict[str, Any]:
    """An answer as a record states it: the report with all its numbers, and every upload.

    An upload's ``numbers`` is how many bytes its encoded numbers take, which is what the server's ledger books.
    """
    said = report.SerializeToString(deterministic=True)
    return {
        "report": {"bytes": len(said), "sha256": digest(said), "values": values_of(report)},
        "slots": {slot: _upload(blob) for slot, blob in uploads.items()},
    }


def values_of(message: Message) -> dict[str, Any]:
    """A message as JSON; numbers that JSON lacks (infinity) become texts."""
    found: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return found


def digest(line: bytes) -> str:
    """A line's SHA-256, as records write it."""
    return hashlib.sha256(line).hexdigest()


def _upload(blob: bytes) -> dict[str, Any]:
    header = header_of(blob)
    return {
        "bytes": len(blob),
        "sha256": digest(blob),
        "encoding": adapter_pb2.Encoding.Name(header.encoding).removeprefix("ENCODING_").lower(),
        "numbers": header.payload_bytes,
        "layout": header.layout_digest.hex(),
        "content": header.content_digest.hex(),
    }
