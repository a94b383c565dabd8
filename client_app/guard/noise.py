"""Noise that only the client can make again, from a secret in its state directory.

A server knows seeds, plans and names, and could subtract noise that is drawn from them. A plan that is repeated after a
crash has the same noise; otherwise two answers would reveal more than one. Any other plan has other noise.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fedalloy_adapters.files.atomic_files import locked, private_folder, write_durably
from proto.fedalloy.v1 import plan_pb2

SECRET_BYTES = 32
Noise = Callable[[torch.Size], Tensor]


class SecretError(ValueError):
    """The client's secret is damaged."""


def secret_of(state_dir: Path, client_id: str) -> bytes:
    """A client's secret, made on first use: ``<state-dir>/secrets/<client-id>``.

    Raises:
        SecretError: the file holds something else.
    """
    path = private_folder(state_dir / "secrets") / client_id
    with locked(path.with_name(f".{client_id}.lock")):
        if not path.exists():
            write_durably(path, secrets.token_bytes(SECRET_BYTES))
        found = path.read_bytes()
    if len(found) != SECRET_BYTES:
        raise SecretError(f"{path} has {len(found)} bytes, expected {SECRET_BYTES}; remove it for a new one")
    return found


def keep_secret(state_dir: Path, client_id: str, words: bytes) -> None:
    """Store a secret made of ``words``, unless the client has one; for an owner who needs the same noise elsewhere."""
    path = state_dir / "secrets" / client_id
    if not path.exists():
        write_durably(path, hashlib.sha256(words + client_id.encode()).digest())


def noise_key(secret: bytes, plan: plan_pb2.Plan, index: int) -> bytes:
    """The key of one step's noise: different for every plan and step, and the same when a plan is repeated."""
    asked = plan_pb2.Plan()
    asked.CopyFrom(plan)
    asked.ClearField("run_key")  # a run that is repeated draws a new one
    said = asked.SerializeToString(deterministic=True)
    return hmac.digest(secret, index.to_bytes(4, "little") + said, "sha256")


def uniform(key: bytes) -> Callable[[int], Tensor]:
    """Numbers inside (0, 1), float64, new ones with every call.

    They are from SHAKE-256, because torch's generator has 2^32 seeds.
    """
    calls = 0

    def draw(count: int) -> Tensor:
        nonlocal calls
        calls += 1
        stream = hashlib.shake_256(key + calls.to_bytes(4, "little")).digest(8 * count)
        bits = torch.frombuffer(bytearray(stream), dtype=torch.int64) >> 11 if count else torch.empty(0)
        return (bits.double() + 0.5) * 2.0**-53 + 0.5  # of 53 signed bits

    return draw


def gaussian(scale: float, key: bytes) -> Noise:
    """Normal noise, new numbers with every call."""
    numbers = uniform(key)

    def draw(shape: torch.Size) -> Tensor:
        normal: Tensor = torch.special.ndtri(numbers(math.prod(shape)))
        return (scale * normal).float().reshape(shape)

    return draw
