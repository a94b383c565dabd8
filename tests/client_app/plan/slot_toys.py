"""What a client's slots hold, to compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.plan.slots import SlotStore
from tests.client_app.slot_worker import (
    State,
    changes,
    store_in,
)

Snapshot = dict[str, tuple[bytes, bytes | None]]
"""Digests of a slot's adapter and of its residual."""


class Abort(Exception):
    """Leaves a transaction without a commit."""


def snapshot(state: State) -> Snapshot:
    return {
        slot: (adapter.digest, residual.digest if residual else None) for slot, (adapter, residual) in state.items()
    }


def start_of(directory: Path, round_: int, keep: int = 1) -> Snapshot:
    """The slots that the plan of a round would find; the store stays as it is."""
    seen: Snapshot = {}

    def look(slots: SlotStore) -> None:
        for slot in slots.names():
            residual = slots.residual(slot)
            seen[slot] = (slots[slot].digest, residual.digest if residual else None)
        raise Abort

    with pytest.raises(Abort), store_in(directory, keep).transaction(round_) as slots:
        look(slots)
    return seen


def after(*rounds: int, salt: int = 0) -> Snapshot:
    """The slots after these rounds, by the rule of the worker's plans."""
    state: State = {}
    for round_ in rounds:
        state |= changes(round_, salt)
    return snapshot(state)
