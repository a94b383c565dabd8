"""Parts of a layout as plans name them; both ends compute the same parts, so a blob need not repeat its layout."""

from __future__ import annotations

from collections.abc import Iterable

from adapters.layout import Layout, factor_from_proto
from proto.fedalloy.v1 import plan_pb2


def layout_of_part(layout: Layout, part: plan_pb2.Part) -> Layout:
    """The part of a layout that a plan's ``Part`` selects.

    Raises:
        LayoutError: it names an unknown factor or module, or selects nothing.
    """
    return layout.select([factor_from_proto(number) for number in part.factors], list(part.modules))


def layouts_of_plan(layout: Layout, steps: Iterable[plan_pb2.Step]) -> dict[bytes, Layout]:
    """The client's layout and every part of it that the plan sends, by digest."""
    parts = [layout_of_part(layout, step.send.part) for step in steps if step.WhichOneof("kind") == "send"]
    return {found.digest: found for found in [layout, *parts]}
