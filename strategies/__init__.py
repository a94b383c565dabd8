"""Strategies by the name that run-config gives them. A new algorithm is a new file and a line here."""

from __future__ import annotations

from strategies.apfl import APFL
from strategies.base import AlloyStrategy
from strategies.controls import CONTROLS
from strategies.dare import DARE
from strategies.ditto import Ditto
from strategies.fedalt import FedALT
from strategies.fedamp import FedAMP
from strategies.fedavg import FedAvg
from strategies.feddpa import FedDPA
from strategies.fedem import FedEM
from strategies.fedex_lora import FedExLoRA
from strategies.fedfomo import FedFomo
from strategies.fedmerge import FedMerge
from strategies.fedmosaic import FedMosaic
from strategies.fedprox import FedProx
from strategies.fedrep import FedRep
from strategies.fedsa_lora import FedSALoRA
from strategies.ffa_lora import FFALoRA
from strategies.fisher_merge import FisherMerge
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.fml import FML
from strategies.ifca import IFCA
from strategies.local import Local
from strategies.nan_merge import NAN
from strategies.options import RunConfig, require_choice
from strategies.pfedgraph import PFedGraph
from strategies.potara import Potara
from strategies.regmean import RegMean
from strategies.rolora import RoLoRA
from strategies.tap import Tap
from strategies.task_arithmetic import TaskArithmetic
from strategies.ties import TIES

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
