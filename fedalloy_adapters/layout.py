"""What the numbers of an adapter mean: ordered, named tensors over one base model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakValueDictionary

from fedalloy_adapters.factors import Factor as Factor
from fedalloy_adapters.factors import LayoutError as LayoutError
from fedalloy_adapters.factors import factor_from_proto, factor_to_proto
from proto.fedalloy.v1 import adapter_pb2

MAX_ENTRIES = 1_000_000
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 8
MAX_SIZE = 2**31 - 1


_RANK_AXES = {Factor.A: (0,), Factor.B: (1,), Factor.P: (0, 1), Factor.Q: (0,)}


@dataclass(frozen=True)
class Entry:
    """One named tensor: A is ``(rank, d_in)``, B ``(d_out, rank)``, P ``(rank, rank)`` and Q ``(rank,)``."""

    module: str
    factor: Factor
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique name within a layout, ``module.factor``."""
        return f"{self.module}.{self.factor}"

    @property
    def size(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)

    @property
    def rank_axes(self) -> tuple[int, ...]:
        """The dimensions of a LoRA factor that are the rank."""
        return _RANK_AXES.get(self.factor, ())


@dataclass(frozen=True)
class Layout:
    """Ordered entries, one scaling per LoRA module, and the fingerprint of the base model they belong to.

    Two adapters can be added number by number exactly if their layouts have the same ``digest``. ``shared_names`` gives
    modules with P and Q the names by which layouts of other architectures know them
    (:mod:`fedalloy_adapters.co_lora_names`).

    Raises:
        LayoutError: a name, shape, rank or scaling is not valid (says which).
    """

    entries: tuple[Entry, ...]
    scalings: Mapping[str, float]
    base_fingerprint: str
    shared_names: Mapping[str, str] = field(default_factory=dict)
    _offsets: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        _validate(self)
        offsets: dict[str, tuple[int, int]] = {}
        position = 0
        for entry in self.entries:
            offsets[entry.name] = (position, position + entry.size)
            position += entry.size
        object.__setattr__(self, "_offsets", offsets)

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def size(self) -> int:
        """P: the count of numbers in an adapter of this layout."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Modules in order of first appearance."""
        return tuple(dict.fromkeys(entry.module for entry in self.entries))

    @cached_property
    def lora_modules(self) -> tuple[str, ...]:
        """Modules with LoRA factors, in order of first appearance."""
        return tuple(dict.fromkeys(entry.module for entry in self.entries if entry.factor.is_lora))

    @cached_property
    def head_modules(self) -> tuple[str, ...]:
        """The head: modules without LoRA factors, trained whole; in order of first appearance."""
        return tuple(module for module in self.modules if module not in self.lora_modules)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each LoRA module."""
        return {entry.module: entry.shape[entry.rank_axes[0]] for entry in self.entries if entry.factor.is_lora}

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        """Entries by their name ``module.factor``."""
        return {entry.name: entry for entry in self.entries}

    def slice_of(self, name: str) -> slice:
        """Where the entry ``module.factor`` lies in the flat vector."""
        return slice(*self._offsets[name])

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON text (proto/README.md), 32 bytes."""
        canonical: dict[str, object] = {
            "base": self.base_fingerprint,
            "entries": [[entry.module, str(entry.factor), list(entry.shape)] for entry in self.entries],
            "scalings": [[module, float(self.scalings[module]).hex()] for module in self.lora_modules],
        }
        if self.shared_names:  # left out if there are none, so that layouts without P and Q keep their digests
            canonical["shared"] = sorted([module, name] for module, name in self.shared_names.items())
        return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).digest()

    def select(
        self, factors: Iterable[Factor] = (), modules: Iterable[str] = (), *, without_basis: bool = False
    ) -> Layout:
        """The part with these factors and modules; an empty list does not restrict.

        ``without_basis`` leaves out A and B of modules that have P: all clients have the same ones and never train
        them.

        Raises:
            LayoutError: a module is not in this layout, or nothing is left.
        """
        wanted_factors, wanted_modules = set(factors), set(modules)
        unknown = wanted_modules - set(self.modules)
        if unknown:
            raise LayoutError(f"no module {sorted(unknown)[0]!r} in the layout; it has {', '.join(self.modules)}")
        kept = tuple(
            entry
            for entry in self.entries
            if (not wanted_factors or entry.factor in wanted_factors)
            and (not wanted_modules or entry.module in wanted_modules)
            and not (without_basis and self.is_basis(entry))
        )
        if not kept:
            raise LayoutError(f"factors {sorted(wanted_factors)} of modules {sorted(wanted_modules)} select nothing")
        if len(kept) == len(self.entries):
            return self
        lora = {entry.module for entry in kept if entry.factor.is_lora}
        scalings = {module: self.scalings[module] for module in self.lora_modules if module in lora}
        shared = {entry.module for entry in kept if entry.factor in (Factor.P, Factor.Q)}
        names = {module: name for module, name in self.shared_names.items() if module in shared}
        return Layout(kept, scalings, self.base_fingerprint, names)

    def is_basis(self, entry: Entry) -> bool:
        """Whether this is A or B of a module that has P between them."""
        return entry.factor in (Factor.A, Factor.B) and f"{entry.module}.{Factor.P}" in self.by_name

    @cached_property
    def folded(self) -> Layout:
        """This layout as it is once P is multiplied into A (:func:`fedalloy_adapters.algebra.fold`)."""
        kept = tuple(entry for entry in self.entries if entry.factor is not Factor.P)
        if len(kept) == len(self.entries):
            return self
        lora = {entry.module for entry in kept if entry.factor.is_lora}
        scalings = {module: self.scalings[module] for module in self.lora_modules if module in lora}
        return Layout(kept, scalings, self.base_fingerprint)

    def with_ranks(self, ranks: Mapping[str, int]) -> Layout:
        """This layout without P, at other ranks; scalings are unchanged.

        Raises:
            LayoutError: a LoRA module has no rank.
        """
        missing = set(self.lora_modules) - set(ranks)
        if missing:
            raise LayoutError(f"no rank for module {sorted(missing)[0]!r}")
        layout = self.folded
        entries = [
            Entry(e.module, e.factor, tuple(ranks[e.module] if i in e.rank_axes else n for i, n in enumerate(e.shape)))
            for e in layout.entries
        ]
        return Layout(tuple(entries), layout.scalings, layout.base_fingerprint)

    def joined(self, other: Layout) -> Layout:
        """The entries of both, this one's first.

        Raises:
            LayoutError: they overlap, or their bases differ.
        """
        if self.base_fingerprint != other.base_fingerprint:
            raise LayoutError(f"adapters of two bases: {self.describe_difference(other)}")
        return Layout(
            (*self.entries, *other.entries),
            {**self.scalings, **other.scalings},
            self.base_fingerprint,
            {**self.shared_names, **other.shared_names},
        )

    def contains(self, part: Layout) -> bool:
        """Whether every entry of ``part`` is in this layout with the same shape, scaling and base model."""
        return (
            part.base_fingerprint == self.base_fingerprint
            and all(self.by_name.get(entry.name) == entry for entry in part.entries)
            and all(self.scalings.get(module) == scaling for module, scaling in part.scalings.items())
        )

    def difference(self, other: Layout, *, part: bool = False, any_rank: bool = False) -> str | None:
        """The first difference in one line, or None. This layout is what was expected, the other what was found.

        Args:
            other: what was found.
            part: the other layout need only be contained in this one; missing tensors are no difference.
            any_rank: ranks, scalings and the order of tensors may differ, because deltas can be added all the same.
        """
        if self.base_fingerprint != other.base_fingerprint:
            found, expected = other.base_fingerprint, self.base_fingerprint
            if found[:12] != expected[:12]:
                found, expected = found[:12], expected[:12]
            return f"base model {found}, expected {expected} (fingerprints of the frozen model)"
        if not any_rank:
            for module, rank in self.ranks.items():
                if other.ranks.get(module, rank) != rank:
                    return f"rank {other.ranks[module]} for {module!r}, expected {rank}"
            for module, scaling in self.scalings.items():
                if other.scalings.get(module, scaling) != scaling:
                    return f"scaling {other.scalings[module]} for {module!r}, expected {scaling}"
        for name, entry in self.by_name.items():
            found_entry = other.by_name.get(name)
            if found_entry is None:
                if part:
                    continue
                return f"no tensor {name!r}, expected one of shape {entry.shape}"
            skip = entry.rank_axes if any_rank else ()
            sizes, wanted = ([n for axis, n in enumerate(e.shape) if axis not in skip] for e in (found_entry, entry))
            if sizes != wanted:
                return f"shape {found_entry.shape} for {name!r}, expected {entry.shape}"
        extra = [name for name in other.by_name if name not in self.by_name]
        if extra:
            return f"unknown tensor {extra[0]!r}"
        if part or any_rank or self.digest == other.digest:
            return None
        if dict(self.shared_names) != dict(other.shared_names):
            return f"shared names {dict(other.shared_names)}, expected {dict(self.shared_names)}"
        return "the same tensors in another order"

    def describe_difference(self, other: Layout, *, part: bool = False) -> str:
        """:meth:`difference` for messages about layouts that are known to differ."""
        return self.difference(other, part=part) or "no difference"

    def to_proto(self) -> adapter_pb2.Layout:
        """The wire message."""
        return adapter_pb2.Layout(
            base_fingerprint=self.base_fingerprint,
            entries=[
                adapter_pb2.TensorEntry(module=entry.module, factor=factor_to_proto(entry.factor), shape=entry.shape)
                for entry in self.entries
            ],
            scalings=[
                adapter_pb2.ModuleScaling(module=module, scaling=self.scalings[module]) for module in self.lora_modules
            ],
            shared_names=[
                adapter_pb2.SharedName(module=module, name=name) for module, name in sorted(self.shared_names.items())
            ],
        )

    @classmethod
    def from_proto(cls, message: adapter_pb2.Layout) -> Layout:
        """Read and validate the wire message.

        Raises:
            LayoutError: it is not a valid layout.
        """
        if len(message.entries) > MAX_ENTRIES:
            raise LayoutError(f"{len(message.entries)} entries, at most {MAX_ENTRIES} are allowed")
        scalings = {item.module: item.scaling for item in message.scalings}
        if len(scalings) != len(message.scalings):
            raise LayoutError("a module has two scalings")
        shared_names = {item.module: item.name for item in message.shared_names}
        if len(shared_names) != len(message.shared_names):
            raise LayoutError("a module has two shared names")
        for item in message.entries:
            if len(item.shape) > MAX_DIMENSIONS:  # before a Python tuple takes ten times the memory
                raise LayoutError(f"a tensor has {len(item.shape)} dimensions, expected 1 to {MAX_DIMENSIONS}")
        entries = tuple(
            Entry(item.module, factor_from_proto(item.factor), tuple(item.shape)) for item in message.entries
        )
        return cls(entries, scalings, message.base_fingerprint, shared_names)

    @property
    def shared(self) -> Layout:
        """The one object that stands for all equal layouts, so that a thousand clients have one between them."""
        return _KNOWN.setdefault(self.digest, self)


