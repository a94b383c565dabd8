"""Scenario ``digits``: scikit-learn's 1,797 handwritten digits, 8x8 pixels, and a tiny ViT that knows them upright."""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client_app.data import Base, ClientData, Dataset
from client_app.scenarios.vit import Recipe, load_or_pretrain

CLASSES = 10
SPLIT_SEED = 20240501
PUBLIC, TRAIN, VALIDATION = 500, 600, 200
BASE_RECIPE = Recipe(
    name="digits-vit",
    data=f"sklearn digits, permutation seed {SPLIT_SEED}, first {PUBLIC}, upright",
    image_size=8, patch_size=2, classes=CLASSES, width=48, depth=3, heads=4, mlp=96,
    seed=0, steps=400, batch=32, learning_rate=3e-3, weight_decay=0.05,
)
GROUPS = 4
SIZES = (40, 24, 32, 48)


def load_client(partition_id, num_partitions, seed, *, sizes=SIZES, moved=10, groups=None, transforms=(1, 2, 3, 0), meanings=(0, 1, 2, 3)):
    images, labels = _digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    _, train, validation, test = np.split(order, np.cumsum([PUBLIC, TRAIN, VALIDATION]))
    g = groups or min(GROUPS, max(1, num_partitions // 2))
    group = partition_id % g
    train = np.random.default_rng((seed, 1)).permutation(train)
    all_sizes = [sizes[i % len(sizes)] for i in range(num_partitions)]
    scale = min(1.0, len(train) / sum(all_sizes))
    bounds = np.cumsum([0] + [int(s * scale) for s in all_sizes])
    train = train[bounds[partition_id] : bounds[partition_id + 1]]
    meaning = np.arange(CLASSES)
    mv = np.random.default_rng((SPLIT_SEED, meanings[group])).permutation(CLASSES)[:moved]
    meaning[mv] = np.roll(meaning[mv], 1) if moved else mv
    def view(idx):
        x = _transform(images[idx], transforms[group])
        return Dataset({"pixel_values": torch.from_numpy(np.ascontiguousarray(x))[:, None]}, torch.from_numpy(meaning[labels[idx]]))
    return ClientData("digits", "image-classification", {"train": view(train), "validation": view(validation), "test": view(test)})


def _transform(x, t):
    if t == 0:
        return x
    if t == 1:
        return np.rot90(x, 1, axes=(1, 2))
    if t == 2:
        return -x
    return -np.rot90(x, 2, axes=(1, 2))


def load_base(cache_dir: Path) -> Base:
    return load_or_pretrain(BASE_RECIPE, cache_dir, _public)


def _public() -> tuple[Tensor, Tensor]:
    images, labels = _digits()
    public = np.random.default_rng(SPLIT_SEED).permutation(len(images))[:PUBLIC]
    return torch.from_numpy(images[public])[:, None], torch.from_numpy(labels[public])


@cache
def _digits():
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :64].reshape(-1, 8, 8) / 8 - 1, table[:, 64].astype(np.int64)
