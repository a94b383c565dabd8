"""Numbers in eight, four or two bits: blocks of consecutive numbers, one scale each; ``proto/README.md`` section 3.2.

A block's values are ``scale x level``. Eight bits have the levels -127 to 127, four bits -7 to 7, two bits -3, -1, 1
and 3. With four and two bits the scale is the one with the smallest squared error that a short search finds. With eight
it is the largest number's, rounded up, so that every number is at most about half a step off. Scales are bfloat16: a
binary16 could neither hold those of small numbers (four bits: below 4e-7) nor those of large ones (above 4e5). Eight
significant bits are enough, because levels are chosen for the scale as it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Count of numbers that share a scale. tests/benchmarks/encodings.py compares block sizes."""
_ROUNDS = 2
"""Least-squares steps that follow each first guess of a scale."""


@dataclass(frozen=True)
class BlockFormat:
    """A number of bits and the levels they stand for: level = ``step`` x code + ``first``."""

    bits: int
    first: int
    step: int
    guesses: tuple[float, ...]
    """First guesses of a block's scale, in units of its largest number / the highest level. None: no search."""

    @property
    def highest(self) -> int:
        """The largest level; the smallest is its negative."""
        return -self.first

    def size(self, count: int) -> int:
        """Bytes of one entry of ``count`` numbers: scales, then codes."""
        return 2 * -(-count // BLOCK) + -(-count * self.bits // 8)


EIGHT_BITS = BlockFormat(bits=8, first=-127, step=1, guesses=())
FOUR_BITS = BlockFormat(bits=4, first=-7, step=1, guesses=(1.0, 0.85, 0.7, 0.55, 0.4))
TWO_BITS = BlockFormat(bits=2, first=-3, step=2, guesses=(1.0, 0.75, 0.55, 0.4, 0.25))


def pack_blocks(numbers: Tensor, kind: BlockFormat) -> bytes:
    """Scales and codes of one entry's numbers ``[n]`` (float32, finite)."""
    blocks = _blocks(numbers)
    scales, levels = _fit(blocks, kind)
    codes = ((levels - kind.first) / kind.step).to(torch.uint8).view(-1)[: len(numbers)].numpy()
    per_byte = 8 // kind.bits
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, np.uint8)
    padded[: len(codes)] = codes
    packed = np.zeros(len(padded) // per_byte, np.uint8)
    for position in range(per_byte):
        packed |= padded[position::per_byte] << (kind.bits * position)
    return scales.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False).tobytes() + packed.tobytes()


def unpack_blocks(payload: bytes | memoryview, offset: int, count: int, kind: BlockFormat) -> Tensor:
    """The ``count`` numbers of the entry whose scales start at ``offset``, float32 ``[count]``."""
    number_of_blocks = -(-count // BLOCK)
    bits = torch.from_numpy(np.frombuffer(payload, "<i2", count=number_of_blocks, offset=offset).astype(np.int16))
    scales = bits.view(torch.bfloat16).to(torch.float32)
    per_byte = 8 // kind.bits
    packed = np.frombuffer(payload, np.uint8, count=-(-count // per_byte), offset=offset + 2 * number_of_blocks)
    codes = np.empty(number_of_blocks * BLOCK, np.uint8)
    mask = (1 << kind.bits) - 1
    whole = np.stack([(packed >> (kind.bits * position)) & mask for position in range(per_byte)], axis=1).reshape(-1)
    codes[:count], codes[count:] = whole[:count], 0
    levels = torch.from_numpy(codes).to(torch.float32) * kind.step + kind.first
    values = scales[:, None] * levels.view(number_of_blocks, BLOCK)
    return torch.where(scales[:, None] == 0, 0.0, values).view(-1)[:count]


def _blocks(numbers: Tensor) -> Tensor:
    """``[n]`` as ``[ceil(n / BLOCK), BLOCK]``. The last block is filled up with NaN, which the sums below ignore."""
    padded = torch.full((-(-len(numbers) // BLOCK) * BLOCK,), torch.nan)
    padded[: len(numbers)] = numbers
    return padded.view(-1, BLOCK)


def _fit(blocks: Tensor, kind: BlockFormat) -> tuple[Tensor, Tensor]:
    """Scales ``[k]`` that bfloat16 holds exactly, and levels ``[k, BLOCK]``."""
    there = ~blocks.isnan()
    blocks = torch.where(there, blocks, 0.0)
    largest = blocks.abs().amax(dim=1)
    if not kind.guesses:
        scale = _stored_above(largest / kind.highest)
        return scale, torch.where(scale[:, None] > 0, _levels(blocks, scale, kind), kind.first)
    # In units of the block's largest number: squares of very small or large numbers leave the range of binary32.
    unit = torch.where(largest > 0, largest, 1.0)
    blocks = blocks / unit[:, None]
    best_error = torch.full_like(largest, torch.inf)
    best = torch.zeros_like(largest)
    for guess in kind.guesses:
        scale = _stored(unit * (guess / kind.highest)) / unit
        for _ in range(_ROUNDS):
            levels = _levels(blocks, scale, kind) * there
            weight = levels.square().sum(dim=1)
            ideal = (blocks * levels).sum(dim=1) / torch.where(weight > 0, weight, 1.0)
            # A scale of above 1 / highest would go beyond the largest number, which binary32 may not hold.
            ideal = torch.where(weight > 0, ideal, scale).clamp(max=1 / kind.highest)
            scale = _stored(ideal * unit) / unit
        error = (blocks - scale[:, None] * _levels(blocks, scale, kind) * there).square().sum(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    best = torch.where(largest > 0, best, 0.0)
    return best * unit, torch.where(best[:, None] > 0, _levels(blocks, best, kind), kind.first)


def _levels(blocks: Tensor, scale: Tensor, kind: BlockFormat) -> Tensor:
    """The nearest level of each number."""
    steps = torch.where(scale > 0, scale, 1.0)[:, None]
    codes = ((blocks / steps - kind.first) / kind.step).round()
    return codes.clamp(0, 2 * kind.highest // kind.step) * kind.step + kind.first


def _stored_above(scale: Tensor) -> Tensor:
    """The smallest scale that can be stored and is not below this one: no block needs a level beyond the highest."""
    bits = scale.view(torch.int32)  # a bfloat16 is the upper half of a binary32
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _stored(scale: Tensor) -> Tensor:
    """The scale as a receiver will read it."""
    return scale.to(torch.bfloat16).to(torch.float32)
