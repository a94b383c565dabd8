"""Benchmark scenarios with real data, read from a folder that the user names (``data-root``).

The folder has ``text/<task>.jsonl.gz``, ``gen/<set>.jsonl.gz``, ``vision/<set>.npz`` and ``models/<base>/``. The first
line of a text file is ``{"meta": name, "labels": [...]}``, the others are ``{"s": split, "x": text, "y": number}``;
lines of the ``gen`` file have prompt, completion and task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from client_app.data.dataset import Base, ClientData
from client_app.scenarios import ScenarioError, cifar, described, instruct, multi_modal, texts
from client_app.settings import Settings

PACS_TRAIN, PACS_TEST = 100, 300


@dataclass(frozen=True)
class Scenario:
    """The function that reads one client's base model and data, and the number of clients with data."""

    load: Callable[[Settings, Path], tuple[Base, ClientData]]
    clients: int


def load_files(name: str, settings: Settings) -> tuple[Base, ClientData]:
    """The base model and one client's data.

    Raises:
        ScenarioError: ``data-root`` is not set, lacks a file, or there are more clients than the scenario has.
    """
    root = data_root(name, settings.data.data_root)
    scenario = SCENARIOS[name]
    if settings.num_partitions > scenario.clients:
        raise ScenarioError(
            f"scenario {name!r} is for at most {scenario.clients} clients, "
            f"got num-partitions = {settings.num_partitions}"
        )
    return scenario.load(settings, root)


def data_root(name: str, folder: str) -> Path:
    """The folder of a scenario's data.

    Raises:
        ScenarioError: no folder is named.
    """
    if not folder:
        raise ScenarioError(f"scenario {name!r} reads its data from a folder; set data-root (--data)")
    return Path(folder).expanduser()


def _pacs(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """Each client has one of four domains (art, cartoon, photo, sketch) of the same seven classes, at 32 x 32."""
    found = cifar.read_arrays(root / "vision" / "pacs48.npz")
    labels = tuple(str(name) for name in found["names"])
    domains = len(found["domains"])
    own = np.flatnonzero(found["domain"] == settings.partition_id % domains)
    order = np.random.default_rng(settings.partition_id % domains).permutation(own)
    test, rest = order[:PACS_TEST], order[PACS_TEST:]
    rest = np.random.default_rng((settings.seed, settings.partition_id % domains)).permutation(rest)
    start = 2 * PACS_TRAIN * (settings.partition_id // domains)  # each client of a domain has images of its own
    chosen = {
        "train": rest[start : start + PACS_TRAIN],
        "validation": rest[start + PACS_TRAIN : start + 2 * PACS_TRAIN],
        "test": test,
    }
    splits = {name: cifar.as_images(found["x"][part], found["y"][part].tolist(), 32) for name, part in chosen.items()}
    base = cifar.vision_base(settings, root, labels)
    return base, ClientData("pacs", "image-classification", splits, metrics=("f1",))


SCENARIOS: Mapping[str, Scenario] = {
    "cifar100-20": Scenario(cifar.load_dirichlet, cifar.SHARDS),
    "cifar100-groups": Scenario(cifar.load_groups, len(cifar.GROUP_OF)),
    "mixed-arch": Scenario(cifar.load_mixed, cifar.MIXED_CLIENTS),
    "multi-modal": Scenario(multi_modal.load_client, len(multi_modal.CLIENTS)),
    "text-8": Scenario(texts.load_text_task, len(texts.TEXT_TASKS)),
    "prompt-tasks": Scenario(texts.load_prompts, texts.PROMPT_TASKS),
    "pacs": Scenario(_pacs, 20),
    **{
        name: Scenario(partial(instruct.load_client, clients), len(clients.tasks))
        for name, clients in instruct.SETS.items()
    },
    **{
        name: Scenario(partial(described.load_client, clients), len(clients.tasks))
        for name, clients in described.SETS.items()
    },
}
