"""Merges that look at one module at a time, so that only a few modules of all adapters are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack, truncate
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Layout, LayoutError

_TOGETHER = 2**24
"""Count of numbers, over all clients, in memory at a time: 64 MiB."""


def bank_of(adapters: Sequence[Adapter] | Bank) -> Bank:
    """A bank of these adapters, in the order given; a bank is returned as it is."""
    if isinstance(adapters, Bank):
        return adapters
    return Bank.of({f"{index:08d}": adapter for index, adapter in enumerate(adapters)})


def by_modules(
    adapters: Sequence[Adapter] | Bank, merge: Callable[[list[Adapter]], Adapter], layout: Layout
) -> Adapter:
    """Apply ``merge`` to a few modules at a time, and join the results.

    Args:
        adapters: with the same modules; ranks may differ.
        merge: merges parts with the same modules; its result for a module depends on no other module.
        layout: layout of the result.

    Raises:
        LayoutError: there are no adapters.
    """
    bank = bank_of(adapters)
    if not bank:
        raise LayoutError("got no adapters, expected at least one")
    layouts = {found.digest: found for found in map(bank.layout_of, bank)}
    result: Adapter | None = None
    for modules in in_turns(next(iter(layouts.values())), len(bank)):
        parts = {digest: whole.select((), modules) for digest, whole in layouts.items()}
        merged = merge([bank.part(name, parts[bank.layout_of(name).digest]) for name in bank])
        if result is None:
            result = Adapter.zeros(layout, merged.vector.dtype)
        for entry, tensor in merged.items():
            result[entry.module, entry.factor].copy_(tensor)
    return Adapter.zeros(layout) if result is None else result


def in_turns(layout: Layout, count: int) -> list[list[str]]:
    """All modules, in groups that fit in memory for ``count`` clients."""
    sizes = dict.fromkeys(layout.modules, 0)
    for entry in layout.entries:
        sizes[entry.module] += math.prod(entry.shape)
    turns: list[list[str]] = []
    room = 0
    for module, size in sizes.items():
        if size * count > room or not turns:
            turns.append([])
            room = _TOGETHER
        turns[-1].append(module)
        room -= size * count
    return turns


def exact_average(adapters: Sequence[Adapter] | Bank, coefficients: Sequence[float], rank: int = 0) -> Adapter:
    """``sum_k c_k Delta_k``, exact up to the truncation to ``rank`` (0: the first adapter's rank)."""
    layout = at_rank(adapters, rank)

    def merge(parts: list[Adapter]) -> Adapter:
        return truncate(stack(parts, list(coefficients)), at_rank(parts, rank))

    return by_modules(adapters, merge, layout.folded)


def at_rank(adapters: Sequence[Adapter] | Bank, rank: int) -> Layout:
    """The adapters' layout at another rank (0: their own); it is at most the rank of all of them stacked."""
    layout = adapters.layout_of(next(iter(adapters))) if isinstance(adapters, Bank) else adapters[0].layout
    return layout.with_ranks({m: min(rank, r * len(adapters)) for m, r in layout.ranks.items()}) if rank else layout
