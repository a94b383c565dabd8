"""Finds problems before a run: checks run-config, each client's keys, data and model, and trains three batches."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fedalloy_adapters.words import one_line

MEGABYTE = 10**6
STATES = 16
"""Bytes for each trained number: the number, its gradient, and AdamW's two moments, in float32."""


def check_run_config(run_config: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with run-config, one line each; empty if it is valid."""
    from server_app.run.options import problems
    from strategies import strategy_from_run_config
    from strategies.framework.options import OptionError

    found = problems(run_config)
    try:
        strategy_from_run_config(run_config)
    except OptionError as error:
        found += [str(error)] * (str(error) not in found)
    return found


def check_clients(
    clients: Mapping[str, Mapping[str, Any]], run_config: Mapping[str, Any]
) -> Iterator[tuple[str, str, bool]]:
    """Check clients one by one; yields each one's id, what was found in lines, and whether it could take part.

    Args:
        clients: node-config by client id, with paths on this machine.
        run_config: the run's configuration. Its wrong values (:func:`check_run_config`) are left out here, so that they
            do not hide a missing file.
    """
    run_config = {key: value for key, value in run_config.items() if not check_run_config({key: value})}
    with tempfile.TemporaryDirectory(prefix="fedalloy-validate-") as folder:
        for number, (client, table) in enumerate(clients.items()):
            numbered = {"client-id": client, "partition-id": number, "num-partitions": len(clients)}
            node = {**numbered, "state-dir": folder, **table}
            try:
                yield client, _tried(node, run_config), True
            except ValueError as error:  # the client's own checks raise no others
                yield client, one_line(error, 500), False


def _tried(node: Mapping[str, Any], run_config: Mapping[str, Any]) -> str:
    """Load what the client would load, and train its model on three batches; returns the findings, one a line."""
    import torch
    from flwr.app import Context, RecordDict

    from client_app.model.personal import PersonalModel
    from client_app.plan.evaluation import evaluate
    from client_app.session import base_and_data
    from client_app.settings import read_settings
    from fedalloy_adapters.wire.codec import Encoding, payload_size
    from strategies.framework.options import read_options
    from strategies.framework.training import Training, resolved, settings_for

    context = Context(run_id=0, node_id=0, node_config=dict(node), state=RecordDict(), run_config=dict(run_config))
    settings = read_settings(context)
    base, data = base_and_data(settings)
    model = PersonalModel(base, settings.rank, settings.alpha, settings.dropout, settings.blocks)
    model.micro_batch = settings.model.micro_batch_size
    model.target_losses.chunk_bytes = settings.model.logits_chunk_mb * MEGABYTE
    train = data.splits["train"]
    kinds = sorted({task.kind for task in data.each_task.values()})
    asked = resolved(read_options(Training, run_config), str(run_config.get("base-model", "")))
    training = settings_for(asked, kinds, model.layout)
    size = min(training.batch_size, len(train))
    evaluate(model, train.subset(torch.arange(size)), data)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.module.parameters()) / MEGABYTE
    trained = STATES * model.layout.size / MEGABYTE
    seconds, peak = _step(model, train, training)
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in data.splits.items())
    lengths = [rows.lengths for rows in data.splits.values()]
    tokens = sum(int(found.sum()) for found in lengths if found is not None)
    sizes = ", ".join(f"{encoding} {payload_size(model.layout, encoding):,}" for encoding in Encoding)
    return "\n".join(
        [
            f"{', '.join(kinds)}; {counts}" + (f"; {tokens:,} tokens" if tokens else ""),
            f"{model.layout.size:,} trainable parameters",
            f"bytes of an adapter: {sizes}",
            f"memory at least {weights + trained:.1f} MB (base {weights:.1f}, training {trained:.1f}), and "
            f"at most {peak / MEGABYTE:.1f} MB more in three batches",
            f"a step of {size} examples takes {seconds:.3g} s, at learning-rate {training.learning_rate:g}",
            *data.notes,
        ]
    )


def _step(model: Any, train: Any, training: Any) -> tuple[float, int]:
    """Seconds of the fastest of three training steps, and bytes of memory that the steps took in addition."""
    import torch

    from client_app.plan.training import train as optimise
    from fedalloy_adapters.adapter import Adapter
    from proto.fedalloy.v1 import plan_pb2

    model.load("tried", Adapter.initial(model.layout, 0))
    model.activate({"tried": 1.0})
    step = plan_pb2.TrainStep(
        steps=3,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        max_grad_norm=1.0,
        schedule=plan_pb2.SCHEDULE_CONSTANT,
    )
    chances = torch.Generator().manual_seed(0)
    order = [torch.randperm(len(train), generator=chances)[: training.batch_size] for _ in range(3)]
    times: list[float] = []

    def timed() -> Iterator[Any]:
        for batch in order:
            times.append(time.perf_counter())
            yield batch
        times.append(time.perf_counter())

    before = _peak()
    optimise(model, step, model.trainable("tried", model.layout), train, 0, order=timed())
    model.unload_all()
    return min(end - start for start, end in itertools.pairwise(times)), _peak() - before


def _peak() -> int:
    """The most bytes that this process has had so far: on its GPU, else of resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
