"""Who this client is, where it keeps its files, and what the run asks of its model and data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from flwr.app import Context

from proto.fedalloy.v1 import plan_pb2

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Config = Mapping[str, Any]
C = TypeVar("C")


class SettingsError(ValueError):
    """A node-config or run-config value is missing or not valid."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model and how it is held; the field ``base_model`` is the key ``base-model``.

    Every key may be in run-config, for all clients, and in a client's node-config, which wins. ``pyproject.toml`` says
    what each means.
    """

    base_model: str = ""
    reference_model: str = ""
    task: str = ""
    labels: str = ""
    target_modules: str = ""
    model_dtype: str = "float32"
    quantization: str = "none"
    gradient_checkpointing: bool = False
    micro_batch_size: int = 0
    max_length: int = 512
    max_new_tokens: int = 64
    generate_examples: int = 0

    def __post_init__(self) -> None:
        _require_choice("model-dtype", self.model_dtype, ("float32", "bfloat16"))
        _require_choice("quantization", self.quantization, ("none", "4bit"))
        for key, least in (("micro_batch_size", 0), ("max_length", 2), ("max_new_tokens", 1), ("generate_examples", 0)):
            if getattr(self, key) < least:
                raise SettingsError(f"{_key(key)} = {getattr(self, key)}, expected at least {least}")
        if self.labels and len(set(self.label_names)) < max(2, len(self.label_names)):
            raise SettingsError(f"labels = {self.labels!r}, expected at least two names that differ, or none")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that all clients share, in order; empty where each has its own."""
        return tuple(name.strip() for name in self.labels.split(",") if name.strip())


@dataclass(frozen=True)
class DataSettings:
    """Where the client's data are and what their columns are called; keys as in :class:`ModelSettings`."""

    data_path: str = ""
    data_config: str = ""
    data_root: str = ""
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    image_column: str = "image"
    split_column: str = ""
    split_fractions: str = "0.8,0.1,0.1"
    partitioner: str = ""
    partition_by: str = ""
    partition_alpha: float = 0.5
    partition_classes: int = 2

    def __post_init__(self) -> None:
        _ = self.fractions

    @property
    def fractions(self) -> tuple[float, float, float]:
        """Shares of train, validation and test.

        Raises:
            SettingsError: these are not three numbers that make sense.
        """
        try:
            train, validation, test = (float(part) for part in self.split_fractions.split(","))
        except ValueError:
            raise SettingsError(
                f"split-fractions = {self.split_fractions!r}, expected three numbers like 0.8,0.1,0.1"
            ) from None
        if min(train, validation, test) < 0 or not train or abs(train + validation + test - 1) > 1e-6:
            raise SettingsError(
                f"split-fractions = {self.split_fractions!r}, expected shares of train, validation and test with sum 1"
            )
        return train, validation, test


STEPS = tuple(field.name for field in plan_pb2.Step.DESCRIPTOR.fields)


@dataclass(frozen=True)
class Policy:
    """What this client lets a server ask of it; the field ``allow_steps`` is the key ``client.allow-steps``.

    Run-config may have a federation's policy; what the client's own node-config says wins.

    Args:
        allow_steps: comma-separated kinds of steps that a plan may contain; empty: all.
        max_upload_mb: bound on all uploads of one plan together, in megabytes (10^6 bytes); 0: none.
    """

    allow_steps: str = ""
    max_upload_mb: float = 0.0

    def __post_init__(self) -> None:
        for name in self.allowed:
            _require_choice("client.allow-steps", name, STEPS)
        if not 0 <= self.max_upload_mb < float("inf"):
            raise SettingsError(f"client.max-upload-mb = {self.max_upload_mb}, expected a number of at least 0")

    @property
    def allowed(self) -> tuple[str, ...]:
        """The kinds of steps that a plan may contain."""
        named = tuple(name.strip() for name in self.allow_steps.split(",") if name.strip())
        return named or STEPS


@dataclass(frozen=True)
class Settings:
    """One client's settings in one run.

    ``client_id`` is node-config's ``client-id``, else ``client-<partition-id>``, else ``node-<node id>``.
    ``state_dir`` holds all runs of this client: node-config's ``state-dir``, else ``fedalloy`` below ``FLWR_HOME``.
    ``start_adapter`` is a PEFT directory that the slot ``start_slot`` starts from, instead of from zero.
    ``alignments`` is where alignment files lie: node-config's ``alignments``, else that folder's ``alignments``.
    ``task_arrival`` says how training data arrive over the run's ``rounds``; see :mod:`client_app.data.arrival`.
    ``keep_rounds``: so many earlier states of the slots are kept as the server keeps checkpoints.
    """

    client_id: str
    state_dir: Path
    scenario: str
    partition_id: int
    num_partitions: int
    seed: int
    rank: int
    alpha: float
    dropout: float
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    start_adapter: str = ""
    start_slot: str = "local"
    blocks: int = 0
    alignment: str = ""
    alignments: Path = Path()
    task_arrival: str = "all"
    rounds: int = 1
    keep_rounds: int = 2
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        _require_choice("task-arrival", self.task_arrival, ("all", "static", "dynamic"))

    def run_directory(self, run_name: str) -> Path:
        """This client's folder in a run.

        Raises:
            SettingsError: the run's name could leave the state directory.
        """
        _require_name("run name", run_name)
        return self.state_dir / run_name / "clients" / self.client_id


