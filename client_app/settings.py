"""Who this client is, where it keeps its files, and what the run asks of its model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SettingsError(ValueError):
    """A node-config or run-config value is missing or not valid."""


@dataclass(frozen=True)
class Settings:
    """One client's settings in one run.

    ``client_id`` is node-config's ``client-id``, else ``client-<partition-id>``, else ``node-<node id>``.
    ``state_dir`` holds all runs of this client: node-config's ``state-dir``, else ``fedalloy`` below ``FLWR_HOME``.
    ``alignments`` is where alignment files lie: node-config's ``alignments``, else that folder's ``alignments``.
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
    blocks: int = 0
    alignment: str = ""
    alignments: Path = Path()

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
    if "partition-id" not in node or "num-partitions" not in node:
        raise SettingsError("node-config has no partition-id and num-partitions, which a built-in scenario needs")
    partition, count = int(node["partition-id"]), int(node["num-partitions"])
    if not 0 <= partition < count:
        raise SettingsError(f"partition-id = {partition}, expected 0 to {count - 1} (num-partitions = {count})")
    client_id = str(node.get("client-id", f"client-{partition}"))
    _require_name("client-id", client_id)
    rank = int(run.get("lora-r", 8))
    if rank < 1:
        raise SettingsError(f"lora-r = {rank}, expected at least 1")
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
        rank=int(node.get("lora-r", rank)),
        alpha=float(run.get("lora-alpha", 16)),
        dropout=float(run.get("lora-dropout", 0.0)),
        blocks=int(run.get("lora-blocks", 0)),
        alignment=alignment,
        alignments=Path(str(node.get("alignments", state_dir / "alignments"))).expanduser(),
    )


def default_state_dir() -> Path:
    """``fedalloy`` below ``FLWR_HOME``, which is each SuperNode's own."""
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "fedalloy"


def _require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise SettingsError(
            f"{what} {name[:80]!r}: expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
