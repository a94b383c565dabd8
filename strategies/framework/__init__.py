"""What a strategy's file needs: ``from strategies.framework import About, Brief, ...`` and ``steps``, ``options``."""

from strategies.framework.contract import About, OptionsT
from strategies.framework.exchange import Answer, Brief, Client, State, StrategyError
from strategies.framework.flower import AlloyStrategy, log

__all__ = ["About", "AlloyStrategy", "Answer", "Brief", "Client", "OptionsT", "State", "StrategyError", "log"]
