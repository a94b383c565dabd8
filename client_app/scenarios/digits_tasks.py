"""Scenario ``digits-tasks``: four of the five tasks of ``digits-multimodal`` at each of eight clients.

With ``task-arrival = "dynamic"`` a client's tasks come one after another, as in FedMosaic (arXiv 2506.11024: four tasks
for each of ten clients). Every task is learnt by six or seven clients, each in an order of its own. All of a client's
tasks are tested from the first round. Sentences, images, sites and the base model are those of ``digits-multimodal``.
"""

from __future__ import annotations

from pathlib import Path

from client_app.data.dataset import Base, ClientData
from client_app.scenarios import digits_multimodal

LEFT_OUT = ("digit", "number", "compare", "caption", "answer", "digit", "number", "compare")
"""The task that each client has not."""
CLIENTS: digits_multimodal.Clients = tuple(
    (tuple(task for task in digits_multimodal.TASKS if task != missing), number % 2)
    for number, missing in enumerate(LEFT_OUT)
)
"""Tasks and site of clients 0 to 7; then again, each time at the other site."""


def load_client(partition_id: int, num_partitions: int, seed: int) -> ClientData:
    """One client's tasks and their splits; see :func:`client_app.scenarios.digits_multimodal.load_client`."""
    return digits_multimodal.load_client(partition_id, num_partitions, seed, CLIENTS)


def load_base(partition_id: int, cache_dir: Path) -> Base:
    """The FLAVA of ``digits-multimodal``, with the groups of the client's own tasks."""
    return digits_multimodal.load_base(partition_id, cache_dir, CLIENTS)
