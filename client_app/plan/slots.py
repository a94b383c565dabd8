"""A client's slots on its own disk: one PEFT directory per slot, changed all together or not at all.

``<state-dir>/<run-name>/clients/<client-id>/`` holds::

    slots/<slot>/adapter_config.json, adapter_model.safetensors    what PEFT loads
    slots/<slot>/exact.safetensors                                 vector, layout, digest; the same of the residual,
                                                                   of the client's own heads, and of what was last
                                                                   received, where the next may be a difference from it
    slots/<slot>/optimizer.safetensors                             what an optimiser that is kept goes on from
    slots/state.json                                               the last round whose plan was carried out, and losses
    history/<round>/                                               the same after earlier plans, the newest ones
    adapter/                                                       the personal model, a PEFT directory; or, where its
                                                                   coefficients depend on the input, mixture.json,
                                                                   gates.safetensors and a PEFT directory per slot

A plan's changes are staged in a folder of their own and become visible by renames, so that a process killed at any
moment leaves either the old slots or the new ones, and the earlier ones with them. (What a kill leaves between two
renames is put right when the next plan begins; until then ``adapter/`` may be a plan ahead of ``slots/``, or missing.)
As many earlier states are kept as the server keeps checkpoints (``keep-checkpoints``), and the one that a plan pins:
whichever checkpoint a run resumes from, the next round starts from the same slots as it did the first time. Only one
process works at a time: if a resumed run asks while the old one trains, Flower may start a second one, which waits. A
client whose labels are its own has heads that no plan names and no upload contains. Each slot has heads of its own:
``slots[name]`` is what the federation knows of a slot; :meth:`SlotStore.whole` has its heads, too.
``exact.safetensors`` exists because PEFT stores a head as base plus difference: the difference loses its last bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import DecodeError, Message
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from client_app.plan.progress import tick
from client_app.plan.slot_tensors import from_tensors, require_no_more_than, to_tensors, with_digest, without_digest
from fedalloy_adapters.adapter import Adapter, joined
from fedalloy_adapters.files.atomic_files import locked, private_folder, sync, write_durably
from fedalloy_adapters.files.peft_format import write_peft_directory
from fedalloy_adapters.files.sealed_json import sealed, unsealed
from fedalloy_adapters.layout import Layout

MIXTURE_FILE = "mixture.json"
OPTIMIZER_FILE = "optimizer.safetensors"
Parts = tuple[Mapping[str, Adapter], Mapping[str, Adapter], Message]
_BESIDE = ("residual_", "head_", "received_")
"""Prefixes for what a slot's file holds beside the adapter."""
HeadReader = Callable[[], dict[str, torch.Tensor]]


class SlotError(ValueError):
    """A slot is missing, damaged, or does not fit."""


