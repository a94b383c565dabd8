"""Run-config of the run itself; strategies read their own dotted keys."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from client_app.guard.policy import Policy
from client_app.settings import AdapterSettings, DataSettings, ModelSettings, ShownSettings, TrainerSettings
from server_app.run.run_directory import toml_string
from server_app.run.trackers import OPENERS, listed
from strategies import STRATEGIES
from strategies.framework.limits import Limits
from strategies.framework.options import (
    OptionError,
    RunConfig,
    keys_of,
    problems_of,
    read_options,
    require_choice,
    require_range,
)
from strategies.framework.steps import Training

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RunOptions:
    """How a run begins, goes on and ends."""

    strategy: str = "fedavg"
    """The algorithm; docs/strategies.md has the names."""
    run_name: str = ""
    """Folder below ``runs-dir``. Empty: strategy, scenario and Flower's run id."""
    resume: str = ""
    """Folder of a run (``runs/<name>``) to continue after its last complete round; a finished run with more
    ``num-server-rounds``. All other keys that decide numbers must be as before; ``runs/<name>/resume.toml`` has
    them."""
    deliver: str = ""
    """With ``resume`` of a finished run: train nothing, and deliver models to ``missing`` clients (those that were
    absent), to ``all``, or to comma-separated ids. ``fedalloy deliver`` sets it."""
    adopt: str = ""
    """With ``resume``, of a finished run: clients that never trained, comma-separated, or ``new`` (all online),
    are given the best sum of the run's models that forward passes find. ``fedalloy adopt`` sets it."""
    adopt_examples: int = 32
    """Largest number of training examples that such a client looks at."""
    adopt_evaluations: int = 100
    """Largest number of sums that it tries; each takes one pass over these examples."""
    adopt_sources: int = 20
    """Largest number of adapters that it is sent: the run's global models, then those of clients whose owners lend
    them."""
    runs_dir: str = "runs"
    """Where the server keeps runs, one folder each."""
    scenario: str = "digits"
    """Built-in data and base model, for clients whose node-config has a ``partition-id``."""
    num_server_rounds: int = 5
    """Rounds of the run."""
    task_arrival: str = "all"
    """Training data of a client: ``all`` (from the beginning), ``static`` (an equal share in each round) or ``dynamic``
    (its tasks, one after another; of one classification task its classes in groups)."""
    seed: int = 0
    """Decides initial adapters, sampling and the order of the data. The same seed gives the same numbers on a CPU."""
    min_clients: int = 0
    """The run starts when this many clients have registered, and a round settles only with this many answers. 0: all
    SuperNodes that are online at the start must be enrolled, at least two; a round settles with two answers."""
    fraction_clients: float = 1.0
    """Share of the registered clients that each round asks."""
    participants: str = "random"
    """Choice of clients if ``fraction-clients`` is below 1: ``random``, ``round-robin``, or ``fastest``: those that
    have answered soonest so far, twice as many in each round until all take part."""
    clients: str = ""
    """Comma-separated names of clients that take part, or patterns like ``site-*``. Empty: all. A round waits until
    ``min-clients`` of them are online, or all if fewer are named; others count for the start only."""
    site_mode: str = "allowed"
    """Whether clients may have their owner's own trainer (``fedalloy site serve``), so that no code of the run sees
    their data: ``allowed``, ``required`` (others are refused) or ``forbidden``."""
    sign_with: str = ""
    """File on the server with a private key (PEM) that signs messages to clients, for sites that accept plans of known
    servers only. Empty: nothing is signed."""
    quorum: int = 0
    """The round ends ``grace`` seconds after this many clients have answered. Later answers do not count (but see
    ``fedavg.late-weight``). 0: it waits for all, at most ``round-timeout`` seconds."""
    grace: float = 10.0
    """Least number of seconds for the other clients once there is a ``quorum``, or once ``grace-ratio`` applies."""
    grace_ratio: float = 0.0
    """When ``min-clients`` clients and more than half of those asked have answered, the others have this many times the
    median answer time, counted from the start of the round. Then they count as late (see ``strikes``). 0: all have
    ``round-timeout``, because an honest client may be slow. With clients of similar speed, 10 keeps a silent
    client from costing the whole ``round-timeout``."""
    round_timeout: float = 600.0
    """Seconds after which a round goes on without the clients that have not answered."""
    strikes: int = 3
    """A client that was late or rejected this often in a row is not asked in the next round; if it fails again, not in
    the next two, four, ... (at most 16). One usable answer clears this. 0: all clients are always asked."""
    startup_timeout: float = 300.0
    """Seconds to wait for ``min-clients`` to register."""
    poll_interval: float = 0.1
    """Seconds between two looks for answers."""
    evaluate_every: int = 1
    """Clients evaluate their models in the first round and in every n-th one, and always at the end."""
    evaluate_examples: int = 256
    """Largest number of examples of each task in a round's evaluation, the same ones in every round; 0: all. Delivered
    models are evaluated on all examples."""
    on_divergence: str = "best"
    """What a client gets if its model is worse on its validation examples than before training, or has lost more than
    half of its gain: ``best``, its model of the round that was best for all clients, or ``last``. With
    ``deliver-choice = "validation"`` only a client that could not answer falls back; the others choose."""
    trackers: str = ""
    """Comma-separated experiment trackers that get each round's numbers: ``tensorboard``, ``mlflow``, ``wandb``,
    ``trackio``. Each is an extra of the same name to install at the server. A failing tracker does not stop the run."""
    deliver_choice: str = "merged"
    """What a client gets at the end: ``merged``: the strategy's model; ``validation``: the best on its validation
    examples of the strategy's model, its model of its own best round, the global adapter, and an adapter that it trains
    alone. The latter doubles the local work."""
    choice_metric: str = "loss"
    """The metric of ``deliver-choice`` and ``patience``: ``loss``, or ``accuracy`` if the task has one."""
    patience: int = 0
    """The run ends early when no client's model has improved on its validation examples for this many rounds. 0: it
    never ends early."""
    bank_memory_mb: float = 1024.0
    """Megabytes of clients' adapters that the server keeps in memory; the others are in files of the run's folder."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept on disk; clients keep as many earlier states of their slots."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is trained any more: models are handed out."""
        return bool(self.deliver or self.adopt)

    @property
    def least(self) -> int:
        """Least number of clients for a start, and of answers for a round."""
        return 1 if self.is_over else least_clients(self.min_clients, self.clients)

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, STRATEGIES)
        require_choice("task-arrival", self.task_arrival, ("all", "static", "dynamic"))
        require_range("num-server-rounds", self.num_server_rounds, 1)
        require_range("seed", self.seed, 0, 2**62)
        require_range("evaluate-every", self.evaluate_every, 1)
        require_range("evaluate-examples", self.evaluate_examples, 0)
        require_range("min-clients", self.min_clients, 0)
        require_range("fraction-clients", self.fraction_clients, 0, 1)
        require_range("round-timeout", self.round_timeout, 1)
        require_range("strikes", self.strikes, 0)
        require_range("startup-timeout", self.startup_timeout, 1)
        require_range("poll-interval", self.poll_interval, 0.01, 60)
        require_range("quorum", self.quorum, 0)
        require_range("grace", self.grace, 0)
        require_range("grace-ratio", self.grace_ratio, 0)
        if 0 < self.grace_ratio < 1:
            raise OptionError(f"grace-ratio = {self.grace_ratio}, expected 0 or at least 1")
        require_range("bank-memory-mb", self.bank_memory_mb, 0)
        for name in listed(self.trackers):
            require_choice("trackers", name, OPENERS)
        require_choice("deliver-choice", self.deliver_choice, ("merged", "validation"))
        require_choice("choice-metric", self.choice_metric, ("loss", "accuracy"))
        require_range("patience", self.patience, 0)
        require_choice("on-divergence", self.on_divergence, ("best", "last"))
        require_choice("site-mode", self.site_mode, ("allowed", "required", "forbidden"))
        require_choice("participants", self.participants, ("random", "round-robin", "fastest"))
        require_range("keep-checkpoints", self.keep_checkpoints, 1)
        require_range("adopt-examples", self.adopt_examples, 1, 2**31 - 1)
        require_range("adopt-evaluations", self.adopt_evaluations, 1, 2**31 - 1)
        require_range("adopt-sources", self.adopt_sources, 1, 900)
        for name, value in (("deliver", self.deliver), ("adopt", self.adopt)):
            if value and not self.resume:
                raise OptionError(f"{name} = {value!r} without resume, expected the folder of a finished run there")
        if self.deliver and self.adopt:
            raise OptionError(f"deliver = {self.deliver!r} and adopt = {self.adopt!r}, expected one of them")
        if self.fraction_clients == 0:
            raise OptionError("fraction-clients = 0, expected more than 0 and at most 1")
        if self.run_name and not RUN_NAME.fullmatch(self.run_name):
            raise OptionError(
                f"run-name = {self.run_name[:80]!r}, expected 1 to 64 letters, digits, '.', '_' or '-', "
                "starting with a letter or digit"
            )


