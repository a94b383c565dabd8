"""Run-config of the run itself; strategies read their own dotted keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from client_app.settings import run_config_keys
from server_app.run.run_directory import toml_string
from strategies import STRATEGIES
from strategies.framework.limits import Limits
from strategies.framework.options import (
    OptionError,
    RunConfig,
    keys_of,
    read_options,
    require_choice,
    require_known,
    require_range,
)
from strategies.framework.steps import Training

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CLIENT_KEYS = run_config_keys() | {"trainer.resident": True, "trainer.idle-seconds": 300.0}
"""Keys that only clients read."""


@dataclass(frozen=True)
class RunOptions:
    """The run-config keys of the run: see ``pyproject.toml`` for what each means."""

    strategy: str = "fedavg"
    run_name: str = ""
    resume: str = ""
    runs_dir: str = "runs"
    scenario: str = "digits"
    num_server_rounds: int = 5
    seed: int = 0
    min_clients: int = 2
    fraction_clients: float = 1.0
    round_timeout: float = 600.0
    startup_timeout: float = 300.0
    poll_interval: float = 0.1
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, STRATEGIES)
        require_range("num-server-rounds", self.num_server_rounds, 1)
        require_range("seed", self.seed, 0, 2**62)
        require_range("min-clients", self.min_clients, 1)
        require_range("fraction-clients", self.fraction_clients, 0, 1)
        require_range("round-timeout", self.round_timeout, 1)
        require_range("startup-timeout", self.startup_timeout, 1)
        require_range("poll-interval", self.poll_interval, 0.01, 60)
        require_range("keep-checkpoints", self.keep_checkpoints, 1)
        if self.fraction_clients == 0:
            raise OptionError("fraction-clients = 0, expected more than 0 and at most 1")
        if self.run_name and not RUN_NAME.fullmatch(self.run_name):
            raise OptionError(
                f"run-name = {self.run_name[:80]!r}, expected 1 to 64 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit"
            )


def known_keys() -> dict[str, Any]:
    """Every run-config key with its default: the run's, local training's, the clients' and all strategies'."""
    keys = keys_of(RunOptions) | keys_of(Training) | keys_of(Limits) | CLIENT_KEYS
    for strategy in STRATEGIES.values():
        keys |= strategy.option_keys()
    return keys


def read_run_options(run_config: RunConfig) -> RunOptions:
    """The run's options; the whole run-config is checked, keys and types.

    Raises:
        OptionError: an unknown key (names the nearest known one), a wrong type, or a value out of range.
    """
    require_known(run_config, known_keys())
    read_options(Training, run_config)
    read_options(Limits, run_config)
    return read_options(RunOptions, run_config)


def as_toml(run_config: RunConfig) -> str:
    """Run-config as a TOML file that ``flwr run --run-config FILE`` accepts."""
    lines = []
    for key in sorted(run_config):
        value = run_config[key]
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = toml_string(value)
        else:
            text = repr(value)
        lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"
