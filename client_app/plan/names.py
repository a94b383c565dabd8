"""The names of slots and records that a plan uses, checked before anything else is done with it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from proto.fedalloy.v1 import plan_pb2

SLOT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_REQUIRED = ("slot", "target", "first", "second", "source", "shares")
_OPTIONAL = ("keep_first", "keep_second", "copy_of", "record", "target_record", "source_record")


class PlanError(ValueError):
    """A plan cannot be carried out: an unknown step, a missing slot, or parts that do not fit.

    Args:
        words: the message; the server gets it, so it is about the plan and slots' names only.
        told: what the server gets instead, if the message says more than that.
    """

    def __init__(self, words: str, told: str | None = None) -> None:
        super().__init__(words)
        self.told = words if told is None else told


def require_slot_names(plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> None:
    """Check slot names, which become names of folders and of PEFT adapters: no dots, nothing that leaves the folder.

    Raises:
        PlanError: a name is not valid.
    """
    named = set(blobs)
    bodies = [getattr(step, step.WhichOneof("kind") or "initialise") for step in plan.steps]
    bodies += [body.train for body in bodies if isinstance(body, plan_pb2.DistillStep)]
    for body in bodies:
        named |= {getattr(body, field) for field in _REQUIRED if hasattr(body, field)}
        named |= {name for name in (getattr(body, field, "") for field in _OPTIONAL) if name}
        named |= set(getattr(body, "slots", ()))
        for mixture in (getattr(body, field) for field in ("mixture", "teacher") if hasattr(body, field)):
            named |= {term.slot for term in mixture.terms} | ({mixture.shares, mixture.likeness} - {""})
            named |= {term.precision for term in mixture.terms if term.WhichOneof("coefficient") == "precision"}
            named |= {term.gate.slot for term in mixture.terms if term.HasField("gate")}
        if hasattr(body, "proximal") and body.HasField("proximal"):
            named.add(body.proximal.slot)
    if any(step.WhichOneof("kind") is None for step in plan.steps):
        named.discard("")
    for name in sorted(named):
        if not SLOT_NAME.fullmatch(name):
            raise PlanError(f"slot name {name[:80]!r}: expected 1 to 64 letters, digits, '_' or '-'")
