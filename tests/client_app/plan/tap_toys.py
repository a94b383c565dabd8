"""Steps and constants of the tests of TAP's plans."""

from __future__ import annotations

from fedalloy_adapters.adapter import Adapter
from strategies.framework import steps
from strategies.framework.steps import Draw, Training
from tests.toys.multi_task_toys import ToyClient

W, X = "global", "personal"
LOCAL = Training(local_steps=3, batch_size=4, learning_rate=0.05)
SAME, OTHER = Draw(as_step=1), Draw(as_step=99)


def train(slot: str, training: Training = LOCAL) -> steps.Step:
    other = OTHER if slot == X else None
    return steps.train(training, steps.mixture(slot), [slot], draw=SAME, draw_after_replace=other, record=slot)


def replace(margin: float, tasks: tuple[str, ...], **options: bool) -> steps.Step:
    return steps.replace(X, W, dict.fromkeys(tasks, margin), records=(X, W), **options)


def stage_one(client: ToyClient, margin: float) -> list[steps.Step]:
    return [
        steps.initialise(X, 5),
        steps.evaluate(LOCAL, steps.mixture(X)),
        train(W),
        steps.send(LOCAL, W),
        replace(margin, tuple(client.tasks)),
        train(X),
    ]


def start(client: ToyClient) -> dict[str, Adapter]:
    return {W: client.model.initial(5)}
