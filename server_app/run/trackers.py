"""Experiment trackers: passes the numbers of ``rounds.jsonl`` to TensorBoard, MLflow, Weights & Biases or trackio.

A tracker is a :class:`Sink`. Each has its own thread, so one that hangs, fails or is not installed costs the run only a
line in its log. The run's files are complete, whatever a tracker misses.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol

from flwr.common.logger import log

WARNING = 30
WAITING = 1000
"""Largest number of records that wait for a slow tracker; it misses any others."""
CLOSING_SECONDS = 20.0
"""Seconds that a run waits at its end for all trackers together."""


class Sink(Protocol):
    """A tracker that takes numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by name, for a round."""

    def close(self) -> None:
        """Close the tracker."""


class _TensorBoard:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        module: Any = import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key} = {config[key]!r}" for key in sorted(config)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """Writes to ``MLFLOW_TRACKING_URI``; without it, to the run's folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions want this before they write files
        entities: Any = import_module("mlflow.entities")
        tracking: Any = import_module("mlflow.tracking")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder.resolve() / "mlflow").as_uri()
        self._metric = entities.Metric
        self._client = tracking.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("fedalloy")
        experiment = found.experiment_id if found else self._client.create_experiment("fedalloy")
        self._run: str = self._client.create_run(experiment, run_name=name).info.run_id
        for key in sorted(config):
            self._client.log_batch(self._run, params=[entities.Param(key, str(config[key])[:500])])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        found = [self._metric(key, value, now, step) for key, value in values.items()]
        for start in range(0, len(found), 1000):  # MLflow's bound on a batch
            self._client.log_batch(self._run, metrics=found[start : start + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    """Set up by wandb's own variables: ``WANDB_API_KEY``, ``WANDB_MODE``, ..."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        self._run = wandb.init(project="fedalloy", name=name, config=dict(config), dir=str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values) | {"round": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """Set up by trackio's own variables: ``TRACKIO_DIR``, ..."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        trackio: Any = import_module("trackio")
        self._run = trackio.init(project="fedalloy", name=name, config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values) | {"round": step})

    def close(self) -> None:
        self._run.finish()


OPENERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Sink]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
"""Functions that open a tracker for a run's folder, name and run-config."""


class Trackers:
    """The trackers of one run; a context manager around it.

    Args:
        names: comma-separated keys of :data:`OPENERS`; empty: nothing is started.
        folder: the run's folder.
        config: the run's configuration.
    """

    def __init__(self, names: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._queues: dict[str, Queue[tuple[int, dict[str, float]] | None]] = {}
        self._threads: dict[str, Thread] = {}
        self._full: set[str] = set()
        for name in listed(names):
            queue: Queue[tuple[int, dict[str, float]] | None] = Queue(WAITING)
            thread = Thread(target=_work, args=(name, queue, folder, dict(config)), name=f"tracker-{name}", daemon=True)
            self._queues[name], self._threads[name] = queue, thread
            thread.start()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._queues:
            self._put(name, None)
        left = CLOSING_SECONDS
        for name, thread in self._threads.items():
            thread.join(left / len(self._threads))
            if thread.is_alive():
                log(WARNING, "tracker %s has not finished; rounds.jsonl has what may be missing there", name)

    def take(self, record: Mapping[str, Any], sizes: Mapping[tuple[str, str], int]) -> None:
        """Pass on a record of ``rounds.jsonl``; ``sizes`` has the bytes so far, by client and direction."""
        if not self._queues or record["phase"] not in ("train", "deliver"):
            return
        values = dict(values_of(record, sizes))
        for name in self._queues:
            self._put(name, (int(record["round"]), values))

    def _put(self, name: str, item: tuple[int, dict[str, float]] | None) -> None:
        try:
            self._queues[name].put_nowait(item)
        except Full:
            if name not in self._full:
                log(WARNING, "tracker %s is too slow and misses rounds; rounds.jsonl has them", name)
            self._full.add(name)


def listed(names: str) -> list[str]:
    """The names of a comma-separated list, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _work(name: str, queue: Queue[tuple[int, dict[str, float]] | None], folder: Path, config: dict[str, Any]) -> None:
    """The work of a tracker's thread; an error ends this tracker and nothing else."""
    try:
        sink = OPENERS[name](folder, folder.resolve().name, config)
        while (item := queue.get()) is not None:
            sink.write(*item)
        sink.close()
    except ModuleNotFoundError as error:
        log(WARNING, "tracker %s is not installed (%s): pip install 'fedalloy[%s]'", name, error, name)
    except Exception as error:
        log(WARNING, "tracker %s failed and gets no more numbers: %s: %s", name, type(error).__name__, error)


def values_of(record: Mapping[str, Any], sizes: Mapping[tuple[str, str], int]) -> Iterator[tuple[str, float]]:
    """Every finite number of a record, by name: ``client/<id>/<metric>``, ``mean/<metric>``, ``weight/...``, ...

    Delivered models are scored on other examples than those of rounds, so their names begin with ``delivered``.
    """
    own, means = ("client", "mean") if record["phase"] == "train" else ("delivered", "delivered-mean")
    times = ("seconds", "train_seconds", "evaluation_seconds")
    sums: dict[str, list[float]] = {}
    for name, client in record["clients"].items():
        found = {key: value for key, value in client.get("metrics", {}).get("personal", {}).items()}
        losses = [loss for loss in client.get("train_loss", ()) if loss is not None]
        found |= {"train_loss": losses[-1]} if losses else {}
        found |= {key: client[key] for key in times if client.get(key)}
        for key, value in _numbers(found):
            yield f"{own}/{name}/{key}", value
            sums.setdefault(key, []).append(value)
    for key, values in sums.items():
        yield f"{means}/{key}", sum(values) / len(values)
    weights = record.get("settled", {}).get("weights", {})
    for key, value in _numbers(weights):
        yield f"weight/{key}", value
    for (client, direction), total in sizes.items():
        yield f"bytes/{client}/{direction}", float(total)
    for direction in ("up", "down"):
        yield f"bytes/{direction}", float(sum(total for (_, way), total in sizes.items() if way == direction))
    yield "server/seconds", float(record.get("seconds", 0.0))
    unit = 1 if sys.platform == "darwin" else 1024
    yield "server/peak_memory_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _numbers(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Finite numbers in nested tables and lists, by path."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _numbers(value, f"{path}/{key}" if path else str(key))
    elif isinstance(found, list | tuple):
        for index, value in enumerate(found):
            yield from _numbers(value, f"{path}/{index}" if path else str(index))
    elif isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found):
        yield path, float(found)
