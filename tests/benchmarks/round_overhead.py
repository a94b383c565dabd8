"""Seconds per round beyond training: stock Flower, FedAlloy without and with the resident trainer, side by side.

    python -m tests.benchmarks.round_overhead                          # 2 and 4 clients, a small and a 1B-shaped base
    python -m tests.benchmarks.round_overhead --quick --json out.json  # 2 clients, small base; below ten minutes

All on one local cluster of stock SuperNodes (TLS, registered keys) that is started for each case: the same base model,
LoRA layers, data, steps and batch size, one way after the other.

    stock     stock_app/: fp32 state dict, train and evaluate as two messages, ``FedAvg.start``; imports and loads the
              model for every message
    empty     the same app with one message that does nothing: the cost of Flower itself
    process   FedAlloy with ``trainer.resident = false``
    resident  FedAlloy with its defaults

A round's overhead is its wall time at the server minus the training of its slowest client; evaluation counts as
overhead in all of them. The first round of each is left out (caches, bundle, and the trainer's start) and shown apart.
``cpu`` is what all processes of SuperLink and SuperNodes used in the whole run, training included, per round; their
polls are in it, so it grows with the clock. Run this on a machine that does nothing else: ways are measured one after
the other, and a ratio means something only where all of them had the same cores.
Base models are Llamas over characters with random weights: ``small`` has 60,000 parameters in float32 (``wide``, of
``wire_bytes.py``, 7 million), ``1b`` the shape of Llama 3.2 1B (without its vocabulary: 0.97 billion) in bfloat16, and
is left out where memory does not allow it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import psutil
import torch
import transformers
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from client_app.data.dataset import Dataset
from client_app.kinds import KINDS
from client_app.model.bases.model_folders import find_model
from client_app.own.encoding import load_encoder
from client_app.own.files import read_own
from client_app.settings import DataSettings, ModelSettings, Settings
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster import local
from server_app.tools.demo import terminate_as_interrupt
from tests.in_process import EXACT
from tests.toys import tiny_models, toy_data

STOCK_APP = Path(__file__).with_name("stock_app")
RATE, ALPHA = 5e-3, 16.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = ("stock", "empty", "process", "resident")
PATIENCE = 1800
"""Seconds until a part gives up; nothing here should fail because the machine is busy."""
PATIENT = {"round-timeout": PATIENCE, "startup-timeout": PATIENCE}
console = Console(width=140)


@dataclass(frozen=True)
class Case:
    """A base model, and how much is trained on it in a round."""

    base: str
    clients: int

    @property
    def dtype(self) -> str:
        """The frozen base's number type, the same for all ways."""
        return "bfloat16" if self.base == "1b" else "float32"

    @property
    def rank(self) -> int:
        """LoRA's rank."""
        return 16 if self.base == "wide" else 8

    @property
    def targets(self) -> tuple[str, ...]:
        """Layers with LoRA."""
        return LINEAR if self.base == "wide" else ("q_proj", "v_proj")

    @property
    def training(self) -> dict[str, int]:
        """Steps and batch size; nothing of their time is counted."""
        steps, batch = {"small": (30, 16), "wide": (8, 8), "1b": (1, 1)}[self.base]
        return {"steps": steps, "batch-size": batch}

    @property
    def rows(self) -> int:
        """Examples of a client, a tenth of them for testing."""
        return 20 if self.base == "1b" else 200

    @property
    def bytes_needed(self) -> int:
        """Memory: the base once for each client, as much again for work, and the page cache's copy."""
        return (2 * self.clients + 1) * 2 * 10**9 if self.base == "1b" else 0

    @property
    def rate(self) -> float:
        """Learning rate."""
        return RATE

    def prepare(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Base model and JSONL files for FedAlloy, and the same examples for the stock app; node-config by client.

        Examples have one length, so that neither side gains by padding less.
        """
        folder.mkdir(parents=True)
        save_base(folder / "base", self.base)
        encoder = load_encoder(find_model(str(folder / "base"), folder / ".cache"), KINDS["causal-lm"], 64)
        node_config = {}
        for number in range(self.clients):
            chance = random.Random(number)
            prompts = ["".join(chance.choices("abcdefgh", k=8)) for _ in range(self.rows)]
            rows = [{"prompt": f"{prompt}>", "completion": prompt[::-1]} for prompt in prompts]
            path = toy_data.write_jsonl(folder / f"{number}.jsonl", rows)
            node_config[f"client-{number}"] = {"data-path": str(path)}
            model, data = ModelSettings(), DataSettings(data_path=str(path))
            found = read_own(Settings("any", folder, "", 0, 1, 0, self.rank, ALPHA, 0.0, model, data))
            encoded = {split: encoder.encode(found.splits[split], ()) for split in ("train", "test")}
            save_examples(folder / f"{number}.npz", encoded)
        facts: dict[str, Any] = {"base": str(folder / "base"), "class": "AutoModelForCausalLM", "trained": []}
        facts |= {"rank": self.rank, "alpha": ALPHA, "targets": self.targets, "dtype": self.dtype}
        (folder / "facts.json").write_text(json.dumps(facts))
        return node_config

    def draw(self, folder: Path, seed: int) -> None:
        """Give the stock app the examples that FedAlloy's clients have with this seed; here it changes none."""

    def config(self, folder: Path) -> dict[str, Any]:
        """FedAlloy's run-config for the same work as the stock app's; ``folder`` as prepared."""
        return {
            "local-steps": self.training["steps"],
            "batch-size": self.training["batch-size"],
            "base-model": str(folder / "base"),
            "model-dtype": self.dtype,
            "target-modules": ",".join(self.targets),
            "lora-r": self.rank,
            "lora-alpha": ALPHA,
        }


def save_examples(path: Path, splits: Mapping[str, Dataset]) -> None:
    """Splits for the stock app: one array for each input, and one for labels."""
    arrays: dict[str, NDArray[Any]] = {}
    for split, examples in splits.items():
        arrays |= {f"{split}_{name}": tensor.numpy() for name, tensor in examples.inputs.items()}
        arrays[f"{split}_labels"] = examples.labels.numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]


