"""The base class of errors that a user reads."""

from __future__ import annotations


class ToolError(RuntimeError):
    """An error that the user can fix. Its text is one sentence; a command prints it and ends with exit code 1."""
