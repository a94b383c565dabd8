"""Provisional."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class WireLog:
    """Provisional: counts nothing yet."""

    is_measuring = True

    def __init__(self, path: Path, run_name: str) -> None:
        self.path = path

    def __enter__(self) -> WireLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def sent(self, *args: Any) -> None: ...

    def arrived(self, *args: Any) -> None: ...

    def client_reading(self, *args: Any) -> None: ...

    def totals(self) -> tuple[dict[str, Any], float | None]:
        return {"up": {}, "down": {}}, None
