"""One example as it was read, before it becomes tensors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Example:
    """One checked example; fields that its task does not use are None.

    ``text`` and ``pair`` for classification; ``prompt`` (None: the text has none) and ``completion``, or ``messages``,
    for generation; or both, and then the prompt is for models without a chat template. ``context`` is what a chat
    template gets beside the messages (tools), ``first`` the first message that may be learnt. An image is a path or an
    encoded file. ``told`` holds fields of one kind of task only.
    """

    place: str
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    context: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0
    images: tuple[Path | bytes, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The content that two copies of one example share."""
        seen = [image_digest(image) for image in self.images]
        # "None" has been hashed since the first version: another word would divide the same texts differently.
        image = seen if len(seen) > 1 else seen[0] if seen else "None"
        told = [self.text, self.pair, self.label, self.prompt, self.completion, self.messages, image]
        more = [self.context, self.first] if self.context or self.first or self.told else []
        return json.dumps([*told, *more, *([self.told] if self.told else [])], default=str)


@functools.lru_cache(maxsize=100_000)
def _digest_of(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_digest(image: Path | bytes | None) -> str | None:
    """SHA-256 of an image's file; a copy with another name or in another folder has the same."""
    if isinstance(image, Path):
        stat = image.stat()
        return _digest_of(image, stat.st_size, stat.st_mtime_ns)
    return None if image is None else hashlib.sha256(image).hexdigest()
