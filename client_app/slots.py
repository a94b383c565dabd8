"""A client's slots on its own disk: one PEFT directory per slot, changed all together or not at all.

``<state-dir>/<run-name>/clients/<client-id>/`` holds::

    slots/<slot>/adapter_config.json, adapter_model.safetensors    what PEFT loads
    slots/<slot>/exact.safetensors                                 the vector, its layout, and the sender's residual
    slots/state.json                                               the last round whose plan was carried out
    previous/                                                      the same, one plan earlier
    adapter/                                                       the personal model, a PEFT directory

A plan's changes are staged in a folder of their own and become visible by renames, so that a process killed at any
moment leaves either the old slots or the new ones. ``exact.safetensors`` exists because PEFT stores a head as base
plus difference, from which the difference cannot be recovered to the last bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from adapters.adapter import Adapter
from adapters.durable import sync, write_durably
from adapters.layout import Layout, LayoutError
from adapters.peft_format import write_peft_directory
from proto.fedalloy.v1 import adapter_pb2

HeadReader = Callable[[], dict[str, torch.Tensor]]


class SlotError(ValueError):
    """A slot is missing, damaged, or does not fit."""


class SlotStore:
    """The slots of one client in one run; use inside :meth:`transaction`."""

    def __init__(self, directory: Path, base_model: str, base_heads: HeadReader) -> None:
        self.directory = directory
        self.base_model = base_model
        self.base_heads = base_heads
        self._slots: dict[str, Adapter] = {}
        self._residuals: dict[str, Adapter] = {}
        self._dirty: set[str] = set()
        self._personal: Adapter | None = None
        self._source = directory / "slots"

    @contextmanager
    def transaction(self, round_: int) -> Iterator[SlotStore]:
        """Carry out the plan of ``round_``: changes are written when the block ends without an error.

        A round that was carried out before (its answer was lost) starts again from the slots before it. The final
        delivery is a round of its own, after the last.
        """
        self._recover()
        current, previous = self.directory / "slots", self.directory / "previous"
        source = current
        if _round_of(current) is not None and round_ <= (_round_of(current) or 0):
            source = previous if previous.exists() and (_round_of(previous) or 0) < round_ else current
        self._slots, self._residuals, self._dirty, self._personal = {}, {}, set(), None
        self._source = source
        yield self
        self._commit(round_)

    def names(self) -> list[str]:
        """Slots that exist."""
        stored = {path.name for path in self._source.iterdir() if path.is_dir()} if self._source.exists() else set()
        return sorted(stored | set(self._slots))

    def __contains__(self, slot: str) -> bool:
        return slot in self.names()

    def __getitem__(self, slot: str) -> Adapter:
        """The adapter in a slot.

        Raises:
            SlotError: there is no such slot, or its file is damaged.
        """
        if slot not in self._slots:
            self._read(slot)
        return self._slots[slot]

    def __setitem__(self, slot: str, adapter: Adapter) -> None:
        self._slots[slot] = adapter
        self._dirty.add(slot)

    def residual(self, slot: str) -> Adapter | None:
        """What lossy encodings of this slot have dropped so far, or None."""
        if slot not in self._slots and slot in self:
            self._read(slot)
        return self._residuals.get(slot)

    def set_residual(self, slot: str, residual: Adapter) -> None:
        """Keep what the encoding of this upload dropped."""
        self._residuals[slot] = residual
        self._dirty.add(slot)

    def save_personal(self, adapter: Adapter) -> None:
        """Write the personal model to ``adapter/`` when the plan has been carried out."""
        self._personal = adapter

    def _read(self, slot: str) -> None:
        path = self._source / slot / "exact.safetensors"
        if not path.exists():
            known = ", ".join(self.names()) or "none"
            raise SlotError(f"no slot {slot!r}; this client holds: {known}")
        try:
            tensors = load_file(path)
            layout = Layout.from_proto(adapter_pb2.Layout.FromString(bytes(tensors["layout"].tolist())))
            self._slots[slot] = Adapter(layout, tensors["vector"])
            if "residual" in tensors:
                part = Layout.from_proto(adapter_pb2.Layout.FromString(bytes(tensors["residual_layout"].tolist())))
                self._residuals[slot] = Adapter(part, tensors["residual"])
        except (SafetensorError, LayoutError, KeyError, ValueError) as error:
            raise SlotError(f"slot {slot!r} is damaged ({path}): {error}") from None

    def _commit(self, round_: int) -> None:
        if self._personal is not None:
            self._replace_personal(self._personal)
        staged = self.directory / f".slots-{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for slot in self.names():
            if slot in self._dirty:
                self._write(staged / slot, self[slot], self._residuals.get(slot))
            else:
                shutil.copytree(self._source / slot, staged / slot, copy_function=os.link)
        write_durably(staged / "state.json", json.dumps({"round": round_}).encode())
        sync(staged)
        current, previous = self.directory / "slots", self.directory / "previous"
        if self._source == current:
            _swap(staged, current, previous)
        else:  # a round carried out again: what it started from stays the previous state
            _swap(staged, current, self.directory / ".slots-old")
            shutil.rmtree(self.directory / ".slots-old", ignore_errors=True)

    def _replace_personal(self, adapter: Adapter) -> None:
        staged, kept = self.directory / f".adapter-{os.getpid()}", self.directory / ".adapter-old"
        shutil.rmtree(staged, ignore_errors=True)
        write_peft_directory(staged, adapter, self.base_model, self.base_heads())
        _swap(staged, self.directory / "adapter", kept)
        shutil.rmtree(kept, ignore_errors=True)

    def _write(self, folder: Path, adapter: Adapter, residual: Adapter | None) -> None:
        write_peft_directory(folder, adapter, self.base_model, self.base_heads())
        tensors = {"vector": adapter.vector.contiguous(), "layout": _layout_bytes(adapter.layout)}
        if residual is not None:
            tensors |= {"residual": residual.vector.contiguous(), "residual_layout": _layout_bytes(residual.layout)}
        write_durably(folder / "exact.safetensors", save(tensors))

    def _recover(self) -> None:
        """Undo what a killed process left between two renames, and throw its unfinished folders away."""
        self.directory.mkdir(parents=True, exist_ok=True)
        current = self.directory / "slots"
        if not current.exists():
            for fallback in ("previous", ".slots-old"):
                if (self.directory / fallback).exists():
                    os.rename(self.directory / fallback, current)
                    break
        if not (self.directory / "adapter").exists() and (self.directory / ".adapter-old").exists():
            os.rename(self.directory / ".adapter-old", self.directory / "adapter")
        for path in self.directory.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)


def _layout_bytes(layout: Layout) -> torch.Tensor:
    return torch.tensor(list(layout.to_proto().SerializeToString()), dtype=torch.uint8)


def _round_of(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "state.json").read_text())["round"])
    except (OSError, ValueError, KeyError):
        return None


def _swap(staged: Path, target: Path, kept: Path) -> None:
    """``target`` becomes ``kept`` (replacing it), ``staged`` becomes ``target``."""
    if target.exists():
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(target, kept)
    os.rename(staged, target)
    sync(target.parent)
