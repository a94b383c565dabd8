"""Built-in scenarios: a data set divided among clients that really differ, and the base model that they adapt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command's help has the scenarios' names, and importing torch would delay it
    from client_app.data.dataset import Base, ClientData, Dataset

NAMES = ("digits", "digits-mixed", "digits-multimodal", "digits-tasks")
FROM_FILES = (
    *("cifar100-20", "cifar100-groups", "mixed-arch", "multi-modal", "text-8", "prompt-tasks", "pacs"),
    *("instruct-6", "instruct-6-same", "instruct-6-family", "instruct-6-unrelated", "instruct-6-unequal"),
    *("instruct-12", "text-6", "text-6-same", "text-6-family", "text-6-unrelated", "text-6-unequal", "text-12"),
)
"""Benchmarks with data in a folder that the user names; see ``client_app.scenarios.files``."""


class ScenarioError(ValueError):
    """There is no such scenario, its data are missing, or it cannot be divided among that many clients."""


def load_scenario(
    name: str, partition_id: int, num_partitions: int, seed: int, cache_dir: Path
) -> tuple[Base, ClientData]:
    """A scenario's base model and one client's data.

    Args:
        name: one of :data:`NAMES`.
        partition_id: this client, from 0.
        num_partitions: how many clients there are.
        seed: decides which examples each client holds.
        cache_dir: where the base model is kept once it is made.

    Raises:
        ScenarioError: the name is unknown, or the scenario cannot be divided among that many clients.
    """
    if name not in NAMES:
        raise ScenarioError(f"scenario {name!r} is unknown, expected one of: {', '.join((*NAMES, *FROM_FILES))}")
    from client_app.scenarios import digits, digits_mixed

    if name in ("digits-multimodal", "digits-tasks"):
        from client_app.scenarios import digits_multimodal, digits_tasks

        several = digits_tasks if name == "digits-tasks" else digits_multimodal
        data = several.load_client(partition_id, num_partitions, seed)
        return several.load_base(partition_id, cache_dir), data
    if name == "digits-mixed":
        data = digits_mixed.load_client(partition_id, num_partitions, seed)
        return digits_mixed.load_base(partition_id, num_partitions, cache_dir), data
    return digits.load_base(cache_dir), digits.load_client(partition_id, num_partitions, seed)


def bases_to_align(name: str, cache_dir: Path, folder: str = "") -> tuple[list[Base], Dataset]:
    """The base models of a scenario with several architectures, the pivot first, and public data to align them on.

    Args:
        name: the scenario's name.
        cache_dir: where base models are kept once they are made.
        folder: the data of scenarios that read files.

    Raises:
        ScenarioError: the scenario has one architecture, or its name is unknown.
    """
    from client_app.scenarios import digits_mixed

    if name == "mixed-arch":
        from client_app.scenarios import cifar, files

        return cifar.mixed_bases_to_align(files.data_root(name, folder), cache_dir)
    if name != "digits-mixed":
        raise ScenarioError(f"scenario {name!r} has nothing to align, expected one of: digits-mixed, mixed-arch")
    return digits_mixed.bases_to_align(cache_dir)
