"""Several texts in one row that do not see each other: no arithmetic for padding.

Every text keeps its own positions from 0. If a model of transformers gets position ids and no mask, it starts a new
text at each 0 (``create_causal_mask``; FlashAttention's ranges of lengths). :func:`reason_against` tries whether a
model does, and does not guess.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from client_app.data.dataset import MASK, Dataset
from client_app.data.targets import IGNORED

POSITIONS = "position_ids"
_PROBE = 48
"""The most tokens of a text that is tried."""


def packed(batch: Dataset) -> Dataset:
    """A batch of texts in as few rows as their longest allows, ``[r, L]``; the targets are the same.

    Texts are put where they leave the least room, the longest first. The rest of a row is one more text, without
    targets. No token predicts a text's first token.
    """
    lengths = batch.inputs[MASK].sum(dim=1).tolist()
    rows = rows_of(lengths)
    width = max(lengths)
    ids = batch.inputs["input_ids"].new_zeros(len(rows), width)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for number, members in enumerate(rows):
        at = 0
        for member in members:
            length = lengths[member]
            ids[number, at : at + length] = batch.inputs["input_ids"][member, :length]
            positions[number, at : at + length] = torch.arange(length)
            labels[number, at + 1 : at + length] = batch.labels[member, 1:length]
            at += length
        positions[number, at:] = torch.arange(width - at)
    return Dataset({"input_ids": ids, POSITIONS: positions}, labels, batch.kind, batch.task)


def rows_of(lengths: list[int]) -> list[list[int]]:
    """Which texts share a row that is as long as the longest: best fit, the longest first."""
    width = max(lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[text]]
        if fitting:
            row = min(fitting, key=lambda number: (room[number], number))
            rows[row].append(text)
            room[row] -= lengths[text]
        else:
            rows.append([text])
            room.append(width - lengths[text])
    return rows


def reason_against(module: nn.Module, losses_of: Callable[[Dataset], Tensor], texts: Dataset, tolerance: float) -> str:
    """Why this model cannot have packed texts; empty if it can, because losses are the same as without packing.

    Args:
        module: the base model.
        losses_of: losses at the targets of a batch ``[n]``.
        texts: a few of the training texts.
        tolerance: largest difference of losses that rounding explains, as a share of the largest.
    """
    if POSITIONS not in inspect.signature(module.forward).parameters:
        return "the model takes no position ids"
    if set(texts.inputs) - {"input_ids", MASK}:
        return "its texts have more than tokens"
    columns = torch.arange(texts.inputs[MASK].shape[1])
    end = texts.inputs[MASK].sum(dim=1)[:, None]
    both = columns < end.clamp_max(_PROBE)  # the first tokens of two texts, one after the other, all of them targets
    ids = torch.where(both, texts.inputs["input_ids"], 0)
    labels = torch.where(both, texts.inputs["input_ids"], IGNORED)
    plain = Dataset({"input_ids": ids, MASK: both.long()}, labels, texts.kind).trimmed()
    lengths = plain.inputs[MASK].sum(dim=1)
    in_one = _behind_each_other(plain, lengths.tolist())
    with torch.no_grad():
        try:
            apart, together = losses_of(plain), losses_of(in_one)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"the model refuses packed texts: {error}"
    if apart.shape != together.shape:
        return "the model has other targets in packed texts"
    difference = float((apart - together).abs().max())
    if not difference <= tolerance * max(1.0, float(apart.abs().max())):
        return f"the model does not keep packed texts apart: losses differ by {difference:.1e}"
    return ""


def _behind_each_other(texts: Dataset, lengths: list[int]) -> Dataset:
    ids = torch.cat([row[:length] for row, length in zip(texts.inputs["input_ids"], lengths, strict=True)])
    labels = [row[:length].clone() for row, length in zip(texts.labels, lengths, strict=True)]
    for row in labels:
        row[0] = IGNORED
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Dataset({"input_ids": ids[None], POSITIONS: positions[None]}, torch.cat(labels)[None], texts.kind)