class SlotStore:
    """The slots of one client in one run; use inside :meth:`transaction`. ``keep`` earlier states stay on disk.

    ``base_heads`` and ``drawn`` give what PEFT directories have beside an adapter: the base model's own heads, which
    differences are added to, and parameters that its checkpoint lacks. ``own_layout`` is the layout of the heads that
    each slot has beside its adapter; None if the client has no labels of its own.
    """

    def __init__(
        self,
        directory: Path,
        base_model: str,
        base_heads: HeadReader,
        keep: int = 1,
        drawn: HeadReader = dict,
        own_layout: Layout | None = None,
    ) -> None:
        self.directory = directory
        self.base_model = base_model
        self.base_heads = base_heads
        self.drawn = drawn
        self.keep = keep
        self.own_layout = own_layout
        self._slots: dict[str, Adapter] = {}
        self._residuals: dict[str, Adapter] = {}
        self._heads: dict[str, Adapter] = {}
        self._received: dict[str, Adapter] = {}
        self._optimizers: dict[str, dict[str, torch.Tensor]] = {}
        self._opened: set[str] = set()
        self._dirty: set[str] = set()
        self._personal: Adapter | None = None
        self._parts: Parts | None = None
        self.losses: dict[str, dict[str, float]] = {}
        """Recorded losses by name of the record and by task; only finite ones."""
        self.hidden: frozenset[str] = frozenset()
        """Slots that hold something that may not leave; see :meth:`client_app.guard.policy.Policy.require_private`."""
        self._source = directory / "slots"
        self._pinned: int | None = None

    @contextmanager
    def transaction(self, round_: int, pinned: int | None = None) -> Iterator[SlotStore]:
        """Carry out the plan of ``round_``: changes are written when the block ends without an error.

        The slots as they were after the round ``pinned`` stay on disk, however many newer states there are.

        A round that was carried out before (its answer was lost) starts again from the slots before it. The final
        delivery is a round of its own, after the last.

        Raises:
            SlotError: the slots before ``round_`` are no longer here, or a file is damaged.
        """
        private_folder(self.directory)
        with locked(self.directory / ".lock", waiting=lambda: tick("waiting for the slots")):
            self._pinned = pinned
            self._recover()
            self._slots, self._residuals, self._personal, self._parts = {}, {}, None, None
            self._heads, self._received, self._optimizers, self._opened, self._dirty = {}, {}, {}, set(), set()
            self._source = self._before(round_)
            self.losses, self.hidden = _losses_of(self._source), _hidden_in(self._source)
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
            if slot not in self.names():
                raise SlotError(f"no slot {slot!r}; this client holds: {', '.join(self.names()) or 'none'}")
            self._open(slot)
        return self._slots[slot]

    def __setitem__(self, slot: str, adapter: Adapter) -> None:
        self._slots[slot] = adapter
        self._dirty.add(slot)

    def whole(self, slot: str) -> Adapter:
        """The adapter in a slot with its own heads of this client; heads of zeros if it has never had any.

        Raises:
            SlotError: there is no such slot, or its file is damaged.
        """
        adapter = self[slot]
        if self.own_layout is None or not _is_update(adapter):
            return adapter
        self._open(slot)
        return joined(adapter, self._heads.get(slot) or Adapter.zeros(self.own_layout))

    def set_whole(self, slot: str, adapter: Adapter, *, keep_own_heads: bool = False) -> None:
        """Put an adapter with or without own heads into a slot.

        Without own heads, those of the slot become zero; with ``keep_own_heads`` they stay, whatever the adapter has.
        """
        if self.own_layout is not None and _is_update(adapter):
            own = self.own_layout
            has_heads = adapter.layout.contains(own)
            if not keep_own_heads:
                self._heads[slot] = adapter.part(own) if has_heads else Adapter.zeros(own)
            if has_heads:
                known = [module for module in adapter.layout.modules if module not in own.modules]
                adapter = adapter.part(adapter.layout.select(modules=known))
        self[slot] = adapter

    def optimizer(self, slot: str) -> dict[str, torch.Tensor]:
        """The optimiser state that this slot's last train step kept, by ``<entry>/<what>``; may be empty."""
        self._open(slot)
        return self._optimizers.get(slot, {})

    def set_optimizer(self, slot: str, state: Mapping[str, torch.Tensor]) -> None:
        """Keep the state from which an optimiser goes on the next time; if empty, it starts fresh."""
        self._optimizers[slot] = dict(state)
        self._dirty.add(slot)

    def residual(self, slot: str) -> Adapter | None:
        """What lossy encodings of this slot have dropped so far, or None."""
        self._open(slot)
        return self._residuals.get(slot)

    def set_residual(self, slot: str, residual: Adapter | None) -> None:
        """Keep what the encoding of this upload dropped; None: forget what earlier ones dropped."""
        self._residuals.pop(slot, None)
        self._residuals |= {} if residual is None else {slot: residual}
        self._dirty.add(slot)

    def received(self, slot: str) -> Adapter | None:
        """What was last received for this slot with a plan that asked to keep it, or None."""
        self._open(slot)
        return self._received.get(slot)

    def set_received(self, slot: str, adapter: Adapter) -> None:
        """Keep what was received: the next may be a difference from it."""
        self._received[slot] = adapter.clone()  # the slot may be the same one, and a file cannot hold one memory twice
        self._dirty.add(slot)

    def save_personal(self, adapter: Adapter) -> None:
        """Write the personal model to ``adapter/`` when the plan has been carried out."""
        self._personal, self._parts = adapter, None

    def save_parts(self, slots: Mapping[str, Adapter], gates: Mapping[str, Adapter], mixture: Message) -> bytes:
        """Write a mixture that is not a single adapter to ``adapter/``: one PEFT directory per slot, and the gates."""
        self._personal, self._parts = None, (slots, gates, mixture)
        found = b"".join(adapter.digest for adapter in [*slots.values(), *gates.values()])
        return hashlib.sha256(found + mixture.SerializeToString(deterministic=True)).digest()

    def _before(self, round_: int) -> Path:
        """The folder with the slots as they were before a round."""
        current, history = self.directory / "slots", self._history()
        if round_ > _round_of(current):
            return current
        for number in reversed(history):
            if number < round_:
                return self.directory / "history" / f"{number}"
        kept = [*map(str, history), f"{_round_of(current)}"]
        raise SlotError(
            f"round {round_} has been carried out, and {self.directory} no longer holds the slots before it, only "
            f"those after round {' and '.join(kept)}; for a new run under an old name, remove that folder"
        )

    def _open(self, slot: str) -> None:
        """Read a slot of the source, once; what the plan has already put in its place stays."""
        folder = self._source / slot
        if slot in self._opened or not folder.exists():
            return
        path = folder / "exact.safetensors"
        try:
            tensors = load_file(path)
            stored = from_tensors(tensors, "")
            beside = {prefix: from_tensors(tensors, prefix) for prefix in _BESIDE if f"{prefix}vector" in tensors}
            require_no_more_than(tensors, 3 * (1 + len(beside)))
            path = folder / OPTIMIZER_FILE
            optimizer = without_digest(load_file(path)) if path.exists() else {}
        except (SafetensorError, DecodeError, OSError, KeyError, TypeError, ValueError) as error:
            raise SlotError(f"slot {slot!r} is damaged ({path}): {error}") from None
        self._opened.add(slot)
        self._slots.setdefault(slot, stored)
        self._optimizers.setdefault(slot, optimizer)
        for prefix, found in zip(_BESIDE, self._beside(), strict=True):
            if prefix in beside:
                found.setdefault(slot, beside[prefix])

    def _beside(self) -> tuple[dict[str, Adapter], ...]:
        return self._residuals, self._heads, self._received

    def _commit(self, round_: int) -> None:
        staged = self.directory / f".staged-{os.getpid()}"
        private_folder(staged / "slots")
        for slot in self.names():
            if slot in self._dirty:
                self._open(slot)  # a slot that was replaced unread keeps its residual, own heads and optimiser
                self._write(staged / "slots" / slot, slot)
            else:
                shutil.copytree(self._source / slot, staged / "slots" / slot, copy_function=_link)
                sync(staged / "slots" / slot)
        state: dict[str, object] = {"round": round_} | ({"losses": self.losses} if self.losses else {})
        if self.hidden:
            state["hidden"] = sorted(self.hidden)
        write_durably(staged / "slots" / "state.json", sealed(state))
        if self._personal is not None or self._parts is not None:
            if self._personal is not None:
                write_peft_directory(
                    staged / "adapter", self._personal, self.base_model, self.base_heads(), self.drawn()
                )
            elif self._parts is not None:
                self._write_parts(staged / "adapter", *self._parts)
            if not self._rename("adapter", ".adapter-old"):  # an empty folder says that there was none
                private_folder(self.directory / ".adapter-old")
            os.rename(staged / "adapter", self.directory / "adapter")
        # From here, _recover knows every state that a kill can leave.
        if self._source.name == "slots":
            private_folder(self.directory / "history")
            self._rename("slots", f"history/{_round_of(self._source)}")
        else:  # a repeated round: the slots that it started from are in the history and stay there
            self._rename("slots", ".slots-old")
        os.rename(staged / "slots", self.directory / "slots")
        sync(self.directory)
        self._clean()

    def _rename(self, name: str, new: str) -> bool:
        """Rename a folder if it exists and the new name is free."""
        if not (self.directory / name).exists() or (self.directory / new).exists():
            return False
        os.rename(self.directory / name, self.directory / new)
        return True

    def _write(self, folder: Path, slot: str) -> None:
        adapter = self[slot]
        if _is_update(adapter):  # PEFT has no gates and no sketches
            self._write_peft(folder, self.whole(slot))
        tensors = to_tensors(adapter, "")
        for prefix, beside in zip(_BESIDE, self._beside(), strict=True):
            if slot in beside:
                tensors |= to_tensors(beside[slot], prefix)
        write_durably(folder / "exact.safetensors", save(tensors))
        if self._optimizers.get(slot):
            state = self._optimizers[slot]
            write_durably(folder / OPTIMIZER_FILE, save(with_digest(state)))

    def _write_peft(self, folder: Path, adapter: Adapter) -> None:
        write_peft_directory(folder, adapter, self.base_model, self.base_heads(), self.drawn())

    def _write_parts(
        self, folder: Path, slots: Mapping[str, Adapter], gates: Mapping[str, Adapter], mixture: Message
    ) -> None:
        for slot, adapter in slots.items():
            self._write_peft(folder / slot, adapter)
        tensors = {
            f"{slot}/{entry.module}": value.clone() for slot, found in gates.items() for entry, value in found.items()
        }
        write_durably(folder / "gates.safetensors", save(tensors))
        write_durably(folder / MIXTURE_FILE, (MessageToJson(mixture) + "\n").encode())

    def _recover(self) -> None:
        """Undo what a killed process left between two renames of ``_commit``, and throw its unfinished folders away."""
        if (self.directory / ".adapter-old").exists() and any(self.directory.glob(".staged-*/slots")):
            self._rename("adapter", ".adapter-undone")  # the slots are the old ones, so the adapter must be, too
            self._rename(".adapter-old", "adapter")
            with contextlib.suppress(OSError):  # there was none
                (self.directory / "adapter").rmdir()
        restored = self._rename(".slots-old", "slots") or (self.directory / "slots").exists()
        if not restored and (history := self._history()):
            self._rename(f"history/{history[-1]}", "slots")
        # A new client holds no slots; round 1 can start again from this state, too.
        private_folder(self.directory / "slots")
        self._clean()

    def _history(self) -> list[int]:
        """Rounds after which earlier slots are kept, in order."""
        folder = self.directory / "history"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []

    def _clean(self) -> None:
        """Remove unfinished folders, slots of rounds that were given up, and the oldest slots."""
        with contextlib.suppress(SlotError):  # whoever needs the round's number reports that it is damaged
            now = _round_of(self.directory / "slots")
            earlier = [number for number in self._history() if number < now]
            pinned = [] if self._pinned is None else [number for number in earlier if number <= self._pinned][-1:]
            for number in set(self._history()) - {
                *earlier[-self.keep :],
                *pinned,
            }:  # renamed first: a half removed folder must not look like a state
                self._rename(f"history/{number}", f".stale-{number}")
        for path in self.directory.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes in place; a copy if the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(Path(target))


def _is_update(adapter: Adapter) -> bool:
    return all(entry.factor.is_update for entry in adapter.layout.entries)


def _losses_of(folder: Path) -> dict[str, dict[str, float]]:
    """Losses recorded up to a round; :func:`_round_of` has checked the file."""
    path = folder / "state.json"
    if not path.exists():
        return {}
    try:
        found = unsealed(path.read_text()).get("losses", {})
        return {str(name): {str(task): float(loss) for task, loss in of.items()} for name, of in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise SlotError(f"{path} is damaged: {error!r}") from None


def _hidden_in(folder: Path) -> frozenset[str]:
    """Slots that may not leave; :func:`_losses_of` has checked the file."""
    path = folder / "state.json"
    return frozenset(map(str, unsealed(path.read_text()).get("hidden", []))) if path.exists() else frozenset()


def _round_of(folder: Path) -> int:
    """The last round whose plan was carried out, 0 for none."""
    path = folder / "state.json"
    try:
        return int(unsealed(path.read_text())["round"])
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise SlotError(f"{path} is missing") from None
        return 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlotError(f"{path} is damaged: {error!r}") from None
