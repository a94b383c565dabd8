"""A ClientApp's process, without Flower around it: a registration and a plan (from stdin), then what was imported.

python -m tests.client_app.thin_worker OWNER STATE_DIR < plan
"""

from __future__ import annotations

import json
import sys

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client_app.app
import client_app.trainer.bundled
from client_app.trainer.address import Owner
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2

HEAVY = {"torch", "transformers", "peft", "sklearn", "safetensors"}


def main() -> None:
    owner = Owner.parse(sys.argv[1])
    client_app.trainer.bundled.find_owner = lambda: owner
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
    node = {"partition-id": 0, "num-partitions": 2, "state-dir": sys.argv[2], "client-id": "berlin"}
    context = Context(1, 7, node, RecordDict(), {})
    asked = Message(RecordDict(), dst_node_id=7, message_type=REGISTER_TYPE)
    registration, _ = unpack(client_app.app.app(asked, context).content, "registration", report_pb2.Registration)
    plan = plan_pb2.Plan.FromString(sys.stdin.buffer.read())
    asked = Message(pack("plan", plan), dst_node_id=7, message_type=PLAN_TYPE)
    report, uploads = unpack(client_app.app.app(asked, context).content, "report", report_pb2.Report)
    said = {
        "client": registration.client_id,
        "steps": len(report.results),
        "uploads": sorted(uploads),
        "heavy": sorted(HEAVY & set(sys.modules)),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
