"""JSON files with a SHA-256 of their values, which shows whether they are still what was written.

It finds damage, not forgery: a person who can write the file can also write its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "values-sha256"


def sealed(values: Mapping[str, Any]) -> bytes:
    """The values and their digest."""
    values = json.loads(json.dumps(values, allow_nan=False))  # JSON makes keys texts
    return json.dumps({**values, SEAL: _digest(values)}).encode()


def unsealed(data: str | bytes) -> dict[str, Any]:
    """The values. A file without a digest, which an earlier version wrote, is accepted as it is.

    Raises:
        ValueError: the text is not JSON, not an object, or its values are not those that were written.
    """
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}, expected an object")
    seal = found.pop(SEAL, None)
    if seal is not None and seal != _digest(found):
        raise ValueError("the values are not those that were written")
    return found


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
