"""Finds strategies by their run-config name: every class with a ``name`` in ``algorithms``.

A new algorithm is a new file in ``algorithms``; nothing else names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any, TypeGuard

from strategies import algorithms
from strategies.framework import AlloyStrategy
from strategies.framework.options import RunConfig, require_choice

__all__ = ["CONTROLS", "MAIN", "STRATEGIES", "AlloyStrategy", "RunConfig", "strategy_from_run_config"]

_GROUPS = ("reference", "main", "related", "control")


def find_strategies(package: ModuleType) -> dict[str, type[AlloyStrategy[Any]]]:
    """The strategies that the modules of a package define, by group and then by name.

    Raises:
        ImportError: two have the same name, or one has no ``about`` of its own.
    """
    found: dict[str, type[AlloyStrategy[Any]]] = {}
    for item in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for kind in vars(importlib.import_module(item.name)).values():
            if not _is_strategy(kind, item.name):
                continue
            where = f"{item.name}.{kind.__name__}"
            if "about" not in vars(kind):
                raise ImportError(f"strategy {kind.name!r} ({where}) has no `about`, expected one of its own")
            if kind.name in found:
                other = found[kind.name]
                raise ImportError(
                    f"two strategies are named {kind.name!r}: {other.__module__}.{other.__name__} and {where}"
                )
            found[kind.name] = kind
    return dict(sorted(found.items(), key=lambda item: (_GROUPS.index(item[1].about.group), item[0])))


def _is_strategy(kind: object, module: str) -> TypeGuard[type[AlloyStrategy[Any]]]:
    """A class of this module, not one that it imports; families have no ``name``."""
    return (
        isinstance(kind, type)
        and issubclass(kind, AlloyStrategy)
        and kind.__module__ == module
        and "name" in vars(kind)
    )


STRATEGIES = find_strategies(algorithms)
MAIN = tuple(name for name, kind in STRATEGIES.items() if kind.about.group == "main")
"""The strategies that are explained and measured at length."""
CONTROLS = tuple(name for name, kind in STRATEGIES.items() if kind.about.group == "control")
"""The baselines that merging has to beat; every comparison contains them."""


def strategy_from_run_config(run_config: RunConfig) -> AlloyStrategy[Any]:
    """The strategy that run-config names, with its options.

    Raises:
        OptionError: the name is unknown, or an option is not valid.
    """
    name = str(run_config.get("strategy", "fedavg"))
    require_choice("strategy", name, STRATEGIES)
    return STRATEGIES[name].from_run_config(run_config)
