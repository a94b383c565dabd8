"""Kinds of tasks by the name that the key ``task`` gives them: every class with a ``name`` in this package.

A new kind is a new file here; nothing else names it. :mod:`client_app.kinds.contract` says what one is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from client_app.data.dataset import Dataset
from client_app.kinds.contract import Kind, TaskError
from client_app.settings import DataSettings

__all__ = ["KINDS", "Kind", "TaskError", "example_losses", "guess_kind", "kind_of", "mean_loss", "targets_in"]


def _find() -> dict[str, Kind]:
    found: dict[str, Kind] = {}
    for item in pkgutil.iter_modules(__path__, f"{__name__}."):
        for kind in vars(importlib.import_module(item.name)).values():
            if isinstance(kind, type) and issubclass(kind, Kind) and kind.__module__ == item.name:
                if "name" not in vars(kind):
                    continue  # what several kinds share
                if "about" not in vars(kind) or kind.name in found:
                    raise ImportError(f"kind {kind.name!r} ({item.name}) has no `about`, or its name is taken")
                found[kind.name] = kind()
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


KINDS = _find()


def kind_of(name: str) -> Kind:
    """The kind with this name.

    Raises:
        TaskError: there is no such kind; names those that exist.
    """
    if name not in KINDS:
        raise TaskError(f"task {name!r} is unknown, expected one of {', '.join(KINDS)}")
    return KINDS[name]


def guess_kind(row: Mapping[str, Any], settings: DataSettings) -> Kind | None:
    """The kind of task that a row's columns fit; None if they fit none."""
    return next((kind for kind in KINDS.values() if kind.fits(row, settings)), None)


def mean_loss(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """What training minimises: the mean over a batch's examples, or over its target tokens where texts are generated.

    Args:
        kind: a key of :data:`KINDS`.
        outputs: ``[b, C]``; ``[n, V]`` or ``[b, L, V]`` where texts are generated; see the kind.
        labels: ``[b]`` or ``[b, L]``, on the same device.
    """
    return kind_of(kind).mean_loss(outputs, labels)


def example_losses(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """One loss for each example ``[b]``; arguments as for :func:`mean_loss`."""
    return kind_of(kind).example_losses(outputs, labels)


def targets_in(batch: Dataset) -> int:
    """How many labels :func:`mean_loss` averages over: the weight of a part of a batch in the whole."""
    return kind_of(batch.kind).targets_in(batch)
