"""Benchmark scenarios with real data, read from a folder that the user names (``data-root``).

The folder has ``text/<task>.jsonl.gz``, ``gen/<set>.jsonl.gz``, ``vision/<set>.npz`` and ``models/<base>/``. The first
line of a text file is ``{"meta": name, "labels": [...]}``, the others are ``{"s": split, "x": text, "y": number}``;
lines of the ``gen`` file have prompt, completion and task.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client_app.base_models import find_model, load_base
from client_app.data import Base, ClientData, Dataset
from client_app.encoding import load_encoder
from client_app.examples import Example
from client_app.scenarios import ScenarioError
from client_app.settings import Settings
from client_app.tasks import KINDS

TEXT_TASKS = ("sst2", "cr", "mr", "mpqa", "trec", "agnews", "tweet_emotion", "subj")
"""Related ones first: four of sentiment, then topics; one a client."""
TEXT_TRAIN, TEXT_TEST = 64, 200
PROMPT_TASKS = 8
PROMPT_TRAIN, PROMPT_TEST = 120, 40
CIFAR_CLASSES, CIFAR_TRAIN, CIFAR_TEST = 5, 10, 40
"""Classes of a client; images of each class for training (as many for validation) and for testing."""
PACS_TRAIN, PACS_TEST = 100, 300


@dataclass(frozen=True)
class Scenario:
    """How one client's base model and data are read, and for how many clients there are data."""

    load: Callable[[Settings, Path], tuple[Base, ClientData]]
    clients: int


