"""The stock server: FedAvg by ``Strategy.start``; it only looks at the clock in between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round starts, how long its slowest client trained, and the clients' last losses."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.starts: list[float] = []
        self.training: list[float] = []
        self.losses: dict[str, float] = {}

    def configure_train(self, *arguments: Any, **named: Any) -> Iterable[Message]:
        self.starts.append(time.monotonic())
        return super().configure_train(*arguments, **named)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = list(replies)
        failed = [reply.error.reason for reply in found if reply.has_error()]
        if failed:
            raise RuntimeError(f"round {server_round}: {failed}")
        self.training.append(max(float(reply.content["metrics"].get("train-seconds", 0.0)) for reply in found))
        return super().aggregate_train(server_round, found)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> Any:
        found = list(replies)
        measured = [reply.content["metrics"] for reply in found if not reply.has_error()]
        self.losses = {f"client-{int(metrics['partition-id'])}": float(metrics["loss"]) for metrics in measured}
        return super().aggregate_evaluate(server_round, found)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write their times."""
    config = context.run_config
    clients = int(config["clients"])
    if config["empty"]:
        arrays = ArrayRecord([np.zeros(1, dtype=np.float32)])
    else:
        import torch
        from peft import get_peft_model_state_dict
        from stock_client import load_model

        torch.manual_seed(int(config["seed"]))
        arrays = ArrayRecord(get_peft_model_state_dict(load_model(Path(str(config["folder"])))))
    strategy = TimedFedAvg(
        fraction_evaluate=0.0 if config["empty"] else 1.0,
        min_train_nodes=clients,
        min_evaluate_nodes=clients,
        min_available_nodes=clients,
    )
    strategy.start(grid, initial_arrays=arrays, num_rounds=int(config["rounds"]), timeout=600)
    ends = [*strategy.starts[1:], time.monotonic()]
    seconds = [end - start for start, end in zip(strategy.starts, ends, strict=True)]
    found = {"seconds": seconds, "training": strategy.training, "losses": strategy.losses}
    Path(str(config["result"])).write_text(json.dumps(found))
