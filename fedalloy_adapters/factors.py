"""Which part of a module's update a tensor is, and its number on the wire."""

from __future__ import annotations

import enum

from proto.fedalloy.v1 import adapter_pb2


class LayoutError(ValueError):
    """A layout is not valid, or is not the expected one."""


class Factor(enum.StrEnum):
    """Which part of a module's update a tensor is.

    ``A`` and ``B`` are LoRA factors, ``P`` and ``Q`` what Co-LoRA puts between them: ``x -> s (x A^T P + Q) B^T``.
    ``WEIGHT`` and ``BIAS`` are differences from the base model's own parameter, so that zero means "as the base model",
    and a mixture is a plain sum. ``GATE``, ``GRADIENT`` and ``GRAM`` are no part of an update: a mixture's learned
    coefficients, a sketch, and second moments of inputs.
    """

    A = "A"
    B = "B"
    WEIGHT = "weight"
    BIAS = "bias"
    P = "P"
    Q = "Q"
    GATE = "gate"
    GRADIENT = "gradient"
    GRAM = "gram"

    @property
    def is_lora(self) -> bool:
        """Whether this is a factor of a low-rank update."""
        return self in (Factor.A, Factor.B, Factor.P, Factor.Q)

    @property
    def is_update(self) -> bool:
        """Whether this changes the model and has a name in PEFT."""
        return self not in (Factor.GATE, Factor.GRADIENT, Factor.GRAM)


_TO_PROTO = {
    Factor.A: adapter_pb2.FACTOR_A,
    Factor.B: adapter_pb2.FACTOR_B,
    Factor.WEIGHT: adapter_pb2.FACTOR_WEIGHT,
    Factor.BIAS: adapter_pb2.FACTOR_BIAS,
    Factor.P: adapter_pb2.FACTOR_P,
    Factor.Q: adapter_pb2.FACTOR_Q,
    Factor.GATE: adapter_pb2.FACTOR_GATE,
    Factor.GRADIENT: adapter_pb2.FACTOR_GRADIENT,
    Factor.GRAM: adapter_pb2.FACTOR_GRAM,
}
_FROM_PROTO = {number: factor for factor, number in _TO_PROTO.items()}


def factor_to_proto(factor: Factor) -> adapter_pb2.Factor:
    """The wire's number for a factor."""
    return _TO_PROTO[factor]


def factor_from_proto(number: int) -> Factor:
    """The factor for a wire number.

    Raises:
        LayoutError: the number is not a known factor.
    """
    try:
        return _FROM_PROTO[number]  # type: ignore[index]  # a number from the network is an int, not an enum member
    except KeyError:
        raise LayoutError(f"unknown factor number {number}, expected one of {sorted(_FROM_PROTO)}") from None
