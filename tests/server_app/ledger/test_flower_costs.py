"""What Flower makes of a message: bytes, calls, TLS records."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from server_app.ledger.flower_costs import bundle_size, extra_records, message_cost
from server_app.ledger.store import Ledger


def packed(nbytes: int) -> Message:
    records = RecordDict({"fedalloy": ConfigRecord({"plan": b"p" * 300})})
    if nbytes:
        array = Array(dtype="uint8", shape=(nbytes,), stype="fedalloy.adapter.v1", data=b"\7" * nbytes)
        records["adapters"] = ArrayRecord({"global": array})
    return Message(records, dst_node_id=2**63 + 5, message_type="train.plan")


@pytest.mark.parametrize(("nbytes", "objects"), [(0, 3), (100_000, 6), (6_000_000, 7)])
def test_message_cost_is_what_is_serialised(nbytes: int, objects: int) -> None:
    message = packed(nbytes)
    cost = message_cost(message, "down")
    assert cost.objects == objects
    assert cost.calls == objects + 2
    bodies = sum(len(item.deflate()) for item in get_all_nested_objects(message).values())
    bare = message_to_proto(remove_content_from_message(message)).ByteSize()
    # The rest: the object tree, and a few bytes of protobuf around each object.
    assert 0 < cost.bytes - bodies - bare < 120 * objects
    assert cost.tls_records >= nbytes // 16384 - objects


def test_a_reply_costs_calls_upwards() -> None:
    request = packed(0)
    request.metadata.__dict__["_message_id"] = "0" * 64
    reply = Message(packed(50_000).content, reply_to=request)
    down, up = message_cost(request, "down"), message_cost(reply, "up")
    assert up.calls == up.objects + 1 == 7
    assert up.bytes > 50_000
    assert up.control_bytes > 6 * 64  # the SuperLink names each object that it wants
    assert down.control_bytes > 4 * 64


def test_an_answer_that_the_superlink_made_up_is_not_booked(ledger: Ledger) -> None:
    reply = packed(0)
    reply.metadata.__dict__["_src_node_id"] = 1
    assert ledger.flower_message(1, "berlin", "up", "train", reply) is None
    assert ledger.totals()["up"]["message"] == 0


def test_flower_message_books_all_levels(ledger: Ledger) -> None:
    cost = ledger.flower_message(1, "berlin", "down", "train", packed(100), 100)
    assert cost is not None
    (row,) = ledger.accounts().rows()
    assert (row.tensor, row.message) == (100, cost.bytes)


@pytest.mark.parametrize(("nbytes", "records"), [(0, 0), (16379, 0), (16380, 1), (5_000_000, 305)])
def test_extra_records(nbytes: int, records: int) -> None:
    assert extra_records(nbytes) == records


def test_bundle_size_is_the_bundles(tmp_path: Path) -> None:
    app = tmp_path / "app"
    (app / "server_app").mkdir(parents=True)
    (app / "client_app").mkdir()
    (app / "pyproject.toml").write_text(
        '[project]\nname = "tiny"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = ["flwr>=1.39.0"]\n'
        '[tool.flwr.app]\npublisher = "test"\n'
        '[tool.flwr.app.components]\nserverapp = "server_app:app"\nclientapp = "client_app:app"\n'
        "[tool.flwr.app.config]\nseed = 0\n"
    )
    (app / "server_app" / "__init__.py").write_text("app = 1\n" * 5000)
    (app / "client_app" / "__init__.py").write_text("app = 2\n")
    bundle = build_fab_from_disk(app)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        archive.extractall(unpacked)
    (unpacked / ".info" / "CONTENT").unlink()
    (unpacked / "client_app" / "__pycache__").mkdir()
    (unpacked / "client_app" / "__pycache__" / "x.pyc").write_bytes(b"made by running it")
    assert bundle_size(unpacked) == len(bundle)
