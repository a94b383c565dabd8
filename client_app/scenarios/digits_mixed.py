"""Scenario ``digits-mixed``: the clients of ``digits``, with two architectures of base models.

A ViT 4 layers deep and 96 wide, and one 6 layers deep and 128 wide, are pre-trained on the same public images. Half of
each group's clients have one, half the other, so that of eight clients no two share both task and architecture: merging
within an architecture merges only strangers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.scenarios import digits
from client_app.scenarios.vit import ALL_MODULES, Recipe, load_or_pretrain

SMALL = replace(digits.BASE_RECIPE, name="digits-vit-96x4", width=96, depth=4, mlp=192, learning_rate=2e-3)
LARGE = replace(digits.BASE_RECIPE, name="digits-vit-128x6", width=128, depth=6, mlp=256, learning_rate=1e-3)


USUAL = tuple(range(digits.CLASSES))
GROUPS = (
    digits.Group("upright", 0, False, USUAL),
    digits.Group("rotated", 1, False, USUAL),
    digits.Group("inverted", 0, True, USUAL),
    digits.Group("upside-down-inverted", 2, True, USUAL),
)


def load_client(partition_id: int, num_partitions: int, seed: int) -> ClientData:
    """One client's splits, as in ``digits`` but all with the usual labels."""
    return digits.load_client(partition_id, num_partitions, seed, GROUPS)


def recipe_of(partition_id: int, num_partitions: int) -> Recipe:
    """The architecture of a client: groups take turns, and every second turn has the larger one."""
    turn = partition_id // digits.group_count(num_partitions)
    return (SMALL, LARGE)[turn % 2]


def load_base(partition_id: int, num_partitions: int, cache_dir: Path) -> Base:
    """A client's base model, with that of ``digits`` as the reference for sketches."""
    base = load_or_pretrain(recipe_of(partition_id, num_partitions), cache_dir, digits.public, ALL_MODULES)
    return replace(base, reference=digits.load_base(cache_dir))


def bases_to_align(cache_dir: Path) -> tuple[list[Base], Dataset]:
    """All base models, the smallest (the pivot) first, and the public images."""
    images, labels = digits.public()
    bases = [load_or_pretrain(recipe, cache_dir, digits.public, ALL_MODULES) for recipe in (SMALL, LARGE)]
    return bases, Dataset({"pixel_values": images}, labels)
