"""Processes that carry out transactions until they are killed; run as a module by ``test_slots.py``.

Reads one JSON object a line, forks a child for each (PyTorch is imported once), prints the child's pid, and when it has
ended its wait status. ``kill_at = n`` makes the child kill itself with SIGKILL just before its n-th operation on the
file system (counted by an audit hook), so that every moment of a commit can be visited, not only those that chance
finds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from client_app.plan.slots import SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout

LAYOUT = Layout(
    (
        Entry("q_proj", Factor.A, (2, 4)),
        Entry("q_proj", Factor.B, (3, 2)),
        Entry("classifier", Factor.WEIGHT, (2, 3)),
        Entry("classifier", Factor.BIAS, (2,)),
    ),
    {"q_proj": 2.0},
    "base",
)
PART = LAYOUT.select([Factor.B])
HEADS = {"classifier.weight": torch.full((2, 3), 0.5), "classifier.bias": torch.tensor([0.25, -1.0])}
OPERATIONS = {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir"}

State = dict[str, tuple[Adapter, Adapter | None]]
"""Slots with their residuals."""


def store_in(directory: Path, keep: int = 1) -> SlotStore:
    return SlotStore(directory, "toy", lambda: HEADS, keep)


def numbers(layout: Layout, *seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(hash(seed) & 0xFFFFFFFF)
    return Adapter(layout, torch.randn(layout.size, generator=generator))


def personal(round_: int, salt: int = 0) -> Adapter:
    return numbers(LAYOUT, 3, round_, salt)


def changes(round_: int, salt: int = 0) -> State:
    """What the plan of a round writes: one slot always, one sometimes, new ones now and then."""
    written: State = {"global": (numbers(LAYOUT, 0, round_, salt), numbers(PART, 1, round_, salt))}
    if round_ % 3 == 1:
        written["local"] = (numbers(LAYOUT, 2, round_, salt), None)
    if round_ % 4 == 0:
        written[f"extra-{round_}"] = (numbers(LAYOUT, 4, round_, salt), None)
    return written


def carry_out(store: SlotStore, round_: int, salt: int = 0) -> None:
    with store.transaction(round_) as slots:
        for slot, (adapter, residual) in changes(round_, salt).items():
            slots[slot] = adapter
            if residual is not None:
                slots.set_residual(slot, residual)
        slots.save_personal(personal(round_, salt))


def _child(task: dict[str, Any]) -> None:
    directory = Path(task["directory"])
    if task["kill_at"]:
        left = task["kill_at"]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in OPERATIONS:  # rmtree names files relative to their folder, so all of them count
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    store = store_in(directory)
    for round_ in range(task["first"], task["first"] + task["count"]):
        carry_out(store, round_, task["salt"])
        with open(task["progress"], "a") as progress:
            progress.write(f"{round_}\n")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                _child(task)
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
