"""Rounds of ``grid.send_and_receive`` over all nodes; every message has numbers of its own, as personal models have."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
client = ClientApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then the rounds."""
    config = context.run_config
    count, size, arrays = int(config["nodes"]), int(config["bytes"]), int(config["arrays"])
    while len(list(grid.get_node_ids())) < count:
        time.sleep(0.5)
    found: dict[str, list[float]] = {"seconds": [], "answered": []}
    random = np.random.default_rng(0)
    for _ in range(int(config["rounds"])):
        started = time.monotonic()
        messages = []
        for node in grid.get_node_ids():
            record = ArrayRecord([random.standard_normal(size // 4 // arrays, dtype=np.float32) for _ in range(arrays)])
            content = RecordDict({"arrays": record, "config": ConfigRecord({"plan": b"x" * 300})})
            messages.append(Message(content, dst_node_id=node, message_type="train"))
        replies = list(grid.send_and_receive(messages, timeout=1200))
        answers = [reply for reply in replies if not reply.has_error()]
        for answer in answers:
            answer.content["arrays"].to_numpy_ndarrays()
        found["seconds"].append(time.monotonic() - started)
        found["answered"].append(len(answers))
        Path(str(config["result"])).write_text(json.dumps(found))