OPTIONS: tuple[tuple[str, type[Any]], ...] = (
    ("", RunOptions),
    ("", Limits),
    ("", Training),
    ("", AdapterSettings),
    ("", ModelSettings),
    ("", DataSettings),
    ("trainer.", TrainerSettings),
    ("client.", Policy),
    ("client.", ShownSettings),
    *((f"{name}.", STRATEGIES[name].Options) for name in sorted(STRATEGIES)),
)
"""Every dataclass whose fields are run-config keys, with the keys' prefix. There are no other keys."""


def least_clients(min_clients: int, clients: str) -> int:
    """``min-clients``, or two if it is 0; never more than ``clients`` names, if it has no pattern."""
    names = {name.strip() for name in clients.split(",") if name.strip()}
    most = len(names) if names and not any(set(name) & set("*?[") for name in names) else math.inf
    return int(min(min_clients or 2, most))


def known_keys() -> dict[str, Any]:
    """Every run-config key with its default: the run's, local training's, the clients' and all strategies'."""
    return {key: default for prefix, kind in OPTIONS for key, default in keys_of(kind, prefix).items()}


def read_run_options(run_config: RunConfig) -> RunOptions:
    """The run's options; the whole run-config is checked, keys and types.

    Raises:
        OptionError: an unknown key (names the nearest known one), a wrong type, or a value out of range.
    """
    if found := problems(run_config):
        raise OptionError("; ".join(found))
    return read_options(RunOptions, run_config)


