"""A client's settings: who it is, where its files are, and how its model and data are set up."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from flwr.app import Context

from client_app.guard.policy import Policy
from client_app.guard.privacy import Privacy
from client_app.model_settings import ModelSettings, SettingsError, canonical_label, key_of, require_choice

__all__ = [
    "NODE_ONLY",
    "AdapterSettings",
    "DataSettings",
    "ModelSettings",
    "NodeConfigError",
    "Settings",
    "SettingsError",
    "ShownSettings",
    "TrainerSettings",
    "canonical_label",
    "default_state_dir",
    "node_keys",
    "read_settings",
    "require_node_keys",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Config = Mapping[str, Any]
C = TypeVar("C")


class NodeConfigError(SettingsError):
    """Node-config lacks a key, or has an unknown one. The message names no values, so the server may see it."""

    told = property(str)


@dataclass(frozen=True)
class AdapterSettings:
    """The clients' adapters; rank, alpha and dropout may be in a client's node-config, too, and win there."""

    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Alpha of the adapters: the scaling is alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout at the adapters' input."""
    lora_blocks: int = 0
    """Co-LoRA: number of blocks. The last layer of each gets P and Q between A and B, which clients with other
    architectures share, too. 0: plain LoRA."""
    lora_alignment: str = ""
    """Hash of the alignment of A and B that ``fedalloy align`` wrote; empty: drawn from the seed."""

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise SettingsError(f"lora-r = {self.lora_r}, expected at least 1")
        if not 0 < self.lora_alpha < float("inf"):
            raise SettingsError(f"lora-alpha = {self.lora_alpha}, expected a positive number")
        if not 0 <= self.lora_dropout < 1:
            raise SettingsError(f"lora-dropout = {self.lora_dropout}, expected at least 0 and less than 1")
        if self.lora_alignment and not re.fullmatch(r"[0-9a-f]{64}", self.lora_alignment):
            raise SettingsError(
                f"lora-alignment = {self.lora_alignment[:80]!r}, expected a SHA-256, 64 hexadecimal digits"
            )


@dataclass(frozen=True)
class DataSettings:
    """Where the client's data are, and the names of their columns; keys as in :class:`ModelSettings`."""

    data_path: str = ""
    """File, folder or Hugging Face data set; usually in node-config, because each client has its own."""
    data_config: str = ""
    """Name of a configuration of a Hugging Face data set."""
    data_root: str = ""
    """Folder with the data of the scenarios on real data, as ``cifar100-20`` and ``text-8`` (docs/results)."""
    text_column: str = "text"
    """Column of the text; two for pairs of texts: ``"premise,hypothesis"``."""
    label_column: str = "label"
    """Column of the label; several columns of zeros and ones are a label each: ``"toxic,obscene"``."""
    prompt_column: str = "prompt"
    """Column of the prompt."""
    completion_column: str = "completion"
    """Column of the text that follows the prompt."""
    messages_column: str = "messages"
    """Column of a chat's messages."""
    image_column: str = "image"
    """Column of the image."""
    task_column: str = ""
    """Column with each example's task, for ``task-arrival="dynamic"``: tasks come in the order of their first rows."""
    prompt_template: str = "auto"
    """``auto``: if the model has a chat template, prompts and completions go through it as user and assistant.
    ``none``: they are read as they are."""
    split_column: str = ""
    """Column that says train, validation or test. Without it, and without files for each, examples are divided by
    ``split-fractions``, the same way every time."""
    split_fractions: str = "0.8,0.1,0.1"
    """Shares of train, validation and test."""
    partitioner: str = ""
    """Divides data by ``partition-id``: ``iid``, ``dirichlet``, ``pathological``, ``natural`` or empty (all of it)."""
    partition_by: str = ""
    """Column that the data are divided by; empty: the label."""
    partition_alpha: float = 0.5
    """Dirichlet's alpha."""
    partition_classes: int = 2
    """Classes of each client, for ``pathological``."""

    def __post_init__(self) -> None:
        _ = self.fractions
        require_choice("prompt-template", self.prompt_template, ("auto", "none"))

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


