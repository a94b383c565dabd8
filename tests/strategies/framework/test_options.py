"""Run-config: every key of every strategy, and every kind of mistake."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest

from strategies import STRATEGIES, strategy_from_run_config
from strategies.algorithms.fedavg import FedAvgOptions
from strategies.algorithms.fedmerge import FedMergeOptions
from strategies.framework.options import (
    OptionError,
    key_of,
    keys_of,
    read_options,
    require_choice,
    require_known,
    require_range,
)
from strategies.framework.steps import Training

KEBAB = re.compile(r"([a-z]+(-[a-z]+)*\.)?[a-z]+(-[a-z0-9]+)*")
OPTIONS: list[tuple[type[Any], str]] = [
    (Training, ""), *((strategy.Options, f"{name}.") for name, strategy in sorted(STRATEGIES.items()))
]  # fmt: skip

OTHER: dict[str, Any] = {
    "schedule": "cosine", "evaluate-split": "validation", "uplink-encoding": "int4", "downlink-encoding": "bf16",
    "optimizer": "sgd", "optimizer-state": "keep", "schedule-over": "run", "warmup-ratio": 0.25,
    "training-defaults": "plain",
    "fedavg.space": "delta", "fedavg.robust": "median",
    "fedmerge.variant": "factors", "fedmerge.w-step": "adam", "fedmerge.theta-norm": "none",
    "fedmerge.init": "jitter", "fedmerge.w-layers": "head.*,*.B",
    "potara.weight": "plugin", "potara.granularity": "module", "potara.space": "factor", "potara.merge-at": "server",
    "potara.calibration": "train", "potara.dampings": "0.1,0.01",
    "potara.trace-space": "delta", "potara.fed-scale": "total",
    "potara.variance": "curvature",
    "fedmosaic.similarity": "column-mean", "fedmosaic.gate": "input", "fedmosaic.sketch-row-choice": "first",
    "fedmosaic.sketch-noise-at": "gradients", "fedmosaic.sketch-gradient": "diagonal",
    "fedmosaic.sketch-encoding": "int8", "fedmosaic.sketch-rows": 0.75, "fedmosaic.sketch-new-weight": 0.25,
    "fedmosaic.max-relevance": 0.5,
    "apfl.alpha": 0.25, "co-pfl.direction-share": 0.25, "dare.drop": 0.25,
    "fedalt.mixer": "scalar", "feddpa.variant": "f", "feddpa.weights": "example", "feddpa.local-share": 0.25,
    "fedfomo.explore": 0.25, "own": "*.v_proj", "own-steps": 0.25, "fml.alpha": 0.25, "fml.beta": 0.25,
    "fedppa.alignment": 0.25, "pfedhn.rate": 0.25,
    "persa-fl.envelope": "moreau", "persa-fl.move": 0.25, "persa-fl.rate": 0.5, "straggler-resilient.first": 0.25,
    "regmean.shrink": 0.25, "ties.density": 0.5,
    "tap.margins": "causal-lm=0.02", "tap.margin-mode": "rel", "tap.history": "probe",
    "tap.history-norm": "batch-share", "tap.replace-source": "global", "tap.replace-scope": "exclusive",
    "tap.seed-mode": "reference", "tap.weight": "task", "tap.kd-teacher": "global", "tap.kd-reduction": "first-dim",
    "tap.kd-weights": "causal-lm=0.25", "tap.kd-losses": "causal-lm=mse", "tap.deliver": "stage1",
}  # fmt: skip
"""A valid value that is not the default, for every key of text and for shares."""

ALONG: dict[str, dict[str, Any]] = {
    "potara.granularity": {"potara.weight": "plugin"},
    "momentum": {"optimizer": "sgd"},
}
"""What else must change for a key's other value to be valid."""
ALONE = ("fedavg.normalise", "fedavg.robust", "potara.dampings", "warmup-ratio")
"""Keys whose other value is not valid when all other keys have other values, too."""


def another(key: str, default: Any) -> Any:
    """A valid value that is not the default."""
    for known in (key, key.rpartition(".")[2]):  # by the field's name, too: several strategies have an `own` part
        if known in OTHER:
            return OTHER[known]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 3
    assert isinstance(default, float), f"{key} needs another value in OTHER"
    return default * 2 + 0.5


