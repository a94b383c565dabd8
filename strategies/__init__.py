"""Strategies by the name that run-config gives them. A new algorithm is a new file and a line here."""

from __future__ import annotations

from strategies.algorithms.apfl import APFL
from strategies.algorithms.controls import CONTROLS
from strategies.algorithms.dare import DARE
from strategies.algorithms.ditto import Ditto
from strategies.algorithms.fedalt import FedALT
from strategies.algorithms.fedamp import FedAMP
from strategies.algorithms.feddpa import FedDPA
from strategies.algorithms.fedem import FedEM
from strategies.algorithms.fedex_lora import FedExLoRA
from strategies.algorithms.fedfomo import FedFomo
from strategies.algorithms.fedmerge import FedMerge
from strategies.algorithms.fedmosaic import FedMosaic
from strategies.algorithms.fedprox import FedProx
from strategies.algorithms.fedrep import FedRep
from strategies.algorithms.fedsa_lora import FedSALoRA
from strategies.algorithms.ffa_lora import FFALoRA
from strategies.algorithms.fisher_merge import FisherMerge
from strategies.algorithms.flexlora import FlexLoRA
from strategies.algorithms.flora import FLoRA
from strategies.algorithms.fml import FML
from strategies.algorithms.ifca import IFCA
from strategies.algorithms.local import Local
from strategies.algorithms.nan_merge import NAN
from strategies.algorithms.pfedgraph import PFedGraph
from strategies.algorithms.potara import Potara
from strategies.algorithms.regmean import RegMean
from strategies.algorithms.rolora import RoLoRA
from strategies.algorithms.tap import Tap
from strategies.algorithms.task_arithmetic import TaskArithmetic
from strategies.algorithms.ties import TIES
from strategies.families.fedavg import FedAvg
from strategies.framework.contract import AlloyStrategy
from strategies.framework.options import RunConfig, require_choice

__all__ = ["CONTROLS", "STRATEGIES", "AlloyStrategy", "RunConfig", "strategy_from_run_config"]

_OWN: tuple[type[AlloyStrategy], ...] = (Local, FedAvg, FedMerge, FedMosaic, Potara, Tap)
_RIVALS: tuple[type[AlloyStrategy], ...] = (
    FedProx,
    FFALoRA,
    FLoRA,
    FlexLoRA,
    FedExLoRA,
    RoLoRA,
    FedSALoRA,
    Ditto,
    APFL,
    FedDPA,
    FedALT,
    FedRep,
    FML,
    IFCA,
    FedEM,
    FedAMP,
    FedFomo,
    PFedGraph,
    NAN,
    TaskArithmetic,
    TIES,
    DARE,
    FisherMerge,
    RegMean,
)
STRATEGIES: dict[str, type[AlloyStrategy]] = {strategy.name: strategy for strategy in (*_OWN, *_RIVALS, *CONTROLS)}


def strategy_from_run_config(run_config: RunConfig) -> AlloyStrategy:
    """The strategy that run-config names, with its options.

    Raises:
        OptionError: the name is unknown, or an option is not valid.
    """
    name = str(run_config.get("strategy", "fedavg"))
    require_choice("strategy", name, STRATEGIES)
    return STRATEGIES[name].from_run_config(run_config)
