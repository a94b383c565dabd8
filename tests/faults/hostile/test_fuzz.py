"""Seconds of what ``tests/fuzz`` does for minutes: seeded mutations of honest adapters, plans and reports."""

from __future__ import annotations

import base64
import random

import pytest

from proto.fedalloy.v1 import plan_pb2
from tests.faults.killing import LONG
from tests.fuzz.targets import TARGETS, seeds

TRIES = 20_000 if LONG else 600


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, removed, doubled or moved, anywhere."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        place = chance.randrange(len(found) + 1) if chance.random() < 0.5 else chance.randrange(min(64, len(found)) + 1)
        length = chance.choice((1, 1, 2, 4, 16))
        match chance.randrange(5):
            case 0:
                found[place : place + length] = chance.randbytes(length)
            case 1:
                del found[place : place + length]
            case 2:
                found[place:place] = found[chance.randrange(len(found) + 1) :][:length]
            case 3:
                found[place : place + 1] = bytes([chance.choice((0, 1, 127, 128, 255))])
            case 4:
                del found[place:]
    return bytes(found)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_are_refused_or_understood(name: str) -> None:
    chance = random.Random(f"fuzz {name}")
    honest = seeds()[name]
    for data in honest:
        TARGETS[name](data)
    for _ in range(TRIES):
        TARGETS[name](mutated(chance.choice(honest), chance))


def test_the_plans_that_are_mutated_have_every_kind_of_step() -> None:
    known = {field.name for field in plan_pb2.Step.DESCRIPTOR.fields}
    plans = [plan_pb2.Plan.FromString(data) for data in seeds()["plan"]]
    assert {step.WhichOneof("kind") for plan in plans for step in plan.steps} == known


FOUND = {
    # A finite weight (about 5e159) with which the product of the two factors is not.
    "plan": "CAESA3J1bhoGYmVybGluIAEyMiowCi4KEQoGZ2xvYmFsEQAAAAAAAPA/ChAKBWxvY2FsEQAAAAAAAPA/ojEGc2hhcmVzMjQaMgoFbG9j"
    "YWwSJQoRCgZnbG9iYWwRAAAAAAAA4D8KEAoFbG9jYWwRAAAAAAAA4GAYASAC",
}
"""What the fuzzer has found, in base64."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_before(name: str) -> None:
    TARGETS[name](base64.b64decode(FOUND[name]))
