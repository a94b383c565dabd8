"""Parameter groups: the part of an adapter that some clients own and others do not.

A module named ``<group>::<path>`` belongs to ``<group>``. A module without ``::`` belongs to the group ``""``, which is
the whole of an ordinary adapter. Group ids are ``shared``, ``mod/<modality>``, ``task/<expert>``,
``pair/<modality>/<expert>`` and ``head/<task>``. Clients own different groups, hence have different layouts; a group
that two of them own is the same in both. Groups are matched by their whole id, never by a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Bank
from fedalloy_adapters.layout import Entry, Layout, LayoutError

SEPARATOR = "::"
MAX_GROUPS = 1000
GROUP_ID = re.compile(r"shared|(mod|task|head)/[A-Za-z0-9_-]+|pair/[A-Za-z0-9_-]+/[A-Za-z0-9_-]+")


def group_of(module: str) -> str:
    """The group that a module of a layout belongs to."""
    return module.partition(SEPARATOR)[0] if SEPARATOR in module else ""


def groups_of(layout: Layout) -> tuple[str, ...]:
    """The groups of a layout, in order of first appearance.

    Raises:
        LayoutError: a group's id is not valid, or there are more than :data:`MAX_GROUPS`.
    """
    found = tuple(dict.fromkeys(group_of(module) for module in layout.modules))
    if len(found) > MAX_GROUPS:
        raise LayoutError(f"{len(found)} groups, expected at most {MAX_GROUPS}")
    for group in found:
        if group and not GROUP_ID.fullmatch(group):
            raise LayoutError(
                f"group {group[:80]!r}, expected shared, mod/<modality>, task/<expert>, pair/<modality>/<expert> or "
                "head/<task>"
            )
    return found


def layout_of_groups(layout: Layout, groups: Iterable[str]) -> Layout:
    """The part of a layout in these groups.

    Raises:
        LayoutError: the layout lacks one of them.
    """
    wanted = set(groups)
    missing = wanted - set(groups_of(layout))
    if missing:
        raise LayoutError(f"no group {sorted(missing)[0]!r} in the layout; it has {', '.join(groups_of(layout))}")
    return layout.select(modules=[module for module in layout.modules if group_of(module) in wanted])


def group_difference(first: Layout, second: Layout) -> str | None:
    """Why two clients cannot share the groups that both own (they must be equal), in one line; None if they can.

    Raises:
        LayoutError: a group's id is not valid.
    """
    for group in groups_of(first):
        if group in groups_of(second):
            ours, theirs = layout_of_groups(first, [group]), layout_of_groups(second, [group])
            if ours.digest != theirs.digest:
                return f"{ours.describe_difference(theirs)}{f' in group {group!r}' if group else ''}"
    if first.base_fingerprint != second.base_fingerprint or ("" in groups_of(first)) != ("" in groups_of(second)):
        return first.describe_difference(second)
    return None


def union(layouts: Iterable[Layout]) -> Layout:
    """The layout of all groups that any client owns, ordered by id; a single layout is returned as it is.

    Raises:
        LayoutError: there is none, or two of them differ in a group that both have.
    """
    found = list(layouts)
    if not found:
        raise LayoutError("got no layouts, expected at least one")
    parts: dict[str, Layout] = {}
    for layout in found:
        difference = group_difference(found[0], layout)
        if difference is not None:
            raise LayoutError(f"found {difference}")
        for group in groups_of(layout):
            part = layout_of_groups(layout, [group])
            if parts.setdefault(group, part).digest != part.digest:
                raise LayoutError(f"two layouts of group {group!r}: {parts[group].describe_difference(part)}")
    if list(parts) == [""]:
        return found[0]
    entries: list[Entry] = []
    scalings: dict[str, float] = {}
    for group in sorted(parts):
        entries += parts[group].entries
        scalings |= parts[group].scalings
    return Layout(tuple(entries), scalings, found[0].base_fingerprint)


def average_groups(
    model: Adapter,
    adapters: Mapping[str, Adapter],
    average: Callable[[str, Bank], Adapter],
) -> Adapter:
    """``model`` with every group replaced by the average over its owners; groups without owners stay.

    Args:
        model: in the union of the clients' layouts.
        adapters: by client, each with some whole groups of that layout.
        average: called with a group's id and its owners' parts by client.
    """
    result, bank = model, Bank.of(adapters)
    for group in groups_of(model.layout):
        layout = layout_of_groups(model.layout, [group])
        owners = bank.parts(layout)
        if owners:
            averaged = average(group, owners)
            result = averaged if layout is model.layout else result.with_part(averaged)
    return result