@dataclass(frozen=True)
class TrainerSettings:
    """A client's resident trainer.

    Run-config has a federation's defaults; a client's node-config wins, because its owner owns the machine and the GPU.
    """

    resident: bool = True
    """``true``: one process for each client keeps base model and data in memory between messages. ``false``: the
    process that Flower starts for each message does all the work, for debuggers. Flower's simulation engine always
    works this way."""
    idle_seconds: float = 300.0
    """The trainer ends after this many seconds without a message (and at once when its SuperNode ends)."""


@dataclass(frozen=True)
class ShownSettings:
    """A client's progress, shown on its own machine."""

    progress_seconds: float = 1.0
    """Seconds between two notes of step and loss in ``progress.json`` beside the client's slots, which ``fedalloy
    watch`` reads on that machine; nothing of it is sent. 0: no such file."""

    def __post_init__(self) -> None:
        if not 0 <= self.progress_seconds < float("inf"):
            raise SettingsError(f"client.progress-seconds = {self.progress_seconds}, expected at least 0")


_OWNERS = ("-path", "-root", "-config", "-column", "-by")
"""Endings of the keys that name a file or a column."""


@dataclass(frozen=True)
class Settings:
    """One client's settings in one run.

    ``client_id`` is node-config's ``client-id``, else ``client-<partition-id>``, else ``node-<node id>``.
    ``state_dir`` holds all runs of this client: node-config's ``state-dir``, else ``fedalloy`` below ``FLWR_HOME``.
    ``start_adapter`` is a PEFT directory that the slot ``start_slot`` starts from, instead of from zero.
    ``alignments`` is the folder of alignment files: node-config's ``alignments``, else ``alignments`` in that folder.
    ``task_arrival`` says how training data arrive over the run's ``rounds``; see :mod:`client_app.data.arrival`.
    ``keep_rounds`` is how many earlier states of the slots are kept, as many as the server keeps checkpoints.
    ``torch_threads`` is node-config's ``torch-threads``: threads of arithmetic on a CPU; 0: in a resident trainer the
    machine's cores divided by the clients on it, else one.
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
    torch_threads: int = 0
    privacy: Privacy = field(default_factory=Privacy)
    shown: ShownSettings = field(default_factory=ShownSettings)

    def __post_init__(self) -> None:
        require_choice("task-arrival", self.task_arrival, ("all", "static", "dynamic"))

    def run_directory(self, run_name: str) -> Path:
        """This client's folder in a run.

        Raises:
            SettingsError: the run's name could leave the state directory.
        """
        _require_name("run name", run_name)
        return self.state_dir / run_name / "clients" / self.client_id


NODE_ONLY = (
    *("client-id", "state-dir", "partition-id", "num-partitions", "lora-r", "lora-alpha", "lora-dropout"),
    *("start-adapter", "start-slot", "alignments", "torch-threads", "client.accept-keys", "client.base-models"),
    "site-socket",
)
"""Keys of node-config that are not fields of a dataclass here."""


def node_keys() -> list[str]:
    """Every key that node-config may have."""
    kinds: list[tuple[str, type[Any]]] = [("", ModelSettings), ("", DataSettings), ("client.", Policy)]
    kinds += [("client.", ShownSettings), ("dp.", Privacy), ("trainer.", TrainerSettings)]
    return sorted({*NODE_ONLY, *(prefix + key_of(item.name) for prefix, kind in kinds for item in fields(kind))})


def require_node_keys(node: Config, whose: str = "node-config") -> None:
    """Refuse unknown keys: with a misspelt one, a client might use other data than its owner meant.

    Raises:
        NodeConfigError: names all of them, each with the nearest known key.
    """
    known, wrong = node_keys(), []
    for key in [key for key in node if key not in known]:
        close = difflib.get_close_matches(key, known, n=1)
        wrong.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if wrong:
        what = "an unknown key" if len(wrong) == 1 else "unknown keys"
        raise NodeConfigError(f"{whose} has {what}: {', '.join(wrong)}; docs/options.md lists the known ones")


def read_settings(context: Context) -> Settings:
    """Settings from Flower's context.

    Raises:
        SettingsError: a value is missing or not valid; names the key.
    """
    node, run = context.node_config, context.run_config
    require_node_keys(node)
    _require_accepted(node, run)
    _require_base(node, run)
    data = _read(DataSettings, node, run)
    has_partition = "partition-id" in node and "num-partitions" in node
    if not has_partition and not data.data_path:
        raise NodeConfigError(
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
    own: dict[str, Any] = {key: node[key] for key in ("lora-r", "lora-alpha", "lora-dropout") if key in node}
    adapter = _read(AdapterSettings, own, run)
    state_dir = Path(str(node.get("state-dir", default_state_dir()))).expanduser()
    return Settings(
        client_id=client_id,
        state_dir=state_dir,
        scenario=str(run.get("scenario", "digits")),
        partition_id=partition,
        num_partitions=count,
        seed=int(run.get("seed", 0)),
        rank=adapter.lora_r,
        alpha=adapter.lora_alpha,
        dropout=adapter.lora_dropout,
        model=_read(ModelSettings, node, run),
        data=data,
        start_adapter=str(node.get("start-adapter", "")),
        start_slot=str(node.get("start-slot", "local")),
        blocks=adapter.lora_blocks,
        alignment=adapter.lora_alignment,
        alignments=Path(str(node.get("alignments", state_dir / "alignments"))).expanduser(),
        task_arrival=(arrival := str(run.get("task-arrival", "all"))),
        rounds=1 if arrival == "all" else int(run.get("num-server-rounds", 5)),
        keep_rounds=max(1, int(run.get("keep-checkpoints", 2))),
        policy=_policy(node, run),
        torch_threads=_threads(node),
        privacy=_privacy(node),
        shown=_read(ShownSettings, node, run, "client."),
    )


def _threads(node: Config) -> int:
    """Threads of arithmetic on a CPU, which only the owner sets; 0: found automatically."""
    threads = node.get("torch-threads", 0)
    if not isinstance(threads, int) or isinstance(threads, bool) or not 0 <= threads <= 1024:
        raise NodeConfigError("node-config's torch-threads is not a whole number from 0 (the client's share) to 1024")
    return threads


def _privacy(node: Config) -> Privacy:
    """Privacy settings, which only the owner's node-config has."""
    try:
        return _read(Privacy, node, {}, "dp.")
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _policy(node: Config, run: Config) -> Policy:
    """Node-config's policy; for keys that it lacks, the stricter one of the default and run-config's."""
    try:
        own, asked = _read(Policy, node, {}, "client."), _read(Policy, {}, run, "client.")
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(str(error)) from None
    said = {item.name: getattr(own, item.name) for item in fields(Policy) if f"client.{key_of(item.name)}" in node}
    return replace(Policy().stricter(asked), **said)


