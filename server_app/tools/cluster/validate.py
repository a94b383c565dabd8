"""What would go wrong in a run, found before it: run-config, and each client's keys, data, model and one batch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from fedalloy_adapters.words import one_line

MEGABYTE = 10**6
STATES = 16
"""Bytes of each trained number: itself, its gradient, and AdamW's two moments, in float32."""


def check_run_config(run_config: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with run-config, one line each; empty where it is valid."""
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
    """Client by client: its id, a line, and whether it could take part.

    Args:
        clients: node-config by client id, paths on this machine.
        run_config: of the run.
    """
    with tempfile.TemporaryDirectory(prefix="fedalloy-validate-") as folder:
        for number, (client, table) in enumerate(clients.items()):
            numbered = {"client-id": client, "partition-id": number, "num-partitions": len(clients)}
            node = {**numbered, "state-dir": folder, **table}
            try:
                yield client, _tried(node, run_config), True
            except ValueError as error:  # all that the client's own checks raise
                yield client, one_line(error, 500), False


def _tried(node: Mapping[str, Any], run_config: Mapping[str, Any]) -> str:
    """Load what the client would load, and give its model one batch; what was found."""
    import torch
    from flwr.app import Context, RecordDict

    from client_app.model.personal import PersonalModel
    from client_app.plan.evaluation import evaluate
    from client_app.session import base_and_data
    from client_app.settings import read_settings

    context = Context(run_id=0, node_id=0, node_config=dict(node), state=RecordDict(), run_config=dict(run_config))
    settings = read_settings(context)
    base, data = base_and_data(settings)
    model = PersonalModel(base, settings.rank, settings.alpha, settings.dropout, settings.blocks)
    train = data.splits["train"]
    size = min(int(run_config.get("batch-size", 16)), len(train))
    evaluate(model, train.subset(torch.arange(size)), data)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.module.parameters()) / MEGABYTE
    trained = STATES * model.layout.size / MEGABYTE
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in data.splits.items())
    kinds = ", ".join(sorted({task.kind for task in data.each_task.values()}))
    return (
        f"{kinds}; {counts}; memory at least {weights + trained:.1f} MB (base {weights:.1f}, training {trained:.1f}, "
        "activations not counted)"
    )
