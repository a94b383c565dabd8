"""Tiny ViTs that are pre-trained on first use and kept on disk as ordinary transformers directories.

If processes start together, a file lock decides which one trains; the others wait and load. A directory counts only if
its recipe is the wanted one and its weights have the recorded hash and the model's names and shapes; otherwise it is
made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.dataset import Base
from fedalloy_adapters.files.atomic_files import locked, private_folder, sync

TARGET_MODULES = ("q_proj", "k_proj", "v_proj")
ALL_MODULES = (*TARGET_MODULES, "o_proj", "fc1", "fc2")
HEAD_MODULES = ("classifier",)
_RECORD = "recipe.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a base model, except the last bits of floating point.

    ``data`` says in words which examples :func:`load_or_pretrain` is given. AdamW, linear warm-up over a tenth of the
    steps, then cosine decay; no augmentation.
    """

    name: str
    data: str
    image_size: int
    patch_size: int
    classes: int
    width: int
    depth: int
    heads: int
    mlp: int
    seed: int
    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    initializer_range: float
    version: int = 1

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint_of`."""
        return fingerprint_of(asdict(self))


def fingerprint_of(what: Any) -> str:
    """SHA-256 of everything that decides a model, 64 hex digits; it does not depend on how floating point rounds.

    Args:
        what: consists of dictionaries, lists, strings and numbers.
    """
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def load_or_pretrain(
    recipe: Recipe,
    cache_dir: Path,
    examples: Callable[[], tuple[Tensor, Tensor]],
    targets: tuple[str, ...] = TARGET_MODULES,
) -> Base:
    """The base model of a recipe, frozen and in evaluation mode; made on first use and then loaded.

    Args:
        recipe: what to make.
        cache_dir: holds one directory per recipe, in transformers' ``save_pretrained`` format.
        examples: images ``[n, 1, H, W]`` and labels ``[n]``; only called if the model has to be made.
        targets: last parts of the names of the modules that get LoRA factors.
    """
    model = load_or_make(recipe, cache_dir, lambda: _build(recipe), lambda: _pretrain(recipe, *examples()))
    return vit_base(recipe, model, targets)


def vit_base(recipe: Any, model: nn.Module, targets: tuple[str, ...]) -> Base:
    """A ViT as a base model; arguments as for :func:`load_or_make` and :func:`load_or_pretrain`."""
    # Slow to import (peft), and some importers of this file need only data.
    from client_app.model.linear_modules import modules_ending_with

    return Base(
        name=recipe.name,
        model=model,
        fingerprint=recipe.fingerprint,
        targets=modules_ending_with(model, targets),
        heads=HEAD_MODULES,
    )


def load_or_make(
    recipe: Any, cache_dir: Path, build: Callable[[], nn.Module], pretrain: Callable[[], nn.Module]
) -> nn.Module:
    """A recipe's model, frozen and in evaluation mode; made on first use and then loaded.

    Args:
        recipe: a dataclass with ``name`` and ``fingerprint``.
        cache_dir: see :func:`load_or_pretrain`.
        build: makes the model with any weights; it has ``save_pretrained``.
        pretrain: makes it with the wanted weights; only called if the model has to be made.
    """
    private_folder(cache_dir)
    directory = cache_dir / f"{recipe.name}-{recipe.fingerprint[:16]}"
    model = build()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = _read_weights(directory, recipe, shapes)
    if weights is None:
        with locked(directory.with_name(directory.name + ".lock")):
            weights = _read_weights(directory, recipe, shapes)
            if weights is None:
                _install(pretrain(), recipe, directory)
                weights = _read_weights(directory, recipe, shapes)
    if weights is None:
        raise RuntimeError(f"{directory} cannot be read back after it was written")
    model.load_state_dict(weights)
    return model.requires_grad_(False).eval()


def build_vit(recipe: Any, **config: Any) -> nn.Module:
    """A ViT without dropout, with random weights.

    Args:
        recipe: a dataclass with ``width``, ``depth``, ``heads``, ``mlp`` and ``seed``.
        config: other arguments of ``ViTConfig``.
    """
    # Also slow to import.
    from transformers import ViTConfig, ViTForImageClassification

    shape = ViTConfig(
        hidden_size=recipe.width,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return ViTForImageClassification(shape)


def _build(recipe: Recipe) -> nn.Module:
    return build_vit(
        recipe,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        num_channels=1,
        # transformers' default of 0.02 suits widths near 768; a narrow model starts almost dead with it.
        initializer_range=recipe.initializer_range,
        num_labels=recipe.classes,
    )


def _pretrain(recipe: Recipe, images: Tensor, labels: Tensor) -> nn.Module:
    model = _build(recipe).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warm_up = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimiser,
        [
            torch.optim.lr_scheduler.LinearLR(optimiser, 1 / warm_up, total_iters=warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps - warm_up),
        ],
        milestones=[warm_up],
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    with one_thread():
        for _ in range(recipe.steps):
            chosen = torch.randint(len(labels), (recipe.batch,), generator=generator)
            loss = functional.cross_entropy(model(pixel_values=images[chosen]).logits, labels[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return model.eval()


def _install(model: nn.Module, recipe: Any, directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        new = Path(scratch) / "new"
        with _no_progress_bar():
            # Under the names of this version's modules, so that loading is a plain load_state_dict.
            model.save_pretrained(new, save_original_format=False)  # type: ignore[operator]
        digest = hashlib.sha256((new / _WEIGHTS).read_bytes()).hexdigest()
        record = {"recipe": asdict(recipe), "fingerprint": recipe.fingerprint, "weights": digest}
        (new / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for path in (*new.iterdir(), new):
            sync(path)
        if directory.is_dir() and not directory.is_symlink():
            shutil.rmtree(directory)
        elif directory.exists() or directory.is_symlink():
            directory.unlink()
        os.replace(new, directory)
        sync(directory.parent)


def _read_weights(directory: Path, recipe: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor] | None:
    try:
        record = json.loads((directory / _RECORD).read_text())
        content = (directory / _WEIGHTS).read_bytes()
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("fingerprint") != recipe.fingerprint:
        return None
    if record.get("weights") != hashlib.sha256(content).hexdigest():
        return None
    weights = load_tensors(content)
    # Another version of transformers may have written other names.
    return weights if {name: tensor.shape for name, tensor in weights.items()} == shapes else None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, because pre-training is small and other clients may be doing it, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