def all_others(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Every key with a value that is not the default, if the other values allow one."""
    return {key: default if key in ALONE else another(key, default) for key, default in defaults.items()}


@pytest.mark.parametrize(("kind", "prefix"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_key_is_kebab_case_and_arrives_in_its_field(kind: type[Any], prefix: str) -> None:
    defaults = keys_of(kind, prefix)
    assert read_options(kind, {}, prefix) == kind()
    for key, default in defaults.items():
        assert KEBAB.fullmatch(key), key
        value = another(key, default)
        given = {key: value} | ALONG.get(key, {})
        options = read_options(kind, given | {"somebody-elses.key": 1}, prefix)
        changed = {
            key_of(field.name, prefix): getattr(options, field.name)
            for field in dataclasses.fields(kind)
            if getattr(options, field.name) != getattr(kind(), field.name)
        }
        assert changed == given
    together = all_others(defaults)
    options = read_options(kind, together, prefix)
    assert {key_of(field.name, prefix): getattr(options, field.name) for field in dataclasses.fields(kind)} == together


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_strategy_is_built_from_run_config(name: str) -> None:
    keys = STRATEGIES[name].option_keys()
    assert all(key.startswith(f"{name}.") for key in keys)
    config = all_others(keys) | {"strategy": name, "seed": 9, "local-steps": 7}
    strategy = strategy_from_run_config(config)
    assert type(strategy) is STRATEGIES[name]
    assert (strategy.seed, strategy.training.local_steps) == (9, 7)
    assert keys_of(type(strategy.options), f"{name}.") == keys
    for field in dataclasses.fields(strategy.options):
        assert getattr(strategy.options, field.name) == config[key_of(field.name, f"{name}.")]
    plain = strategy_from_run_config({"strategy": name})
    assert (plain.options, plain.training, plain.seed) == (STRATEGIES[name].Options(), Training(), 0)


def test_options_are_frozen() -> None:
    for kind, _ in OPTIONS:
        options = kind()
        for field in dataclasses.fields(kind):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(options, field.name, 1)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("fedmerge.lrw", "fedmerge.lr-w"),
        ("fedmerge.lr_w", "fedmerge.lr-w"),
        ("fedmerg.lr-theta", "fedmerge.lr-theta"),
        ("local_steps", "local-steps"),
        ("learning-rte", "learning-rate"),
        ("fedavg.spaces", "fedavg.space"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    known = [known for kind, prefix in OPTIONS for known in keys_of(kind, prefix)]
    with pytest.raises(OptionError, match=f"unknown run-config key {key!r}; did you mean {nearest!r}"):
        require_known({"local-steps": 1, key: 2}, known)


def test_an_unknown_key_that_is_near_to_nothing_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown run-config key 'zzz'; known keys: batch-size, local-steps"):
        require_known({"zzz": 2}, ["local-steps", "batch-size"])
    require_known({"local-steps": 2}, ["local-steps", "batch-size"])


WRONG: list[tuple[dict[str, Any], str]] = [
    # wrong types; a bool is not an int, an int is a float, and nothing else converts
    ({"local-steps": True}, "local-steps = True is bool, expected int"),
    ({"local-steps": 5.0}, "local-steps = 5.0 is float, expected int"),
    ({"local-steps": "5"}, "local-steps = '5' is str, expected int"),
    ({"learning-rate": True}, "learning-rate = True is bool, expected float"),
    ({"learning-rate": "fast"}, "learning-rate = 'fast' is str, expected float"),
    ({"schedule": 1}, "schedule = 1 is int, expected str"),
    ({"fedmerge.models": True}, "fedmerge.models = True is bool, expected int"),
    ({"fedmerge.models": 2.0}, "fedmerge.models = 2.0 is float, expected int"),
    ({"fedmerge.w-client-weight": 1}, "fedmerge.w-client-weight = 1 is int, expected bool"),
    ({"fedmerge.w-client-weight": "yes"}, "fedmerge.w-client-weight = 'yes' is str, expected bool"),
    ({"fedmerge.w-layers": 3}, "fedmerge.w-layers = 3 is int, expected str"),
    ({"fedmerge.mu": 10**400}, "fedmerge.mu is an integer beyond the largest float"),
    ({"seed": "seven"}, "seed = 'seven' is str, expected int"),
    ({"seed": True}, "seed = True is bool, expected int"),
    # ranges, not-a-number, infinity, and what would not fit on the wire
    ({"local-steps": 0}, "local-steps = 0, expected .*at least 1"),
    ({"local-steps": 2**32}, "local-steps = 4294967296, expected .*at most 2147483647"),
    ({"batch-size": -1}, "batch-size = -1, expected .*at least 1"),
    ({"batch-size": 10**400}, "batch-size = 1000.*expected .*at most 2147483647"),
    ({"learning-rate": 0.0}, "learning-rate = 0.0, expected a positive number"),
    ({"learning-rate": float("nan")}, "learning-rate = nan, expected a positive number"),
    ({"learning-rate": float("inf")}, "learning-rate = inf, expected a positive number"),
    ({"weight-decay": -1e-9}, "weight-decay = -1e-09, expected .*at least 0"),
    ({"weight-decay": float("nan")}, "weight-decay = nan, expected"),
    ({"max-grad-norm": float("inf")}, "max-grad-norm = inf, expected a finite number"),
    ({"seed": -1}, "seed = -1, expected .*at least 0"),
    ({"seed": 2**63}, "seed = 9223372036854775808, expected .*at most"),
    ({"fedmerge.models": 0}, "fedmerge.models = 0, expected .*at least 1"),
    ({"fedmerge.lr-w": -0.1}, "fedmerge.lr-w = -0.1, expected .*at least 0"),
    ({"fedmerge.lr-w": float("inf")}, "fedmerge.lr-w = inf, expected a finite number"),
    ({"fedmerge.lr-theta": float("nan")}, "fedmerge.lr-theta = nan, expected"),
    ({"fedmerge.mu": -1}, "fedmerge.mu = -1.0, expected"),
    ({"fedmerge.min-mass": -1.0}, "fedmerge.min-mass = -1.0, expected"),
    ({"fedmerge.jitter": float("inf")}, "fedmerge.jitter = inf, expected"),
    ({"fedmerge.cluster-temperature": 0.0}, "fedmerge.cluster-temperature = 0.0, expected .*at least 1e-06"),
    # choices
    (
        {"schedule": "cosin"},
        r"schedule = 'cosin' \(did you mean 'cosine'\?\), expected one of constant, linear, cosine",
    ),
    ({"evaluate-split": "train"}, "evaluate-split = 'train', expected one of validation, test"),
    ({"uplink-encoding": "fp64"}, r"uplink-encoding = 'fp64' \(did you mean 'fp16'\?\), expected one of fp32, fp16"),
    ({"downlink-encoding": ""}, "downlink-encoding = '', expected one of"),
    ({"fedmerge.variant": "frozen_a"}, r"fedmerge.variant = 'frozen_a' \(did you mean 'frozen-a'\?\)"),
    ({"fedmerge.w-step": "sgd"}, "fedmerge.w-step = 'sgd', expected one of maxnorm, maxnorm-per-row, adam"),
    ({"fedmerge.theta-norm": "row"}, "fedmerge.theta-norm = 'row', expected one of column, none"),
    ({"fedmerge.init": "random"}, "fedmerge.init = 'random', expected one of jitter, cluster"),
    ({"strategy": "fedmerg"}, r"strategy = 'fedmerg' \(did you mean 'fedmerge'\?\), expected one of fedavg, local"),
    ({"strategy": 3}, "strategy = '3', expected one of fedavg, local, fedmerge"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(WRONG)])
def test_a_wrong_value_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        strategy_from_run_config({"strategy": "fedmerge"} | config)


def test_integers_are_floats_where_floats_are_expected() -> None:
    options = read_options(FedMergeOptions, {"fedmerge.mu": 1, "fedmerge.lr-w": 0}, "fedmerge.")
    assert (options.mu, options.lr_w) == (1.0, 0.0)
    assert type(options.mu) is float


def test_a_dataclass_that_refuses_with_a_plain_error_is_an_option_error() -> None:
    @dataclasses.dataclass(frozen=True)
    class Even:
        number: int = 2
        limit: float | None = None

        def __post_init__(self) -> None:
            if self.number % 2:
                raise ValueError("number is odd")

    with pytest.raises(OptionError, match=r"even\.number is odd"):
        read_options(Even, {"even.number": 3}, "even.")
    assert read_options(Even, {"even.limit": 2}, "even.").limit == 2.0


def test_ranges_and_choices_at_their_edges() -> None:
    for value in (0, 0.5, 1):
        require_range("x", value, 0, 1)
    for value in (-1e-12, 1.0000001, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(OptionError, match="expected a finite number of at least 0 and at most 1"):
            require_range("x", value, 0, 1)
    require_range("x", 10**400, 0)
    require_choice("x", "a", iter(["a", "b"]))
    assert FedAvgOptions("delta").space == "delta"