def load_files(name: str, settings: Settings) -> tuple[Base, ClientData]:
    """The base model and one client's data.

    Raises:
        ScenarioError: ``data-root`` is not set, lacks a file, or there are more clients than the scenario has.
    """
    if not settings.data.data_root:
        raise ScenarioError(f"scenario {name!r} reads its data from a folder; set data-root")
    root = Path(settings.data.data_root).expanduser()
    scenario = SCENARIOS[name]
    if settings.num_partitions > scenario.clients:
        raise ScenarioError(
            f"scenario {name!r} is for at most {scenario.clients} clients, "
            f"got num-partitions = {settings.num_partitions}"
        )
    return scenario.load(settings, root)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a compressed JSONL file.

    Raises:
        ScenarioError: it is not there, or not JSONL.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def _text_tasks(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """One task a client; each has labels, and hence a head, of its own."""
    task = TEXT_TASKS[settings.partition_id]
    meta, *rows = read_jsonl(root / "text" / f"{task}.jsonl.gz")
    labels = tuple(str(name) for name in meta["labels"])
    kind = KINDS["text-classification"]
    chance = np.random.default_rng((settings.seed, settings.partition_id))
    pools = {"train": [r for r in rows if r["s"] == "train"], "test": [r for r in rows if r["s"] != "train"]}
    train = _drawn(pools["train"], 2 * TEXT_TRAIN, chance)
    chosen = {
        "train": train[:TEXT_TRAIN],
        "validation": train[TEXT_TRAIN:],
        "test": _drawn(pools["test"], TEXT_TEST, np.random.default_rng(settings.partition_id)),
    }
    found = find_model(settings.model.base_model, settings.state_dir / ".cache")
    encoder = load_encoder(found, kind, min(settings.model.max_length, 64))
    splits = {
        name: encoder.encode([Example(task, text=r["x"], label=labels[int(r["y"])]) for r in part], labels)
        for name, part in chosen.items()
    }
    base = load_base(found, kind, settings.model, labels, encoder.padding_id)
    return base, ClientData(task, kind.name, splits, metrics=("f1",))


def _prompts(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """One task of the set a client, the shortest first: prompts with completions."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(root / "gen" / "t0_short600.jsonl.gz"):
        by_task.setdefault(row["task"], []).append(row)
    enough = {name: rows for name, rows in by_task.items() if len(rows) >= PROMPT_TRAIN + PROMPT_TEST}

    def size(name: str) -> tuple[float, str]:
        return float(np.median([len(row["prompt"]) + len(row["completion"]) for row in enough[name]])), name

    task = sorted(enough, key=size)[settings.partition_id]
    rows = enough[task]
    tested = _drawn(rows, PROMPT_TEST, np.random.default_rng(settings.partition_id))
    rest = [row for row in rows if row not in tested]
    train = _drawn(rest, PROMPT_TRAIN, np.random.default_rng((settings.seed, settings.partition_id)))
    kind = KINDS["causal-lm"]
    found = find_model(settings.model.base_model, settings.state_dir / ".cache")
    encoder = load_encoder(found, kind, settings.model.max_length)
    cut = max(1, len(train) // 6)
    chosen = {"train": train[cut:], "validation": train[:cut], "test": tested}
    splits = {
        name: encoder.encode([Example(task, prompt=r["prompt"], completion=r["completion"]) for r in part], ())
        for name, part in chosen.items()
    }
    base = load_base(found, kind, settings.model, (), encoder.padding_id)
    return base, ClientData(
        task,
        kind.name,
        splits,
        decode=encoder.decode,
        generate_examples=settings.model.generate_examples,
        max_new_tokens=settings.model.max_new_tokens,
    )


def _cifar100(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """Each client has five of the forty classes that the base model has never seen, and a head for them."""
    found = _arrays(root / "vision" / "cifar100_heldout40_mini.npz")
    classes = np.random.default_rng(settings.seed).permutation(np.unique(found["y_train"]))
    mine = np.resize(classes, (settings.partition_id + 1) * CIFAR_CLASSES)[-CIFAR_CLASSES:]
    labels = tuple(str(found["names"][number]) for number in mine)
    chance = np.random.default_rng((settings.seed, settings.partition_id))
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "validation": [], "test": []}
    targets: dict[str, list[int]] = {name: [] for name in images}
    for number, original in enumerate(mine):
        pool = chance.permutation(np.flatnonzero(found["y_train"] == original))
        test = np.flatnonzero(found["y_test"] == original)[:CIFAR_TEST]
        for name, source, chosen in (
            ("train", "x_train", pool[:CIFAR_TRAIN]),
            ("validation", "x_train", pool[CIFAR_TRAIN : 2 * CIFAR_TRAIN]),
            ("test", "x_test", test),
        ):
            images[name].append(found[source][chosen])
            targets[name] += [number] * len(chosen)
    splits = {name: _images(np.concatenate(parts), targets[name]) for name, parts in images.items()}
    return _vision_base(settings, root, labels), ClientData("cifar100", "image-classification", splits, metrics=("f1",))


def _pacs(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """Each client has one of four domains (art, cartoon, photo, sketch) of the same seven classes, at 32 x 32."""
    found = _arrays(root / "vision" / "pacs48.npz")
    labels = tuple(str(name) for name in found["names"])
    domains = len(found["domains"])
    own = np.flatnonzero(found["domain"] == settings.partition_id % domains)
    order = np.random.default_rng(settings.partition_id % domains).permutation(own)
    test, rest = order[:PACS_TEST], order[PACS_TEST:]
    rest = np.random.default_rng((settings.seed, settings.partition_id % domains)).permutation(rest)
    start = 2 * PACS_TRAIN * (settings.partition_id // domains)  # clients of one domain have images of their own
    chosen = {
        "train": rest[start : start + PACS_TRAIN],
        "validation": rest[start + PACS_TRAIN : start + 2 * PACS_TRAIN],
        "test": test,
    }
    splits = {name: _images(found["x"][part], found["y"][part].tolist(), 32) for name, part in chosen.items()}
    return _vision_base(settings, root, labels), ClientData("pacs", "image-classification", splits, metrics=("f1",))


def _vision_base(settings: Settings, root: Path, labels: Sequence[str]) -> Base:
    name = settings.model.base_model or str(root / "models" / "vit-c100-p8")
    found = find_model(name, settings.state_dir / ".cache")
    return load_base(found, KINDS["image-classification"], settings.model, labels)


def _images(pixels: NDArray[np.uint8], labels: Sequence[int], size: int | None = None) -> Dataset:
    """``pixel_values [n, 3, H, W]`` in [-1, 1]."""
    tensor: Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if size is not None:
        tensor = torch.nn.functional.interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)
    return Dataset({"pixel_values": tensor.contiguous()}, torch.tensor(labels, dtype=torch.long))


def _drawn(rows: Sequence[dict[str, Any]], count: int, chance: np.random.Generator) -> list[dict[str, Any]]:
    return [rows[index] for index in chance.permutation(len(rows))[:count]]


SCENARIOS: Mapping[str, Scenario] = {
    "cifar100": Scenario(_cifar100, 40),
    "pacs": Scenario(_pacs, 20),
    "text-tasks": Scenario(_text_tasks, len(TEXT_TASKS)),
    "prompt-tasks": Scenario(_prompts, PROMPT_TASKS),
}
