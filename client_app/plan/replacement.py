"""The margin rule: recorded losses decide which parameter groups of one slot are replaced by another's.

TAP (arXiv 2509.26524), its rule (1) with a strict inequality: for each task o, groups are replaced if
``source loss + margin < target loss``. A loss that is not known or not finite counts as infinite. So a target that was
never trained, or has diverged, is replaced by any source with a known loss, and a source without one replaces nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from client_app.data.dataset import ClientData
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.groups import groups_of, layout_of_groups
from fedalloy_adapters.layout import Layout, LayoutError
from proto.fedalloy.v1 import plan_pb2, report_pb2


class ReplacementError(ValueError):
    """A replace step does not fit this client."""


def fires(source: float, target: float, margin: float, *, relative: bool = False) -> bool:
    """Whether a task's groups should be replaced; see the module's docstring."""
    if not math.isfinite(source) or math.isnan(margin):
        return False
    if math.isinf(margin):  # an infinite relative margin times a loss of zero would be NaN
        return margin < 0
    if not math.isfinite(target):
        target = math.inf
    return (source * (1 + margin) if relative else source + margin) < target


def fired_tasks(
    rules: Iterable[plan_pb2.ReplaceRule], source: Mapping[str, float], target: Mapping[str, float]
) -> list[str]:
    """Tasks whose rules fire; losses by task."""
    return [
        rule.task
        for rule in rules
        if fires(
            source.get(rule.task, math.inf),
            target.get(rule.task, math.inf),
            rule.margin,
            relative=rule.relative,
        )
    ]


def replaced_groups(tasks: Mapping[str, Sequence[str]], fired: Iterable[str], *, exclusive: bool) -> set[str]:
    """The groups of all tasks that fired; ``exclusive``: without those that another task also uses.

    Args:
        tasks: the groups of every task of the client.
        fired: names of tasks.
        exclusive: leave out what a task that did not fire uses.
    """
    chosen = set(fired)
    groups = {group for task in chosen for group in tasks[task]}
    if exclusive:
        groups -= {group for task, used in tasks.items() if task not in chosen for group in used}
    return groups


def replace_groups(target: Adapter, source: Adapter, groups: set[str]) -> tuple[Adapter, int]:
    """A copy of ``target`` with these groups of ``source``, and how many numbers were replaced.

    Raises:
        LayoutError: the layouts differ, or lack a group.
    """
    if target.layout.digest != source.layout.digest:
        raise LayoutError(f"found {target.layout.describe_difference(source.layout)}")
    if not groups:
        return target, 0
    part = layout_of_groups(source.layout, groups)
    return target.with_part(source.part(part)), part.size


def carry_out(bench: Workbench, step: plan_pb2.ReplaceStep) -> report_pb2.ReplaceResult:
    """Apply a step's rules to the slots' recorded losses, and copy the groups that they name.

    Raises:
        LayoutError: a slot does not have the client's layout, or a task's groups are not those of the adapter.
        ReplacementError: a rule is for a task that the client does not have.
    """
    slots, tasks = bench.slots, task_groups(bench.data, bench.model.layout)
    unknown = [rule.task for rule in step.rules if rule.task not in tasks]
    if unknown:
        raise ReplacementError(f"a rule for task {unknown[0]!r}; this client has {', '.join(tasks)}")
    source, target = (slots.losses.get(name, {}) for name in (step.source_record, step.target_record))
    fired = fired_tasks(step.rules, source, target)
    groups = replaced_groups(tasks, fired, exclusive=step.exclusive)
    replaced, numbers = replace_groups(slots[step.target], slots[step.source], groups)
    if groups == set(groups_of(bench.model.layout)):  # own heads go with a whole adapter
        slots.set_whole(step.target, slots.whole(step.source).clone())
    elif groups:
        slots[step.target] = replaced
    result = report_pb2.ReplaceResult(numbers=numbers)
    for rule in step.rules:
        result.tasks.add(
            task=rule.task,
            replaced=rule.task in fired,
            source_loss=source.get(rule.task),
            target_loss=target.get(rule.task),
        )
    bench.replaced = bench.replaced or any(task.replaced for task in result.tasks)
    return result


def task_groups(data: ClientData, layout: Layout) -> dict[str, tuple[str, ...]]:
    """The groups of every task of a client, checked against its adapter's layout.

    Raises:
        LayoutError: a task declares a group that the adapter lacks, or the adapter has one that no task declares.
    """
    found = {name: task.groups or ("",) for name, task in data.each_task.items()}
    declared = {group for groups in found.values() for group in groups}
    there = set(groups_of(layout))
    if declared != there:
        odd = sorted(declared ^ there)[0]
        only = "declared by a task, and not in the adapter" if odd in declared else "in the adapter, and no task's"
        raise LayoutError(f"group {odd!r} is {only}")
    return found