_KNOWN: WeakValueDictionary[bytes, Layout] = WeakValueDictionary()


def _validate(layout: Layout) -> None:
    if not layout.entries:
        raise LayoutError("a layout needs at least one entry")
    _validate_name("base fingerprint", layout.base_fingerprint)
    seen: set[str] = set()
    ranks: dict[str, int] = {}
    for entry in layout.entries:
        _validate_name("module", entry.module)
        if entry.name in seen:
            raise LayoutError(f"tensor {entry.name!r} occurs twice")
        seen.add(entry.name)
        if not 1 <= len(entry.shape) <= MAX_DIMENSIONS:
            raise LayoutError(f"{entry.name!r} has {len(entry.shape)} dimensions, expected 1 to {MAX_DIMENSIONS}")
        if any(not 1 <= size <= MAX_SIZE for size in entry.shape):
            raise LayoutError(f"{entry.name!r} has shape {entry.shape}, expected sizes from 1 to {MAX_SIZE}")
        if entry.factor.is_lora:
            dimensions = 1 if entry.factor is Factor.Q else 2
            if len(entry.shape) != dimensions:
                expected = "one dimension" if dimensions == 1 else "two dimensions"
                raise LayoutError(f"{entry.name!r} has shape {entry.shape}, expected {expected}")
            rank = entry.shape[entry.rank_axes[0]]
            if entry.factor is Factor.P and entry.shape != (rank, rank):
                raise LayoutError(f"{entry.name!r} has shape {entry.shape}, expected a square")
            if ranks.setdefault(entry.module, rank) != rank:
                raise LayoutError(f"{entry.module!r} has rank {ranks[entry.module]} in one factor, {rank} in the other")
    if set(layout.scalings) != set(ranks):
        odd = sorted(set(layout.scalings) ^ set(ranks))[0]
        raise LayoutError(f"scalings and LoRA modules differ: {odd[:MAX_NAME_BYTES]!r} has only one of them")
    for module, scaling in layout.scalings.items():
        if not math.isfinite(scaling) or scaling <= 0:
            raise LayoutError(f"scaling {scaling} for {module!r}, expected a positive number")
    shareable = {entry.module for entry in layout.entries if entry.factor in (Factor.P, Factor.Q)}
    for module, name in layout.shared_names.items():
        _validate_name("shared", name)
        if module not in shareable:
            raise LayoutError(f"module {module[:MAX_NAME_BYTES]!r} has a shared name, but neither P nor Q")
    if len(set(layout.shared_names.values())) != len(layout.shared_names):
        raise LayoutError(f"two modules have the same shared name: {sorted(layout.shared_names.values())[:8]}")


def _validate_name(what: str, name: str) -> None:
    length = len(name.encode(errors="surrogatepass"))
    if not 1 <= length <= MAX_NAME_BYTES or not name.isprintable():
        raise LayoutError(f"{what} name {name[:40]!r} is not 1 to {MAX_NAME_BYTES} bytes of printable text")