@dataclass
class Times:
    """Rounds of one way: wall seconds, seconds that the slowest client trained, and the clients' losses at the end."""

    seconds: list[float]
    training: list[float]
    losses: dict[str, float] = field(default_factory=dict)
    answering: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0

    @property
    def loss(self) -> float | None:
        """The clients' mean loss at the end; None if nothing was evaluated."""
        return statistics.mean(self.losses.values()) if self.losses else None

    @property
    def overhead(self) -> list[float]:
        """Overhead of each round, including the first."""
        return [wall - trained for wall, trained in zip(self.seconds, self.training, strict=True)]

    @property
    def median(self) -> float:
        """The median of all rounds except the first."""
        return statistics.median(self.overhead[1:])


def save_base(folder: Path, shape: str) -> None:
    """The base model with its tokenizer."""
    if shape != "1b":
        width, layers = (384, 4) if shape == "wide" else (32, 2)
        tiny_models.save_llama(folder, width=width, layers=layers)
        return
    tokenizer = tiny_models.character_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)


class FailedError(RuntimeError):
    """A run did not come to its end; the message has its log."""


def stock(cluster: local.LocalCluster, folder: Path, case: Case, rounds: int, empty: bool, seed: int = 0) -> Times:
    """Rounds of the stock app."""
    result = folder / f"times-{'empty' if empty else 'stock'}.json"
    config = {"folder": str(folder), "result": str(result), "rounds": rounds, "clients": case.clients, "empty": empty}
    config |= case.training | {"learning-rate": case.rate, "seed": seed}
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    shown = cluster.flwr("run", str(STOCK_APP), local.CONNECTION, "--stream", "--run-config", text)
    if not result.exists():
        raise FailedError(f"the stock app did not finish:\n{shown}")
    found = json.loads(result.read_text())
    return Times(found["seconds"], found["training"], found["losses"])


def alloy(cluster: local.LocalCluster, folder: Path, case: Case, rounds: int, resident: bool) -> Times:
    """Rounds of FedAlloy; also the part of a round in the client's handler, and the time of a bare question."""
    name = f"{'resident' if resident else 'process'}-{len(list(cluster.settings.runs_dir.glob('*')))}"
    config: dict[str, Any] = {"strategy": "fedavg", "run-name": name, "num-server-rounds": rounds}
    config |= {"runs-dir": str(cluster.settings.runs_dir), "min-clients": case.clients, "learning-rate": case.rate}
    config |= case.config(folder) | PATIENT | EXACT
    outcome = cluster.run(config | {"trainer.resident": resident})
    if not outcome.completed:
        raise FailedError(f"FedAlloy ended as {outcome.status}:\n{outcome.log.read_text()}")
    records = RunDirectory(cluster.settings.runs_dir / name).rounds()
    trained = [record for record in records if record["phase"] == "train"]
    answers = [answer for record in trained[1:] for answer in record["clients"].values()]
    summary = json.loads((cluster.settings.runs_dir / name / "summary.json").read_text())
    return Times(
        [record["seconds"] for record in trained],
        [max(answer["train_seconds"] for answer in record["clients"].values()) for record in trained],
        {client: metrics["loss"] for client, metrics in summary["clients"].items()},
        {
            "register": next(record["seconds"] for record in records if record["phase"] == "register"),
            "plan without training": statistics.median(a["client_seconds"] - a["train_seconds"] for a in answers),
            "bare question": next(record["seconds"] for record in records if record["phase"] == "counters"),
        },
    )


