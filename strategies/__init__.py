"""Strategies by the name that run-config gives them. A new algorithm is a new file and a line here."""

from __future__ import annotations

from strategies.base import AlloyStrategy
from strategies.fedavg import FedAvg
from strategies.fedmerge import FedMerge
from strategies.fedmosaic import FedMosaic
from strategies.local import Local
from strategies.options import RunConfig, require_choice
from strategies.potara import Potara
from strategies.tap import Tap

__all__ = ["STRATEGIES", "AlloyStrategy", "RunConfig", "strategy_from_run_config"]

_ALL: tuple[type[AlloyStrategy], ...] = (Local, FedAvg, FedMerge, FedMosaic, Potara, Tap)
STRATEGIES: dict[str, type[AlloyStrategy]] = {strategy.name: strategy for strategy in _ALL}


def strategy_from_run_config(run_config: RunConfig) -> AlloyStrategy:
    """The strategy that run-config names, with its options.

    Raises:
        OptionError: the name is unknown, or an option is not valid.
    """
    name = str(run_config.get("strategy", "fedavg"))
    require_choice("strategy", name, STRATEGIES)
    return STRATEGIES[name].from_run_config(run_config)