def read_settings(context: Context) -> Settings:
    """Settings from Flower's context.

    Raises:
        SettingsError: a value is missing or not valid; names the key.
    """
    node, run = context.node_config, context.run_config
    data = _read(DataSettings, node, run)
    has_partition = "partition-id" in node and "num-partitions" in node
    if not has_partition and not data.data_path:
        raise SettingsError(
            "node-config has neither a data-path, for data of its own, nor partition-id and num-partitions, which a "
            "built-in scenario needs"
        )
    partition, count = (int(node["partition-id"]), int(node["num-partitions"])) if has_partition else (0, 1)
    if not 0 <= partition < count:
        raise SettingsError(f"partition-id = {partition}, expected 0 to {count - 1} (num-partitions = {count})")
    if data.partitioner and not has_partition:
        raise SettingsError(f"partitioner = {data.partitioner!r} needs partition-id and num-partitions in node-config")
    fallback = f"client-{partition}" if has_partition else f"node-{context.node_id}"
    client_id = str(node.get("client-id", fallback))
    _require_name("client-id", client_id)
    rank = int(node.get("lora-r", run.get("lora-r", 8)))
    if rank < 1:
        raise SettingsError(f"lora-r = {rank}, expected at least 1")
    dropout = float(node.get("lora-dropout", run.get("lora-dropout", 0.0)))
    if not 0 <= dropout < 1:
        raise SettingsError(f"lora-dropout = {dropout}, expected at least 0 and less than 1")
    state_dir = Path(str(node.get("state-dir", default_state_dir()))).expanduser()
    alignment = str(run.get("lora-alignment", ""))
    if alignment and not re.fullmatch(r"[0-9a-f]{64}", alignment):
        raise SettingsError(f"lora-alignment = {alignment[:80]!r}, expected a SHA-256, 64 hexadecimal digits")
    return Settings(
        client_id=client_id,
        state_dir=state_dir,
        scenario=str(run.get("scenario", "digits")),
        partition_id=partition,
        num_partitions=count,
        seed=int(run.get("seed", 0)),
        rank=rank,
        alpha=float(node.get("lora-alpha", run.get("lora-alpha", 16))),
        dropout=dropout,
        model=_read(ModelSettings, node, run),
        data=data,
        start_adapter=str(node.get("start-adapter", "")),
        start_slot=str(node.get("start-slot", "local")),
        blocks=int(run.get("lora-blocks", 0)),
        alignment=alignment,
        alignments=Path(str(node.get("alignments", state_dir / "alignments"))).expanduser(),
        task_arrival=(arrival := str(run.get("task-arrival", "all"))),
        rounds=1 if arrival == "all" else int(run.get("num-server-rounds", 5)),
        keep_rounds=max(1, int(run.get("keep-checkpoints", 2))),
        policy=_read(Policy, node, run, "client."),
    )


def run_config_keys() -> dict[str, Any]:
    """Run-config keys that only clients read, with their defaults."""
    keys: dict[str, Any] = {"lora-r": 8, "lora-alpha": 16.0, "lora-dropout": 0.0}
    keys |= {"lora-blocks": 0, "lora-alignment": "", "task-arrival": "all"}
    for kind in (ModelSettings, DataSettings):
        keys |= {_key(item.name): item.default for item in fields(kind)}
    return keys | {f"client.{_key(item.name)}": item.default for item in fields(Policy)}


def default_state_dir() -> Path:
    """``fedalloy`` below ``FLWR_HOME``, which is each SuperNode's own."""
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "fedalloy"


def _key(name: str) -> str:
    return name.replace("_", "-")


def _read(kind: type[C], node: Config, run: Config, prefix: str = "") -> C:
    """A settings dataclass: node-config's value, else run-config's, else the default."""
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):  # type: ignore[arg-type]
        key, hint = prefix + _key(item.name), hints[item.name]
        for source, config in (("node-config", node), ("run-config", run)):
            if key in config:
                value = config[key]
                if hint is float and isinstance(value, int) and not isinstance(value, bool):
                    value = float(value)
                if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
                    raise SettingsError(
                        f"{source} {key} = {value!r} is {type(value).__name__}, expected {hint.__name__}"
                    )
                values[item.name] = value
                break
    return kind(**values)


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"{key} = {value!r}, expected one of {', '.join(choices)}")


def _require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"{what} {name[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