def cpu_seconds(cluster: local.LocalCluster) -> float:
    """Processor seconds of the cluster's processes so far, including trainers and ended processes."""
    total = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME", "").startswith(str(cluster.directory)):
                times = process.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(case: Case, ways: Sequence[str], rounds: int) -> dict[str, Times]:
    """The wanted ways in one case."""
    found: dict[str, Times] = {}
    with terminate_as_interrupt(), tempfile.TemporaryDirectory(prefix="fedalloy-overhead-") as text:
        root = Path(text)
        folder = root / "given"
        node_config = case.prepare(folder)
        settings = local.Settings(tuple(node_config), root / "runs", startup_timeout=PATIENCE, node_config=node_config)
        with local.LocalCluster(root / "cluster", settings) as cluster:
            for way in ways:
                started, used = time.monotonic(), cpu_seconds(cluster)
                for attempt in (1, 2):  # where nothing gets a turn for a minute, Flower gives a run up
                    try:
                        if way in ("stock", "empty"):
                            found[way] = stock(cluster, folder, case, rounds, empty=way == "empty")
                        else:
                            found[way] = alloy(cluster, folder, case, rounds, resident=way == "resident")
                        break
                    except FailedError as error:
                        if attempt == 2:
                            raise
                        console.print(f"{way}: once more, because {error}", highlight=False)
                        used = cpu_seconds(cluster)
                found[way].cpu = (cpu_seconds(cluster) - used) / rounds
                seconds, whole = found[way].median, time.monotonic() - started
                console.print(f"{case.base}, {case.clients} clients, {way}: {seconds:.2f} s ({whole:.0f} s in all)")
    return found


def ratio(ways: dict[str, Times], first: str, second: str) -> float | None:
    """The ratio of medians, if both were measured."""
    return ways[first].median / ways[second].median if first in ways and second in ways else None


def table(results: dict[Case, dict[str, Times]]) -> Table:
    """Case x way: overhead, its ratio to stock and to the empty round."""
    shown = Table(title="Seconds per round beyond training", title_justify="left")
    for column in (
        "base",
        "clients",
        "way",
        "median",
        "rounds",
        "first",
        "of stock",
        "of empty",
        "trained",
        "cpu",
        "loss",
    ):
        shown.add_column(column, justify="left" if column in ("base", "way") else "right")
    for case, ways in results.items():
        for way, times in ways.items():
            ratios = (ratio(ways, way, "stock"), ratio(ways, way, "empty"))
            shown.add_row(
                case.base,
                str(case.clients),
                way,
                f"{times.median:.2f}",
                " ".join(f"{value:.1f}" for value in times.overhead[1:]),
                f"{times.overhead[0]:.1f}",
                *("" if value is None else f"{value:.2f}" for value in ratios),
                f"{statistics.median(times.training):.2f}",
                f"{times.cpu:.1f}",
                "" if times.loss is None else f"{times.loss:.2f}",
            )
    return shown


def machine() -> dict[str, Any]:
    """The machine's properties that the figures depend on."""
    return {
        "cpus": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "load_average": psutil.getloadavg()[0],
        "versions": {"python": platform.python_version(), "flwr": flwr.__version__, "torch": torch.__version__},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 clients, the small base, 3 rounds; below ten minutes")
    parser.add_argument("--clients", type=int, nargs="+", help="numbers of clients, instead of 2 and 4")
    parser.add_argument("--bases", nargs="+", choices=("small", "1b"), help="base models, instead of both")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to compare, instead of all")
    parser.add_argument("--rounds", type=int, help="rounds of each way, at least 2, the first of which is left out")
    parser.add_argument("--json", type=Path, help="write everything here")
    given = parser.parse_args()
    counts = given.clients or ([2] if given.quick else [2, 4])
    rounds = given.rounds or (3 if given.quick else 5)
    if rounds < 2:
        parser.error(f"--rounds {rounds}: expected at least 2")
    before = machine()
    results: dict[Case, dict[str, Times]] = {}
    for base in given.bases or (["small"] if given.quick else ["small", "1b"]):
        for case in (Case(base, clients) for clients in counts):
            free = psutil.virtual_memory().available
            if free < case.bytes_needed:
                need = f"{case.bytes_needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free"
                console.print(f"{base}, {case.clients} clients: left out, {need}", highlight=False)
                continue
            results[case] = measure(case, given.ways, rounds)
    console.print(table(results))
    for case, ways in results.items():
        if "resident" in ways:
            said = {name: round(seconds, 2) for name, seconds in ways["resident"].answering.items()}
            console.print(f"{case.base}, {case.clients} clients, resident: {said}", highlight=False)
    console.print(f"machine: {before}", highlight=False)
    if given.json:
        over = {other: [ratio(ways, "resident", other) for ways in results.values()] for other in ("stock", "empty")}
        report = {
            f"resident_over_{other}": max((value for value in values if value is not None), default=None)
            for other, values in over.items()
        } | {
            "cases": [
                asdict(case) | {way: asdict(times) | {"median_overhead": times.median} for way, times in ways.items()}
                for case, ways in results.items()
            ],
            "machine": before,
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