def _require_accepted(node: Config, run: Config) -> None:
    """Require that only the owner chooses files and columns, unless it accepts the run's choice.

    ``client.accept-keys`` in node-config, and only there, lists the keys that run-config may set, or is ``all``.
    """
    accepted = {name.strip() for name in str(node.get("client.accept-keys", "")).split(",")}
    for item in fields(DataSettings):
        key = key_of(item.name)
        if not key.endswith(_OWNERS) or key in node or run.get(key, item.default) == item.default:
            continue
        if not accepted & {key, "all"}:
            raise SettingsError(
                f"{key} = {run[key]!r} is from run-config, but this client takes it only from its own node-config; to "
                f"accept a run's value, set client.accept-keys='{key}' there"
            )


def _require_base(node: Config, run: Config) -> None:
    """Require a base model that the owner allows: by default any, because safetensors bring no code.

    ``client.base-models`` in node-config, and only there, restricts it: names or patterns like ``Qwen/*``, with commas.
    """
    patterns = [name.strip() for name in str(node.get("client.base-models", "")).split(",") if name.strip()]
    asked = str(run.get("base-model", ""))
    if not patterns or not asked or "base-model" in node:
        return
    if not any(fnmatch.fnmatchcase(asked, pattern) for pattern in patterns):
        raise SettingsError(
            f"base-model = {asked!r} is run-config's, and this client's client.base-models is {', '.join(patterns)}"
        )


def default_state_dir() -> Path:
    """``fedalloy`` below ``FLWR_HOME``, which is each SuperNode's own."""
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "fedalloy"


def _read(kind: type[C], node: Config, run: Config, prefix: str = "") -> C:
    """A settings dataclass: node-config's value, else run-config's, else the default."""
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):  # type: ignore[arg-type]
        key, hint = prefix + key_of(item.name), hints[item.name]
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


def _require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"{what} {name[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
