"""Encodes large splits once, a part at a time, into a file in the client's state directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.dataset import MASK, Dataset
from client_app.data.example import Example
from client_app.data.stored import LABELS, TARGET, StoredDataset, StoredGroups, TokenFile, write_tokens
from client_app.data.targets import IGNORED
from client_app.model.bases.model_folders import FoundModel
from client_app.own.checked import Checked
from client_app.own.encoding import Encoder
from client_app.own.reading.text_files import DataError

IN_MEMORY_TOKENS = 2**20
"""Largest number of tokens of a split in memory, including padding; with mask and targets that is 25 MB."""
PART, PART_TOKENS = 1000, 2**17
"""Largest numbers of examples and of tokens (including padding) that are encoded at once."""
PAIRED = {"input_ids": "pair_ids", MASK: "pair_mask", LABELS: "pair_labels"}
"""Names of the inputs of examples with several texts, by the name that one text's input has."""
_FORMAT = 2
"""The files' format; with another number, all of them are made again."""
_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def encode_split(
    encoder: Encoder, examples: Checked, labels: Sequence[str], model: FoundModel, folder: Path
) -> Dataset:
    """One split: in memory if it is small, else from its file in ``folder``, which is made if missing.

    A file is identified by its content and by its encoder. Rows are read, encoded and written a part at a time. Images
    stay where they are, and inputs that have no number for each token stay in memory.
    """
    if encoder.kind.has_image:
        return encoder.encode(examples, labels)
    size = max(1, min(PART, PART_TOKENS // encoder.max_length))
    few = len(examples) * encoder.max_length <= IN_MEMORY_TOKENS
    first = None if few else _uncounted(encoder, examples[:: -(-len(examples) // size)], labels)
    if first is None or not _is_storable(first) or len(examples) * _width(first) <= IN_MEMORY_TOKENS:
        return encoder.encode(list(examples), labels)
    path = folder / f"{_key(encoder, examples, labels, model)}.arrow"
    file = TokenFile.opened(path)
    if file is None:
        before = _told(encoder)
        file = write_tokens(
            path,
            _encoded(encoder, examples, labels, size, _each(first)),
            lambda: {name: count - before.get(name, 0) for name, count in _told(encoder).items()},
        )
    else:
        _tell(encoder, file.about)
    kind, padding = encoder.kind.name, encoder.padding_id or 0
    if _each(first) == 1:
        own = _targets(file, first.labels) if TARGET in file.columns else None
        return StoredDataset.of(file, kind, own, padding)
    texts = StoredDataset.of(file, kind, padding=padding)
    names = {name: own for name, own in PAIRED.items() if own in first.inputs}
    none = torch.zeros(len(examples), dtype=first.labels.dtype)
    return StoredGroups({}, none, kind, texts=texts, each=_each(first), names=names)


def _encoded(
    encoder: Encoder, examples: Checked, labels: Sequence[str], size: int, each: int
) -> Iterator[dict[str, NDArray[np.int32]]]:
    """Each text's numbers, encoded ``size`` examples at a time."""
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        split = encoder.encode(part, labels)
        if _each(split) != each:
            raise DataError(f"{part[0].place}: {_each(split)} texts, expected {each} as in the first row")
        yield from _rows(split)


def _uncounted(encoder: Encoder, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
    """Encode some examples without changing the encoder's counts."""
    before = _told(encoder)
    found = encoder.encode(examples, labels)
    after = _told(encoder)
    _tell(encoder, {name: before.get(name, 0) - count for name, count in after.items()})
    return found


def _is_storable(split: Dataset) -> bool:
    """Whether all inputs have a number for each token."""
    mask = split.inputs.get(MASK, split.inputs.get(PAIRED[MASK]))
    if mask is None or type(split) is not Dataset:
        return False
    known = MASK in split.inputs or split.inputs.keys() <= set(PAIRED.values())
    return known and all(t.shape == mask.shape and not t.is_floating_point() for t in split.inputs.values())


def _each(split: Dataset) -> int:
    """How many texts an example has."""
    return 1 if MASK in split.inputs else int(split.inputs[PAIRED[MASK]].shape[1])


def _width(split: Dataset) -> int:
    """Tokens of an example, all its texts together, with padding."""
    return _each(split) * int((split.inputs[MASK] if MASK in split.inputs else split.inputs[PAIRED[MASK]]).shape[-1])


def _texts(split: Dataset) -> dict[str, Tensor]:
    """The numbers of each text's tokens by column ``[n, L]``, the texts of an example one after another."""
    if MASK not in split.inputs:
        return {name: split.inputs[own].flatten(0, 1) for name, own in PAIRED.items() if own in split.inputs}
    per_token = split.labels.shape == split.inputs[MASK].shape and not split.labels.is_floating_point()
    return {**split.inputs, **({LABELS: split.labels} if per_token else {})}


def _rows(split: Dataset) -> Iterator[dict[str, NDArray[np.int32]]]:
    """Each text's numbers without padding; the mask, which is all ones, is left out."""
    columns, each = _texts(split), _each(split)
    lengths = columns.pop(MASK).sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        found = {name: tensor[row, :length].to(torch.int32).numpy() for name, tensor in columns.items()}
        yield found if LABELS in found or each > 1 else {**found, TARGET: _bits(split.labels[row])}


def _bits(label: Tensor) -> NDArray[np.int32]:
    """An example's label as 32-bit integers; floating-point numbers keep their bits."""
    flat = label.reshape(-1)
    if flat.is_floating_point():
        return flat.float().view(torch.int32).numpy()
    return flat.to(torch.int32).numpy()


def _targets(file: TokenFile, like: Tensor) -> Tensor:
    """All labels of a file ``[n, ...]``, in the form of ``like``; shorter ones are filled up."""
    found = file.lists(TARGET, IGNORED)
    if like.is_floating_point():
        found = found.to(torch.int32).view(torch.float32).to(like.dtype)
    return found.reshape(len(found), *([-1] if like.dim() > 1 else []), *like.shape[2:])


def _key(encoder: Encoder, examples: Checked, labels: Sequence[str], model: FoundModel) -> str:
    versions = [version(name) for name in ("transformers", "tokenizers")]
    settings = [encoder.kind.name, encoder.max_length, encoder.ask_by_chat, encoder.between, encoder.padding_id]
    digest = hashlib.sha256(repr((_FORMAT, versions, settings, list(labels))).encode())
    for path in sorted(path for pattern in _TOKENIZER_FILES for path in model.folder.glob(pattern)):
        digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    digest.update(examples.digests.tobytes())
    return digest.hexdigest()[:40]


def _told(encoder: Encoder) -> dict[str, int]:
    """An encoder's counts."""
    found = {"truncated": encoder.truncated} | {f"text:{what}": n for what, n in encoder.findings.items()}
    return found | {f"chat:{what}": n for what, n in (encoder.chat.findings if encoder.chat else {}).items()}


def _tell(encoder: Encoder, counts: Mapping[str, Any]) -> None:
    """Add to an encoder's counts."""
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
