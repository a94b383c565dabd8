"""Scenarios ``text-6`` to ``text-12``: the clients and texts of ``instruct-*``, with a small encoder as the base.

Clients have the tasks and texts of :mod:`client_app.scenarios.instruct`, name for name (``text-6-same`` has the texts
of ``instruct-6-same``). Texts are scored as in ``text-8``: all-MiniLM-L6-v2 compares them with descriptions of their
task's labels, so that there are no heads and one adapter serves every task. A step takes a tenth of the language
model's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from client_app.data.dataset import Base, ClientData
from client_app.scenarios.instruct import SETS as INSTRUCT_SETS
from client_app.scenarios.instruct import Clients, own_rows
from client_app.scenarios.texts import TEXT_TASKS, described_client
from client_app.settings import Settings

DESCRIBED: Mapping[str, tuple[str, ...]] = {
    **TEXT_TASKS,
    "sms": ("a normal text message", "an unwanted text message"),
}
"""Descriptions of the labels 0, 1, ... of each task."""
SETS: Mapping[str, Clients] = {name.replace("instruct", "text", 1): found for name, found in INSTRUCT_SETS.items()}


def load_client(clients: Clients, settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """The base model and one client's data.

    Raises:
        ScenarioError: a file is missing or has too few texts, or there is no base model.
    """
    number = settings.partition_id
    rows = own_rows(clients, number, settings.seed, root)
    return described_client(clients.tasks[number], DESCRIBED, rows, settings)
