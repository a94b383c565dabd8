"""Every strategy, with options that three small clients can play, and these clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, MetricRecord

from strategies import STRATEGIES, AlloyStrategy
from strategies.algorithms.fedavg import FedAvgOptions
from strategies.algorithms.fedmerge import FedMergeOptions
from strategies.algorithms.potara_options import PotaraOptions
from tests.strategies.conftest import (
    FakeGrid,
    FakeNode,
    client_of,
    layout_of,
)

LAYOUT = layout_of()
NAMES = ("ada", "ben", "cyd")
BUILDS: dict[str, Callable[..., AlloyStrategy]] = {
    "local": lambda **k: STRATEGIES["local"](**k),
    "fedavg": lambda **k: STRATEGIES["fedavg"](**k),
    "fedavg-delta": lambda **k: STRATEGIES["fedavg"](FedAvgOptions("delta"), **k),
    **{
        f"fedmerge-{variant}": lambda variant=variant, **k: STRATEGIES["fedmerge"](
            FedMergeOptions(models=3, variant=variant, init="jitter", lr_w=0.05), **k
        )
        for variant in ("frozen-a", "trained-a", "factors")
    },
    "fedmerge-cluster": lambda **k: STRATEGIES["fedmerge"](
        FedMergeOptions(models=2, init="cluster", w_step="adam"), **k
    ),
    **{
        f"potara-{label}": lambda options=options, **k: STRATEGIES["potara"](
            PotaraOptions(federated_rounds=1, **options), **k
        )
        for label, options in {
            "default": {},
            "plugin": {"weight": "plugin"},
            "server": {"weight": "random-effects", "merge_at": "server", "granularity": "module", "space": "factor"},
            "parameter": {"weight": "client-fisher", "granularity": "parameter", "space": "factor"},
            "search": {"weight": "line-search", "search_points": 3, "space": "delta-truncated"},
        }.items()
    },
}
BUILDS["tap"] = lambda **k: STRATEGIES["tap"](**k)
BUILDS["fedmosaic"] = lambda **k: STRATEGIES["fedmosaic"](**k)
# Their clients do more than move one adapter and send it back, so the nodes themselves play them.
RIVALS = sorted(set(STRATEGIES) - {"local", "fedavg", "fedmerge", "potara", "fedmosaic", "tap"})
BUILDS |= {name: lambda name=name, **k: STRATEGIES[name](**k) for name in RIVALS}
# Their factors may rotate, and these clients measure factors.
DELTAS = {"fedavg-delta", "flora", "flexlora", "fedex-lora", "nan", "task-arithmetic", "ties", "dare", "regmean"}
ANY_RANK = {"local", "local-all", "local-twice", "flora", "flexlora", "hetlora", "pfedhn"}
every_strategy = pytest.mark.parametrize("name", BUILDS)


def nodes(layout: Any = LAYOUT) -> list[FakeNode]:
    return [FakeNode(name, layout, examples=10 + 5 * index) for index, name in enumerate(NAMES)]


def enrolled(name: str, **options: Any) -> AlloyStrategy:
    strategy = BUILDS[name](seed=7, **options)
    for index, client in enumerate(NAMES):
        strategy.enrol(client_of(client, LAYOUT, 10 + 5 * index, node_id=index + 1))
    return strategy


def accuracies(strategy: AlloyStrategy, grid: FakeGrid, rounds: int = 2) -> list[MetricRecord]:
    found = strategy.start(grid, initial_arrays=ArrayRecord(), num_rounds=rounds).evaluate_metrics_clientapp
    assert list(found) == list(range(1, rounds + 1))
    return list(found.values())
