"""Splits that are large are encoded once, a part at a time, into a file of the client's state directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client_app.data.dataset import MASK, Dataset
from client_app.data.example import Example
from client_app.data.stored import LABELS, StoredDataset, TokenFile, write_tokens
from client_app.model.bases.model_folders import FoundModel
from client_app.own.encoding import Encoder

IN_MEMORY_TOKENS = 2**20
"""Largest number of tokens of a split in memory, including padding; with mask and targets that is 25 MB."""
PART = 1000
"""Examples that are encoded at once."""
_FORMAT = 1
"""Of the files; another number makes all of them anew."""
_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def encode_split(
    encoder: Encoder, examples: Sequence[Example], labels: Sequence[str], model: FoundModel, folder: Path
) -> Dataset:
    """One split: in memory if it is small, else from its file in ``folder``, which is made if missing.

    A file is found by its content and by what encodes it. Images stay where they are, and kinds of tasks whose examples
    are not one text with one label, or a text to be written, stay in memory.
    """
    whole = len(examples) * encoder.max_length <= IN_MEMORY_TOKENS or encoder.kind.has_image
    first = Dataset({}, torch.empty(0)) if whole else _uncounted(encoder, examples[:PART], labels)
    if whole or not _is_storable(first, encoder) or len(examples) * _width(first) <= IN_MEMORY_TOKENS:
        return encoder.encode(examples, labels)
    path = folder / f"{_key(encoder, examples, labels, model)}.arrow"
    file = TokenFile.opened(path)
    if file is None:
        before = _told(encoder)
        parts = (examples[start : start + PART] for start in range(0, len(examples), PART))
        file = write_tokens(
            path,
            (row for part in parts for row in _rows(encoder.encode(part, labels))),
            lambda: {name: count - before.get(name, 0) for name, count in _told(encoder).items()},
        )
    else:
        _tell(encoder, file.about)
    own = None if first.labels.dim() == 2 else file.column(LABELS)
    return StoredDataset.of(file, encoder.kind.name, own, encoder.padding_id or 0)


def _uncounted(encoder: Encoder, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
    """Some examples encoded, of which the encoder's counts know nothing."""
    before = _told(encoder)
    found = encoder.encode(examples, labels)
    after = _told(encoder)
    _tell(encoder, {name: before.get(name, 0) - count for name, count in after.items()})
    return found


def _is_storable(split: Dataset, encoder: Encoder) -> bool:
    shape = split.inputs[MASK].shape if MASK in split.inputs else None
    like_tokens = all(tensor.shape == shape and not tensor.is_floating_point() for tensor in split.inputs.values())
    written = encoder.kind.generative and split.labels.shape == shape
    plain = split.labels.dim() == 1 and not split.labels.is_floating_point()
    return type(split) is Dataset and "input_ids" in split.inputs and like_tokens and (written or plain)


def _width(split: Dataset) -> int:
    return int(split.inputs[MASK].shape[1])


def _rows(split: Dataset) -> Iterator[dict[str, NDArray[np.int32]]]:
    """Each example's numbers without padding; the mask, which is all ones, is left out."""
    columns = {name: tensor for name, tensor in split.inputs.items() if name != MASK}
    for row, length in enumerate(split.inputs[MASK].sum(dim=1).tolist()):
        found = {name: tensor[row, :length].to(torch.int32).numpy() for name, tensor in columns.items()}
        labels = split.labels[row, :length] if split.labels.dim() == 2 else split.labels[row : row + 1]
        yield {**found, LABELS: labels.to(torch.int32).numpy()}


def _key(encoder: Encoder, examples: Sequence[Example], labels: Sequence[str], model: FoundModel) -> str:
    versions = [version(name) for name in ("transformers", "tokenizers")]
    settings = [encoder.kind.name, encoder.max_length, encoder.ask_by_chat, encoder.between, encoder.padding_id]
    digest = hashlib.sha256(repr((_FORMAT, versions, settings, list(labels))).encode())
    for path in sorted(path for pattern in _TOKENIZER_FILES for path in model.folder.glob(pattern)):
        digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    for example in examples:
        digest.update(hashlib.sha256(example.content.encode()).digest())
    return digest.hexdigest()[:40]


def _told(encoder: Encoder) -> dict[str, int]:
    """What an encoder has counted."""
    found = {"truncated": encoder.truncated} | {f"text:{what}": n for what, n in encoder.findings.items()}
    return found | {f"chat:{what}": n for what, n in (encoder.chat.findings if encoder.chat else {}).items()}


def _tell(encoder: Encoder, counts: Mapping[str, Any]) -> None:
    """Add to what an encoder has counted."""
    for name, count in counts.items():
        where, _, what = name.partition(":")
        if where == "truncated":
            encoder.truncated += int(count)
        elif where == "text":
            encoder.findings[what] += int(count)
        elif encoder.chat is not None:
            encoder.chat.findings[what] += int(count)
    for counter in (encoder.findings, *([encoder.chat.findings] if encoder.chat else [])):
        for what in [what for what, count in counter.items() if not count]:
            del counter[what]
