"""Updates that rounds add to every client's frozen base. They travel once and stay at the client, in their own slot.

The base model itself is never written: the sum of all updates is a slot of growing rank, and a client's model is the
base plus that slot plus what is trained. Once the ranks exceed what a module's delta can have, they are cut to that,
which is exact.

A client adds what it lacks to a *copy* of what it is known to hold, and two names take turns. So nothing is added twice
if a plan was carried out and its answer was lost.

Updates lie in the run's bank, and uploads are stacked a few modules at a time. The updates that a client lacks are
combined when its message is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Factor, Layout
from proto.fedalloy.v1 import plan_pb2
from strategies.families.by_modules import by_modules
from strategies.families.fedavg import SLOT, Averaging
from strategies.framework import AlloyStrategy, Answer, Brief, Client, OptionsT, State, steps

MERGED = ("merged-odd", "merged-even")
UPDATE = "update"


def full_ranks(layout: Layout) -> dict[str, int]:
    """The highest rank that each module's delta can have."""
    sizes = {(e.module, e.factor): e.shape for e in layout.entries}
    return {m: min(sizes[m, Factor.A][1], sizes[m, Factor.B][0]) for m in layout.lora_modules}


def compact(update: Adapter) -> Adapter:
    """The same update, with its ranks cut to what its deltas can have."""
    full = full_ranks(update.layout)
    ranks = {module: min(rank, full[module]) for module, rank in update.layout.ranks.items()}
    return update if ranks == update.layout.ranks else truncate(update, update.layout.with_ranks(ranks))


class MergedBase(Averaging[OptionsT]):
    """FedAvg whose rounds also add to the base. Variants say in :meth:`average` what is added (:meth:`add`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates = Bank(self.storage)  # by number; none is changed or removed
        self.held: dict[str, tuple[int, int]] = {}  # updates in a client's slot, and which of the two names it has

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Equal layouts: a base has no groups."""
        return first.digest == second.digest

    def enrol(self, client: Client) -> None:
        """The first client's layout is the federation's."""
        AlloyStrategy.enrol(self, client)  # FedAvg's own makes a union of groups
        if self.model is None:
            self.model = Adapter.initial(client.layout, self.seed)

    def add(self, update: Adapter) -> None:
        """Add this to every client's base from the next round on."""
        self.updates[_name(len(self.updates))] = compact(update)

    def brief(self, round_: int, client: Client) -> Brief:
        """FedAvg's round on the changed base."""
        return Brief(super().brief(round_, client).steps, Made(self.sent(client)))

    def deliver(self, client: Client) -> Brief:
        """FedAvg's, with the changed base."""
        return Brief(super().deliver(client).steps, Made(self.sent(client)))

    def sent(self, client: Client) -> dict[str, Callable[[], Adapter]]:
        """Recipes of what the client is sent, by slot: the adapter, and what its base lacks."""
        count, _ = self.held.get(client.id, (0, 0))
        model, missing = self.part_of(client), list(self.updates)[count:]
        update = {UPDATE: partial(self._together, missing)} if missing else {}
        return {SLOT: lambda: model, **update}

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Note that the client now holds all updates so far."""
        super().absorb(round_, client, answer)
        self.held[client.id] = (len(self.updates), self._target(client))

    def prepare(self, round_: int, client: Client) -> list[steps.Step]:
        """Add what the client lacks."""
        count, name = self.held.get(client.id, (0, 0))
        if count == len(self.updates):
            return []
        terms = [MERGED[name], UPDATE] if count else [UPDATE]
        rank = max(full_ranks(client.layout).values())
        grown = sum(max(self.updates.layout_of(update).ranks.values()) for update in self.updates)
        merge = steps.merge(MERGED[1 - name], steps.mixture(*terms), truncate_rank=rank if grown > rank else 0)
        return [merge]

    def personal(self, client: Client) -> plan_pb2.Mixture:
        """The changed base and the adapter."""
        return steps.mixture(SLOT, MERGED[self._target(client)]) if self.updates else steps.mixture(SLOT)

    def train(self, round_: int, client: Client) -> list[steps.Step]:
        """Train the adapter; the base stays as it is."""
        return [steps.train(self.training, self.personal(client), [SLOT])]

    def state(self) -> State:
        """The adapter, all updates with their ranks, and how many of them each client holds."""
        held = {name: list(pair) for name, pair in self.held.items()}
        ranks = [self.updates.layout_of(update).ranks for update in self.updates]
        found = super().state()
        found.values |= {"ranks": ranks, "held": held}
        found.keep("update", self.updates)
        return found

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        super().load_state(state)
        self.held = {name: (int(pair[0]), int(pair[1])) for name, pair in state.values["held"].items()}
        self.updates.clear()
        for name, ranks in zip(map(_name, range(len(state.values["ranks"]))), state.values["ranks"], strict=True):
            self.updates.put_row(name, _unscaled(self.global_model.layout, ranks), state.row(f"update/{name}"))

    def _target(self, client: Client) -> int:
        count, name = self.held.get(client.id, (0, 0))
        return name if count == len(self.updates) else 1 - name

    def _together(self, names: Sequence[str]) -> Adapter:
        return compact(stack([self.updates[name] for name in names], [1.0] * len(names)))


def _name(index: int) -> str:
    return f"{index:06d}"


def _unscaled(layout: Layout, ranks: Mapping[str, int]) -> Layout:
    found = layout.with_ranks(ranks)
    return Layout(found.entries, dict.fromkeys(found.lora_modules, 1.0), found.base_fingerprint)


def exact_sum(adapters: Bank, coefficients: Sequence[float]) -> Adapter:
    """The exact weighted sum of the deltas as a stack of their ranks, cut to what the sum can have."""
    layouts = [adapters.layout_of(name) for name in adapters]
    ranks = {module: sum(layout.ranks[module] for layout in layouts) for module in layouts[0].ranks}
    return by_modules(adapters, lambda parts: compact(stack(parts, list(coefficients))), layout_at(layouts[0], ranks))


def layout_at(layout: Layout, ranks: Mapping[str, int]) -> Layout:
    """The layout of an update with these ranks, once it is :func:`compact`."""
    full = full_ranks(layout)
    return _unscaled(layout, {module: min(rank, full[module]) for module, rank in ranks.items()})
