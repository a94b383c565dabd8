"""Processor time of the SuperLink's object store for a message of 64 KiB, by how its adapter travels.

    python -m tests.benchmarks.thin.objects

Flower's own store with a database in a file, in this process: register the objects of a message, store each, read each,
delete them. ``stock`` is a message as stock Flower's grid sends arrays, ``array`` ours with an array, ``beside`` ours
with the adapter beside the plan. It measures processor time, because others may use the machine, too; the best of a few
tries counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.task_identity import TaskIdentity

from fedalloy_adapters.wire.flower_records import pack
from proto.fedalloy.v1 import plan_pb2

SIZE, COUNT, TRIES = 2**16, 12, 4
KINDS = ("stock", "array", "beside")


def message_of(kind: str, number: int) -> Message:
    """A message with numbers of its own."""
    if kind == "stock":
        array = np.random.default_rng(number).standard_normal(SIZE // 4, dtype=np.float32)
        records = RecordDict(
            {"arrays": ArrayRecord([array]), "config": ConfigRecord({"plan": b"x" * 300, "n": number})}
        )
    else:
        plan = plan_pb2.Plan(version=1, run_name=str(number))
        records = pack("plan", plan, {"global": os.urandom(SIZE)}, beside=kind == "beside")
    message = Message(records, dst_node_id=5, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def milliseconds(store: SqlObjectStore, kind: str) -> tuple[int, float]:
    """Objects of a message, and what each message costs."""
    messages = [message_of(kind, number) for number in range(COUNT)]
    ready = [(get_all_nested_objects(message), get_object_tree(message)) for message in messages]
    started = time.thread_time()
    for message, (objects, tree) in zip(messages, ready, strict=True):
        store.preregister(1, tree)
        for name, item in objects.items():
            store.put(name, item.deflate())
        for name in objects:
            store.get(name)
        store.delete(message.metadata.message_id)
    return len(ready[0][0]), 1000 * (time.thread_time() - started) / COUNT


def main() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    with tempfile.TemporaryDirectory() as folder:
        store = SqlObjectStore(str(Path(folder) / "objects.db"))
        store.initialize()
        found = [{kind: milliseconds(store, kind) for kind in KINDS} for _ in range(TRIES)]
    for kind in KINDS:
        print(f"{kind:8}{found[0][kind][0]:3} objects{min(each[kind][1] for each in found):8.1f} ms")


if __name__ == "__main__":
    main()
