"""Parts of a layout as plans name them. Both ends compute the same parts, so a blob need not repeat its layout."""

from __future__ import annotations

from collections.abc import Iterable

from fedalloy_adapters.factors import factor_from_proto
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from proto.fedalloy.v1 import plan_pb2


def layout_of_part(layout: Layout, part: plan_pb2.Part) -> Layout:
    """The part of a layout that a plan's ``Part`` selects.

    Raises:
        LayoutError: it names an unknown factor or module, or selects nothing.
    """
    factors = [factor_from_proto(number) for number in part.factors]
    return layout.select(factors, list(part.modules), without_basis=part.without_basis)


def layouts_of_plan(layout: Layout, steps: Iterable[plan_pb2.Step]) -> dict[bytes, Layout]:
    """The client's layout and every part of it that the plan sends, by digest."""
    parts = [layout_of_part(layout, step.send.part) for step in steps if step.WhichOneof("kind") == "send"]
    return {found.digest: found for found in [layout, *parts]}


def layout_of_sketch(reference: Layout, row_count: int) -> Layout:
    """The layout of a sketch with ``row_count`` rows of the reference gradient ``[d, f]``.

    Raises:
        LayoutError: the gradient is not one matrix with that many rows.
    """
    shapes = [entry.shape for entry in reference.entries if entry.factor is Factor.GRADIENT]
    if len(shapes) != len(reference.entries) or len(shapes) != 1 or len(shapes[0]) != 2:
        found = [f"{entry.factor} {entry.shape}" for entry in reference.entries]
        raise LayoutError(f"a reference gradient is {found}, expected one matrix of a gradient")
    if not 1 <= row_count <= shapes[0][0]:
        raise LayoutError(
            f"{row_count} rows of a reference gradient of shape {shapes[0]}, expected 1 to {shapes[0][0]}"
        )
    (entry,) = reference.entries
    return Layout((Entry(entry.module, entry.factor, (row_count, entry.shape[1])),), {}, reference.base_fingerprint)


def layout_of_gram(layout: Layout) -> Layout:
    """The layout of the second moments of a client's module inputs: an upper triangle for each module with an input.

    Raises:
        LayoutError: no module is a matrix.
    """
    widths = {
        e.module: e.shape[1] for e in layout.entries if e.factor in (Factor.A, Factor.WEIGHT) and len(e.shape) == 2
    }
    entries = tuple(Entry(module, Factor.GRAM, (width * (width + 1) // 2,)) for module, width in widths.items())
    return Layout(entries, {}, layout.base_fingerprint)
