"""Scenario ``multi-modal``: photos, news, questions and drawings at clients with one to three of seven tasks (TAP).

=============  ==============  ==========================================  ================================
task           reads           data                                        answers
=============  ==============  ==========================================  ================================
``object``     image           CIFAR-100, the forty held-out classes       which of them
``topic``      text            AG News                                     which of four
``question``   text            TREC                                        which of six kinds
``match``      image and text  CIFAR-100, "a maple tree"                   whether the image shows it
``statement``  image and text  NLVR, "there is a yellow circle"            whether it is true of the image
``caption``    image           CIFAR-100                                   "a maple tree"
``answer``     text            TREC                                        "it asks for a person"
=============  ==============  ==========================================  ================================

Clients differ in their tasks and modalities; two with the same task have different examples of it. The base model
is a FLAVA whose image tower is the ViT in ``data-root``; the rest is pre-trained once, in a minute, on examples
that no client has, with the tasks' own labels and heads that are thrown away. The vocabulary is the words of these
examples.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.model.bases.model_folders import find_model
from client_app.model.bases.multi_task import TaskSpec, multi_task_base
from client_app.scenarios import cifar
from client_app.scenarios.digits_multimodal import Vocabulary, pretrain_together, texts_as_tensors, words_until_end
from client_app.scenarios.texts import read_jsonl
from client_app.scenarios.vit import fingerprint_of, load_or_make
from client_app.settings import Settings

TASKS: Mapping[str, tuple[str, tuple[str, ...], str, int]] = {
    "object": ("image-classification", ("image",), "classify", 80),
    "topic": ("text-classification", ("text",), "classify", 40),
    "question": ("text-classification", ("text",), "classify", 40),
    "match": ("image-text-classification", ("image", "text"), "classify", 80),
    "statement": ("image-text-classification", ("image", "text"), "classify", 80),
    "caption": ("image-text-to-text", ("image", "text"), "write", 80),
    "answer": ("causal-lm", ("text",), "write", 40),
}
"""Kind, modalities, expert, and training examples of a client."""
CLIENTS = (
    *(("object",), ("topic", "answer"), ("match",), ("caption",)),
    *(("object", "topic"), ("question", "statement"), ("match", "caption"), ("question", "answer", "statement")),
)
VALIDATION, TEST, GENERATED, MAX_NEW_TOKENS, TOKENS, WORDS = 80, 100, 40, 6, 32, 3000
ANSWERS = ("a description", "a thing", "an abbreviation", "a person", "a place", "a number")
OUTPUTS = {"object": 40, "topic": 4, "question": 6, "match": 2, "statement": 2}
PUBLIC = 0.6
"""Share of examples that are public, drawn once for all seeds."""
SOURCES = {"topic": "agnews", "question": "trec", "answer": "trec", "statement": "nlvr"}
"""The source of a task's examples; otherwise it is CIFAR-100."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the base model, except the last bits of floating point."""

    image_tower: str
    name: str = "vit-c100-flava"
    data: str = "the public part of each task"
    layers: int = 2
    steps: int = 700
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint_of`; what decides the public examples counts, too."""
        return fingerprint_of([asdict(self), list(TASKS), PUBLIC, WORDS])


@dataclass(frozen=True)
class Pool:
    """All examples of a task: images or None, prompts, texts to write, and labels."""

    images: NDArray[np.uint8] | None
    prompts: Sequence[str]
    written: Sequence[str]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    """Examples of one group (NLVR: of one sentence) are in one split."""


class Words:
    """Tokens: padding, beginning, end, one for unknown words, then the public examples' most frequent words."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in split_words(text))
        found = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 4]
        self.words = ["[PAD]", "[BEGIN]", "[END]", "[OTHER]", *found]
        self.ids = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Numbers of a text's first words."""
        return [self.ids.get(word, 3) for word in split_words(text)[: TOKENS - 2]]


def split_words(text: str) -> list[str]:
    """Lower-case words, numbers and marks."""
    return re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower())


def load_client(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """A client's base model and its tasks."""
    found = find_model(str(root / cifar.MODEL), settings.state_dir / ".cache")
    recipe, words = Recipe(found.fingerprint), vocabulary(root)
    backbone = load_or_make(
        recipe,
        settings.state_dir / ".cache",
        lambda: _build(recipe, found.folder),
        lambda: _pretrain(recipe, found.folder, root),
    )
    tasks = CLIENTS[settings.partition_id]
    specs = [spec_of(task, len(words.words)) for task in tasks]
    base = multi_task_base(recipe.name, recipe.fingerprint, backbone, specs, (Vocabulary.END, Vocabulary.PAD))
    return base, ClientData.of_tasks([_task(task, settings, root, words) for task in tasks])


def spec_of(task: str, words: int) -> TaskSpec:
    """The declaration of a task."""
    kind, modalities, expert, _ = TASKS[task]
    return TaskSpec(task, kind, modalities, expert, OUTPUTS.get(task, words))


@cache
def vocabulary(root: Path) -> Words:
    """Words of the public examples of all tasks."""
    texts: list[str] = []
    for task in TASKS:
        pool = pool_of(task, root)
        chosen = parts_of(task, root)["public"]
        texts += [text for number in chosen for text in (pool.prompts[number], pool.written[number])]
    return Words(texts)


@cache
def pool_of(task: str, root: Path) -> Pool:
    """All examples of a task."""
    if task in ("topic", "question", "answer"):
        rows = read_jsonl(root / "text" / f"{SOURCES[task]}.jsonl.gz")[1:]
        labels = np.array([int(row["y"]) for row in rows])
        written = [f"it asks for {ANSWERS[label]}" if task == "answer" else "" for label in labels]
        texts = [str(row["x"]) for row in rows]
        return Pool(None, texts, written, labels, _groups(texts))
    if task == "statement":
        found = cifar.read_arrays(root / "multimodal" / f"{SOURCES[task]}.npz")
        texts = [str(text) for text in found["text"]]
        # Images are 128 x 32: take the means of four columns.
        squeezed = found["x"].reshape(len(texts), 32, 32, 4, 3).mean(axis=3).astype(np.uint8)
        return Pool(squeezed, texts, [""] * len(texts), found["y"].astype(np.int64), _groups(texts))
    found = cifar.read_arrays(root / cifar.IMAGES)
    names = [name.replace("_", " ") for name in cifar.label_names(found)]
    images = np.concatenate([found["x_train"], found["x_test"]])
    labels = np.searchsorted(np.unique(found["y_train"]), np.concatenate([found["y_train"], found["y_test"]]))
    prompts, written = [""] * len(labels), [""] * len(labels)
    if task == "caption":
        written = [f"a {names[label]}" for label in labels]
    if task == "match":
        chance = np.random.default_rng(len(labels))
        wrong = (labels + chance.integers(1, len(names), len(labels))) % len(names)
        answers = chance.integers(0, 2, len(labels))
        prompts = [f"a {names[one]}" for one in np.where(answers == 1, labels, wrong)]
        labels = answers
    return Pool(images, prompts, written, labels.astype(np.int64), np.arange(len(labels)))


@cache
def parts_of(task: str, root: Path) -> dict[str, NDArray[np.int64]]:
    """Numbers of the examples in each part: public, train and validation (of all clients), test.

    Tasks on the same images or texts divide them in the same way, so that no model is pre-trained on another task's
    tests.
    """
    pool = pool_of(task, root)
    groups = np.unique(pool.groups)
    order = np.random.default_rng(len(groups)).permutation(groups)
    bounds = np.round(np.cumsum([PUBLIC, (1 - PUBLIC) * 0.75]) * len(groups)).astype(int)
    return {
        name: np.flatnonzero(np.isin(pool.groups, part))
        for name, part in zip(("public", "train", "test"), np.split(order, bounds), strict=True)
    }


def encoded(task: str, pool: Pool, chosen: NDArray[np.int64], words: Words) -> Dataset:
    """Examples as the model reads them."""
    kind, modalities, _, _ = TASKS[task]
    inputs: dict[str, Tensor] = {}
    labels = torch.from_numpy(pool.labels[chosen])
    if "text" in modalities:
        pairs = [(pool.prompts[number], pool.written[number]) for number in chosen]
        tokens, targets = texts_as_tensors(words.encode, pairs)
        inputs |= tokens
        labels = targets if pool.written[chosen[0]] else labels
    if pool.images is not None:
        inputs |= cifar.as_images(pool.images[chosen], [0] * len(chosen)).inputs
    return Dataset(inputs, labels, kind)


def _groups(texts: Sequence[str]) -> NDArray[np.int64]:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.array([numbers[text] for text in texts])


def _task(task: str, settings: Settings, root: Path, words: Words) -> ClientData:
    kind, modalities, expert, count = TASKS[task]
    pool, parts = pool_of(task, root), parts_of(task, root)
    # Clients divide a source's examples among themselves, whatever their tasks, and however many take part.
    source = SOURCES.get(task)
    users = [number for number, names in enumerate(CLIENTS) if source in [SOURCES.get(name) for name in names]]
    order = np.random.default_rng(settings.seed).permutation(parts["train"])
    mine = np.array_split(order, len(users))[users.index(settings.partition_id)]
    chosen = {
        "train": mine[:count],
        "validation": mine[count : count + VALIDATION],
        "test": np.random.default_rng(settings.partition_id).permutation(parts["test"])[:TEST],
    }
    return ClientData(
        task,
        kind,
        {name: encoded(task, pool, numbers, words) for name, numbers in chosen.items()},
        decode=(lambda tokens: words_until_end(words.words, tokens)) if expert == "write" else None,
        generate_examples=GENERATED if expert == "write" else 0,
        max_new_tokens=MAX_NEW_TOKENS,
        modalities=modalities,
        groups=spec_of(task, len(words.words)).groups,
    )


def _build(recipe: Recipe, folder: Path) -> nn.Module:
    from transformers import FlavaConfig, FlavaModel

    given = json.loads((folder / "config.json").read_text())
    alike = ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
    common = {name: given[name] for name in alike}
    common |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.06}
    image = {
        name: given[name] for name in ("num_hidden_layers", "image_size", "patch_size", "num_channels", "qkv_bias")
    }
    text = {"vocab_size": WORDS, "max_position_embeddings": 2 * TOKENS, "pad_token_id": Vocabulary.PAD}
    config = FlavaConfig(
        image_config=common | image,
        text_config=common | text | {"num_hidden_layers": recipe.layers},
        multimodal_config=common | {"num_hidden_layers": recipe.layers},
        hidden_size=given["hidden_size"],
        projection_dim=given["hidden_size"],
        init_codebook=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return FlavaModel(config)


def _pretrain(recipe: Recipe, folder: Path, root: Path) -> nn.Module:
    words = vocabulary(root)
    tower = {
        name.removeprefix("vit."): tensor.float()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith("vit.")
    }

    def build(recipe: Recipe) -> nn.Module:
        model: Any = _build(recipe, folder)
        lacking, surplus = model.image_model.load_state_dict(tower, strict=False)
        wrong = [name for name in (*lacking, *surplus) if not name.startswith(("pooler.", "embeddings.mask_token"))]
        if wrong:
            raise ValueError(f"{folder} is not a ViT that can be an image tower: {wrong[0]!r} differs")
        model.image_model.requires_grad_(False)
        return model  # type: ignore[no-any-return]

    public = [(task, encoded(task, pool_of(task, root), parts_of(task, root)["public"], words)) for task in TASKS]
    return pretrain_together(build, recipe, [spec_of(task, len(words.words)) for task in TASKS], public)