def problems(run_config: RunConfig) -> list[str]:
    """Everything that is wrong with run-config, one line each; only the chosen strategy's values are checked."""
    chosen = f"{run_config.get('strategy', RunOptions.strategy)}."
    others = {f"{name}." for name in STRATEGIES} - {chosen}
    known = known_keys()
    unread = {key for key in run_config if key in known and key.startswith(tuple(others))}
    return problems_of(OPTIONS, {key: value for key, value in run_config.items() if key not in unread})


def run_on(run_config: RunConfig) -> tuple[str, str]:
    """A run's data: ``("scenario", its name)``, or ``("base_model", its name)`` if clients have their own data."""
    base = str(run_config.get("base-model", ""))
    return ("base_model", base) if base else ("scenario", str(run_config.get("scenario", RunOptions.scenario)))


def plain_run_name(run_config: RunConfig) -> str:
    """A run's name by its strategy and data: ``fedmerge-digits``, ``fedmerge-Qwen3-0.6B``."""
    last = run_on(run_config)[1].rstrip("/").rpartition("/")[2]
    about = re.sub(r"[^A-Za-z0-9._-]+", "-", last)[:24].strip("-.")
    return f"{run_config.get('strategy', RunOptions.strategy)}-{about or 'base'}"


def default_run_name(run_config: RunConfig, run_id: int) -> str:
    """The folder's name for a run without a name."""
    return f"{plain_run_name(run_config)}-{run_id}"


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
