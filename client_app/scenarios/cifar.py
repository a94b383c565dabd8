"""Scenarios ``cifar100-20`` and ``mixed-arch``: forty classes of CIFAR-100 that no base model has seen.

All clients answer with the same forty labels, so the head is part of the adapter, and every client's model can be tried
on every other client's images.

``cifar100-20`` is Potara's setting as far as it is known: a pre-trained ViT and twenty clients whose shares of every
class are drawn from a Dirichlet distribution; training, validation and test images of a client have the same shares.
With fewer than twenty clients, the other shards are left out, and each client keeps its own.

``mixed-arch`` is FedMosaic's setting: there are two architectures, and four groups of ten classes. Half of each group's
clients have one architecture, half the other, so that of eight clients no two share both. The larger ViT is the one in
``data-root``; the smaller one is made from it once, by distillation on public images (PACS, and the first images of
each class, which no client has), and kept.

``cifar100-groups`` is FedMerge's setting: four groups of sixteen classes; neighbouring groups share eight. Eight
clients have the classes of one group, two clients each; with more, the others have half of their classes from one group
and half from another that shares none with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import FoundModel, find_model
from client_app.scenarios import ScenarioError
from client_app.scenarios.vit import ALL_MODULES, build_vit, fingerprint_of, load_or_make, one_thread, vit_base
from client_app.settings import Settings

IMAGES = Path("vision") / "cifar100_heldout40_mini.npz"
MODEL = Path("models") / "vit-c100-p8"
SHARDS, CONCENTRATION = 20, 0.3
"""Number of clients of ``cifar100-20``, and Dirichlet's alpha, which Potara's abstract does not give."""
VALIDATION = 0.4
"""Share of a client's training images."""
SMALLEST = 15
"""Fewest images in a client's split."""
GROUPS, GROUP_CLASSES = 4, 10
PUBLIC = 20
"""Images of each class that no client of ``mixed-arch`` has."""
MIXED_TRAIN, MIXED_TEST = 12, 30
"""Training images (and as many for validation) and test images of each class at a client of ``mixed-arch``."""
OVERLAPPING = tuple(tuple(range(8 * group, 8 * group + 16)) for group in range(4))
"""The classes of each group of ``cifar100-groups``, by their places in an order that the seed draws."""
GROUP_OF = tuple((client % 4,) for client in range(8)) + tuple((first, (first + 2) % 4) for first in range(4))
"""The groups of each client of ``cifar100-groups``."""
GROUP_IMAGES = {"train": 64, "validation": 64, "test": 96}
"""Images of each client of ``cifar100-groups``, evenly from its classes."""
MIXED_CLIENTS = GROUPS * ((100 - PUBLIC) // (2 * MIXED_TRAIN))


@dataclass(frozen=True)
class Distilled:
    """Everything that decides the smaller ViT, except the last bits of floating point."""

    teacher: str
    name: str = "vit-c100-96x4"
    data: str = f"PACS at 32 x 32 and {PUBLIC} images of each held-out class, random crops and flips"
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp: int = 384
    seed: int = 0
    steps: int = 700
    batch: int = 64
    learning_rate: float = 2e-3
    temperature: float = 2.0
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint_of`; ``teacher`` is the larger model's."""
        return fingerprint_of(asdict(self))


@lru_cache(maxsize=4)
def read_arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file. They must not be changed, because a process reads them only once.

    Raises:
        ScenarioError: it is not there, or contains something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def as_images(pixels: NDArray[np.uint8], labels: Sequence[int], size: int | None = None) -> Dataset:
    """``pixel_values [n, 3, H, W]`` in [-1, 1]; resized if ``size`` is given."""
    tensor: Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if size is not None:
        tensor = functional.interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)
    return Dataset({"pixel_values": tensor.contiguous()}, torch.tensor(labels, dtype=torch.long))


def find_vit(settings: Settings, root: Path) -> FoundModel:
    """The ViT that run-config names, or the one in the folder."""
    return find_model(settings.model.base_model or str(root / MODEL), settings.state_dir / ".cache")


def vision_base(settings: Settings, root: Path, labels: Sequence[str]) -> Base:
    """The same as a base model with a head for these labels."""
    return load_base(find_vit(settings, root), KINDS["image-classification"], settings.model, labels)


def load_dirichlet(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """A client of ``cifar100-20``."""
    found = read_arrays(root / IMAGES)
    names = label_names(found)
    train, test = dirichlet_shards(found["y_train"], found["y_test"], settings.seed)
    mine = train[settings.partition_id]
    cut = round(len(mine) * VALIDATION)
    chosen = {
        "train": ("train", mine[cut:]),
        "validation": ("train", mine[:cut]),
        "test": ("test", test[settings.partition_id]),
    }
    data = ClientData("cifar100", "image-classification", _splits(found, chosen), metrics=("f1",))
    return vision_base(_sharing_labels(settings, names), root, names), data


def dirichlet_shards(
    train: NDArray[np.uint8], test: NDArray[np.uint8], seed: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Image numbers of every shard, of the training and the test images: each class is cut in the same proportions.

    They are drawn again until every shard has at least :data:`SMALLEST` images of each split.
    """
    chance = np.random.default_rng((SHARDS, seed))
    while True:
        parts: tuple[list[list[NDArray[np.int64]]], list[list[NDArray[np.int64]]]] = ([], [])
        for label in np.unique(train):
            shares = np.cumsum(chance.dirichlet(np.full(SHARDS, CONCENTRATION)))[:-1]
            for labels, found in zip((train, test), parts, strict=True):
                pool = chance.permutation(np.flatnonzero(labels == label))
                found.append(np.split(pool, np.round(shares * len(pool)).astype(int)))
        shards = [[np.concatenate([cut[s] for cut in found]) for s in range(SHARDS)] for found in parts]
        if min(len(s) for s in shards[0]) * VALIDATION >= SMALLEST and min(len(s) for s in shards[1]) >= SMALLEST:
            return [chance.permutation(shard) for shard in shards[0]], shards[1]


def load_groups(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """A client of ``cifar100-groups``."""
    found = read_arrays(root / IMAGES)
    names = label_names(found)
    chosen = group_images(found["y_train"], found["y_test"], settings.partition_id, settings.seed)
    data = ClientData("cifar100", "image-classification", _splits(found, chosen), metrics=("f1",))
    return vision_base(_sharing_labels(settings, names), root, names), data


def group_images(
    train: NDArray[np.uint8], test: NDArray[np.uint8], client: int, seed: int
) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """The source and the image numbers of each split of a client of ``cifar100-groups``.

    Clients take turns in a shuffled list of each class's images: one list for training and validation, one for test.
    """
    order = np.random.default_rng((len(GROUP_OF), seed)).permutation(len(np.unique(train)))
    own: dict[str, list[NDArray[np.int64]]] = {name: [] for name in GROUP_IMAGES}
    for place in [place for group in GROUP_OF[client] for place in OVERLAPPING[group]]:
        label, starts = np.unique(train)[order[place]], {"train": 0, "test": 0}
        pools = {
            source: np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
            for source, labels in (("train", train), ("test", test))
        }
        for other, groups in enumerate(GROUP_OF[: client + 1]):
            if not any(place in OVERLAPPING[group] for group in groups):
                continue
            for name, images in GROUP_IMAGES.items():
                source, count = "test" if name == "test" else "train", images // (16 * len(groups))
                if other == client:
                    own[name].append(pools[source][starts[source] : starts[source] + count])
                starts[source] += count
    return {name: ("test" if name == "test" else "train", np.concatenate(parts)) for name, parts in own.items()}


def load_mixed(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """A client of ``mixed-arch``, with the smaller ViT as the reference for sketches."""
    found = read_arrays(root / IMAGES)
    names = label_names(found)
    group, turn = settings.partition_id % GROUPS, settings.partition_id // GROUPS
    classes = np.random.default_rng((GROUPS, settings.seed)).permutation(len(names))
    train: list[NDArray[np.int64]] = []
    validation: list[NDArray[np.int64]] = []
    test: list[NDArray[np.int64]] = []
    for label in classes[group * GROUP_CLASSES : (group + 1) * GROUP_CLASSES]:
        original = np.unique(found["y_train"])[label]
        pool = np.flatnonzero(found["y_train"] == original)[PUBLIC:]
        pool = np.random.default_rng((settings.seed, int(label))).permutation(pool)[2 * MIXED_TRAIN * turn :]
        train.append(pool[:MIXED_TRAIN])
        validation.append(pool[MIXED_TRAIN : 2 * MIXED_TRAIN])
        test.append(np.flatnonzero(found["y_test"] == original)[:MIXED_TEST])
    chosen = {"train": ("train", train), "validation": ("train", validation), "test": ("test", test)}
    splits = _splits(found, {name: (source, np.concatenate(parts)) for name, (source, parts) in chosen.items()})
    small, large = mixed_bases(_sharing_labels(settings, names), root, names, found)
    base = (small, large)[turn % 2]
    return replace(base, reference=small), ClientData("cifar100", "image-classification", splits, metrics=("f1",))


def mixed_bases(
    settings: Settings, root: Path, names: Sequence[str], found: Mapping[str, NDArray[Any]]
) -> tuple[Base, Base]:
    """The smaller ViT (made on first use: about a minute) and the larger one; all linear layers are adapted."""
    everywhere = replace(settings, model=replace(settings.model, target_modules=",".join(ALL_MODULES)))
    large = vision_base(everywhere, root, names)
    recipe = Distilled(large.fingerprint)
    teacher = find_vit(settings, root).folder
    model = load_or_make(
        recipe, settings.state_dir / ".cache", lambda: _build(recipe, 60), lambda: _distil(recipe, teacher, root, found)
    )
    vit: Any = model
    vit.classifier = nn.Linear(recipe.width, len(names))
    with torch.no_grad():
        vit.classifier.weight.copy_(_start(len(names), recipe.width))
        vit.classifier.bias.zero_()
    vit.config.num_labels = len(names)
    vit.requires_grad_(False).eval()
    return vit_base(recipe, vit, ALL_MODULES), large


def mixed_bases_to_align(root: Path, cache_dir: Path) -> tuple[list[Base], Dataset]:
    """Both base models, the smaller (the pivot) first, and the public images of the held-out classes."""
    found = read_arrays(root / IMAGES)
    names = label_names(found)
    settings = Settings("public", cache_dir.parent, "mixed-arch", 0, 1, 0, 8, 16.0, 0.0)
    bases = mixed_bases(_sharing_labels(settings, names), root, names, found)
    return list(bases), _splits(found, {"public": ("train", _public(found))})["public"]


def label_names(found: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
    """Names of the held-out classes, in the order of their numbers."""
    return tuple(str(found["names"][number]) for number in np.unique(found["y_train"]))


def _public(found: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    labels = found["y_train"]
    return np.concatenate([np.flatnonzero(labels == label)[:PUBLIC] for label in np.unique(labels)])


def _splits(
    found: Mapping[str, NDArray[Any]], chosen: Mapping[str, tuple[str, NDArray[np.int64]]]
) -> dict[str, Dataset]:
    """Images with labels 0, 1, ... of the held-out classes; ``chosen`` has the source and the image numbers."""
    originals = np.unique(found["y_train"])
    return {
        name: as_images(
            found[f"x_{source}"][numbers], np.searchsorted(originals, found[f"y_{source}"][numbers]).tolist()
        )
        for name, (source, numbers) in chosen.items()
    }


def _sharing_labels(settings: Settings, names: Sequence[str]) -> Settings:
    return replace(settings, model=replace(settings.model, labels=",".join(names)))


def _start(classes: int, width: int) -> Tensor:
    return 0.02 * torch.randn(classes, width, generator=torch.Generator().manual_seed(classes * width))


def _build(recipe: Distilled, classes: int) -> nn.Module:
    return build_vit(recipe, image_size=32, patch_size=8, initializer_range=0.06, num_labels=classes)


def _distil(recipe: Distilled, folder: Path, root: Path, found: Mapping[str, NDArray[Any]]) -> nn.Module:
    """A small ViT that is trained on public images to give the larger one's answers among its sixty classes."""
    import transformers

    teacher: Any = transformers.ViTForImageClassification.from_pretrained(folder, dtype=torch.float32)
    teacher.eval()
    own = _public(found)
    pacs = read_arrays(root / "vision" / "pacs48.npz")["x"]
    images = [as_images(pacs, [0] * len(pacs), 36), as_images(found["x_train"][own], [0] * len(own), 36)]
    pool = torch.cat([part.inputs["pixel_values"] for part in images])
    model: Any = _build(recipe, int(teacher.config.num_labels)).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, recipe.steps, pct_start=0.1)
    chance = torch.Generator().manual_seed(recipe.seed)
    with one_thread():
        for _ in range(recipe.steps):
            batch = pool[torch.randint(len(pool), (recipe.batch,), generator=chance)]
            x, y = torch.randint(5, (2,), generator=chance).tolist()
            batch = batch[:, :, y : y + 32, x : x + 32]
            if int(torch.randint(2, (), generator=chance)):
                batch = batch.flip(-1)
            with torch.no_grad():
                wanted = (teacher(pixel_values=batch).logits / recipe.temperature).softmax(dim=-1)
            said = (model(pixel_values=batch).logits / recipe.temperature).log_softmax(dim=-1)
            loss = functional.kl_div(said, wanted, reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()  # type: ignore[no-any-return]
