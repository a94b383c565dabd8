"""Scenario ``digits``: scikit-learn's handwritten digits, seen by groups of clients in different ways.

1,797 images of 8x8 pixels are divided once and for all into a public part, on which only the base model is pre-trained
(upright, with the usual labels), and pools for training, validation and test. No image is in two of them.

Clients come in groups. A group sees every image through its own transform (upright, rotated, inverted) and labels half
of the digits with codes of its own, as two warehouses number their goods differently. Clients of a group can help each
other; what one group learns about its codes is wrong in another. Training shards are disjoint, of unequal size, and too
small to do well alone. Validation and test pools are shared: each client sees all of them in its own group's way, so
that clients' accuracies are compared on the same few hundred images.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.scenarios import ScenarioError
from client_app.scenarios.vit import Recipe, load_or_pretrain

CLASSES = 10
POOLS = {"public": 500, "train": 700, "validation": 150, "test": 447}
POOL_SEED = 1797
SHARD_SIZES = (90, 50, 70, 110, 60)
"""Training examples of clients 0, 1, 2, ..., again from the start after the last; fewer if the pool is too small.
The number of sizes has no common factor with the numbers of groups, so every group has clients of all sizes."""
MAX_CLIENTS = 200
"""With this many clients, each has 2 to 5 images: enough to load a server, not to compare strategies."""

BASE_RECIPE = Recipe(
    name="digits-vit",
    data=f"sklearn digits, scaled to [-1, 1], pool 'public' of {POOLS} by NumPy's default_rng({POOL_SEED})",
    image_size=8,
    patch_size=2,
    classes=CLASSES,
    width=48,
    depth=3,
    heads=4,
    mlp=96,
    seed=0,
    steps=400,
    batch=32,
    learning_rate=3e-3,
    weight_decay=0.05,
    initializer_range=0.12,
)


@dataclass(frozen=True)
class Group:
    """What clients of one group have in common.

    Images are turned counter-clockwise by ``quarter_turns`` x 90 degrees, and black and white are exchanged if
    ``inverted``; digit ``k`` is labelled ``codes[k]``.
    """

    name: str
    quarter_turns: int
    inverted: bool
    codes: tuple[int, ...]


GROUPS = (
    Group("upright", 0, False, (1, 2, 3, 4, 0, 5, 6, 7, 8, 9)),
    Group("rotated", 1, False, (0, 1, 2, 3, 4, 6, 7, 8, 9, 5)),
    Group("inverted", 0, True, (2, 1, 4, 3, 6, 5, 8, 7, 0, 9)),
    Group("upright-other-codes", 0, False, (0, 9, 2, 1, 4, 3, 6, 5, 8, 7)),
)


def group_of(partition_id: int, num_partitions: int, groups: tuple[Group, ...] = GROUPS) -> Group:
    """The group of a client: groups take turns, and there are as many groups (2 to 4) as can have two members each."""
    return groups[partition_id % group_count(num_partitions)]


def group_count(num_partitions: int) -> int:
    """The number of groups for this number of clients."""
    return min(len(GROUPS), max(2, num_partitions // 2))


def load_client(partition_id: int, num_partitions: int, seed: int, groups: tuple[Group, ...] = GROUPS) -> ClientData:
    """One client's splits; inputs are ``pixel_values`` ``[n, 1, 8, 8]`` in [-1, 1].

    Args:
        partition_id: this client, from 0.
        num_partitions: how many clients there are, at most :data:`MAX_CLIENTS`.
        seed: decides which images of the training pool each client holds.
        groups: four of them, or those of this scenario.

    Raises:
        ScenarioError: there is no such client, or there are too many.
    """
    if not 1 <= num_partitions <= MAX_CLIENTS:
        raise ScenarioError(
            f"scenario 'digits' is for 1 to {MAX_CLIENTS} clients, got num-partitions = {num_partitions}"
        )
    if not 0 <= partition_id < num_partitions:
        raise ScenarioError(f"partition-id = {partition_id}, expected 0 to {num_partitions - 1}")
    found = pools()
    group = group_of(partition_id, num_partitions, groups)
    chosen = found | {"train": _shards(found["train"], num_partitions, seed)[partition_id]}
    splits = {name: view(chosen[name], group) for name in ("train", "validation", "test")}
    return ClientData(task="digits", kind="image-classification", splits=splits)


def load_base(cache_dir: Path) -> Base:
    """The base model: pre-trained in a few seconds on first use, then read from ``cache_dir``."""
    return load_or_pretrain(BASE_RECIPE, cache_dir, public)


def base_fingerprint() -> str:
    """The base model's fingerprint for the server, without making or loading the model."""
    return BASE_RECIPE.fingerprint


def public() -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` that no client holds, and their digits ``[n]``."""
    images, labels = _read()
    chosen = pools()["public"]
    return torch.from_numpy(images[chosen])[:, None], torch.from_numpy(labels[chosen])


def pools() -> dict[str, NDArray[np.int64]]:
    """Image numbers by pool; the same for every seed; otherwise a run would be tested on what another base had seen."""
    order = np.random.default_rng(POOL_SEED).permutation(sum(POOLS.values()))
    bounds = np.cumsum(list(POOLS.values()))[:-1]
    return dict(zip(POOLS, np.split(order, bounds), strict=True))


def _shards(pool: NDArray[np.int64], clients: int, seed: int) -> list[NDArray[np.int64]]:
    wanted = np.array([SHARD_SIZES[client % len(SHARD_SIZES)] for client in range(clients)])
    sizes = np.floor(wanted * min(1.0, len(pool) / wanted.sum())).astype(int)
    order = np.random.default_rng((POOL_SEED, seed)).permutation(pool)
    return np.split(order, np.cumsum(sizes))[:clients]


def view(chosen: NDArray[np.int64], group: Group) -> Dataset:
    """The images with these numbers as a group sees them, and its codes for their digits."""
    images, labels = _read()
    seen = np.rot90(images[chosen], group.quarter_turns, axes=(1, 2))
    seen = np.ascontiguousarray(-seen if group.inverted else seen)
    codes = np.array(group.codes)[labels[chosen]]
    return Dataset({"pixel_values": torch.from_numpy(seen)[:, None]}, torch.from_numpy(codes))


@cache
def _read() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images ``[1797, 8, 8]`` in [-1, 1] and digits ``[1797]``, from scikit-learn's own file.

    Importing ``sklearn.datasets`` costs a second, which every client would pay for every message.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ScenarioError("scenario 'digits' needs scikit-learn, which contains the data: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    if table.shape != (sum(POOLS.values()), 65):
        raise ScenarioError(f"{path} has shape {table.shape}, expected {(sum(POOLS.values()), 65)}")
    images: NDArray[np.float32] = table[:, :64].reshape(-1, 8, 8) / np.float32(8) - np.float32(1)
    return images, table[:, 64].astype(np.int64)
