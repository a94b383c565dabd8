"""What the tools raise for a user to read."""

from __future__ import annotations


class ToolError(RuntimeError):
    """Something that the user can put right; its text is one sentence, and a command ends with it and exit code 1."""
