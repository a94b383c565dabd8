"""The round loop over the real client code, in one process: outcomes, records, and answers that are not usable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.codec import MAGIC, CodecError, decode, encode
from fedalloy_adapters.wire.flower_records import pack, unpack
from proto.fedalloy.v1 import report_pb2
from server_app.ledger.store import Ledger
from server_app.run.federation import NotEnoughClientsError
from server_app.run.run_directory import RunDirectory, RunDirectoryError
from strategies.framework.options import OptionError
from tests.in_process import FIRST_NODE
from tests.server_app.conftest import Runner

SUMMARY_KEYS = {
    "strategy", "rounds", "seed", "scenario", "clients", "mean_accuracy", "worst_accuracy", "bytes",
    "unexplained_wire_fraction", "seconds", "flwr", "git", "without_accuracy", "refused", "absent", "not_delivered",
    "diverged", "means",
}  # fmt: skip


def summary(directory: RunDirectory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory.path / "summary.json").read_text())
    return found


# tests/strategies/test_every_strategy.py has all of them.
@pytest.mark.parametrize("strategy", ["local", "fedavg", "fedmerge", "fedmosaic", "potara", "fedex-lora", "ifca"])
def test_a_run_leaves_summary_records_checkpoints_and_a_personal_adapter_for_everybody(
    run: Runner, runs_dir: Path, strategy: str
) -> None:
    directory = run(strategy=strategy)
    found = summary(directory)
    assert set(found) == SUMMARY_KEYS
    assert set(found["clients"]) == {"client-0", "client-1", "client-2"}
    scores = [client["accuracy"] for client in found["clients"].values()]
    assert found["mean_accuracy"] == pytest.approx(sum(scores) / 3)
    assert found["worst_accuracy"] == min(scores)
    phases = [(record["phase"], record["round"]) for record in directory.rounds()]
    assert phases[:4] == [("register", 0), ("train", 1), ("train", 2), ("deliver", 3)]
    kept = [path.name for path in sorted((directory.path / "checkpoints").iterdir())]
    assert kept[-2:] == ["round-0001", "round-0002"]
    assert set(kept[:-2]) <= {"round-0000"}  # where the validation examples prefer that, delivery may need it
    for client in found["clients"]:
        folder = runs_dir / "test" / "clients" / client / "adapter"
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(run: Runner) -> None:
    first = summary(run(run_name="a", strategy="fedmerge"))
    second = summary(run(run_name="b", strategy="fedmerge"))
    other = summary(run(run_name="c", strategy="fedmerge", seed=1))
    assert first["clients"] == second["clients"]
    assert first["clients"] != other["clients"]


def test_lossy_transport_still_trains_and_sends_fewer_tensor_bytes(run: Runner) -> None:
    exact = summary(run(run_name="fp32"))
    lossy = summary(run(run_name="int8", uplink_encoding="int8", downlink_encoding="bf16"))
    assert lossy["bytes"]["up"]["tensor"] < 0.27 * exact["bytes"]["up"]["tensor"]  # int8 and scales
    assert lossy["bytes"]["down"]["tensor"] == 0.5 * exact["bytes"]["down"]["tensor"]
    assert len(lossy["clients"]) == 3
    for client, metrics in lossy["clients"].items():
        assert metrics["loss"] == pytest.approx(exact["clients"][client]["loss"], rel=0.05)


FOUR_BITS = {"uplink_encoding": "int4", "downlink_encoding": "int4"}


def test_four_bits_both_ways_are_an_eighth_of_the_bytes_and_train_as_well(run: Runner) -> None:
    exact = summary(run(run_name="fp32", num_server_rounds=4))
    directory = run(run_name="int4", num_server_rounds=4, **FOUR_BITS)
    lossy = summary(directory)
    for direction in ("up", "down"):
        assert lossy["bytes"][direction]["tensor"] < 0.15 * exact["bytes"][direction]["tensor"]
    assert set(lossy["clients"]) == set(exact["clients"]) == {"client-0", "client-1", "client-2"}
    for client, metrics in lossy["clients"].items():
        assert metrics["loss"] == pytest.approx(exact["clients"][client]["loss"], rel=0.1)
    trained = [record for record in directory.rounds() if record["phase"] == "train"]
    for record in trained:
        for client in record["clients"].values():
            assert client["down_residual"]["global"] > 0
            assert client["up_residual"]["global"] > 0
            assert "sent_whole" not in client
    with Ledger(directory.path / "ledger.sqlite", read_only=True) as ledger:
        found = ledger.by_encoding()
    assert found == {way: {"int4": lossy["bytes"][way]["tensor"]} for way in ("down", "up")}
    first, last = (trained[index]["clients"]["client-0"]["down_residual"]["global"] for index in (0, -1))
    assert last < 0.5 * first  # the first blob was whole, the later ones are differences


@pytest.mark.parametrize(
    ("encoding", "strategy"), [("int8", "fedavg"), ("int4", "fedavg"), ("int8", "flora"), ("int8", "fedex-lora")]
)
def test_a_resumed_run_with_few_bits_gives_the_same_numbers(
    run: Runner, runs_dir: Path, encoding: str, strategy: str
) -> None:
    """All clients have carried out round 3 when the server gives up; they repeat it from what they held before."""

    def silent(node_id: int, message: Message, reply: Message | None) -> Message | None:
        return None if message.metadata.group_id == "3" else reply

    config: dict[str, Any] = {"num_server_rounds": 3, "strategy": strategy} | dict.fromkeys(FOUR_BITS, encoding)
    with pytest.raises(NotEnoughClientsError, match="round 3"):
        run(tamper=silent, round_timeout=1.0, **config)
    resumed = run(resume=str(runs_dir / "test"), **config)
    plain = run(run_name="plain", **config)
    assert len(summary(resumed)["clients"]) == 3
    assert summary(resumed)["clients"] == summary(plain)["clients"]
    kept = [directory.newest_checkpoint() for directory in (resumed, plain)]
    states = [found.state for found in kept if found is not None]
    assert states[0].values == states[1].values
    assert set(states[0].tensors) == set(states[1].tensors) > {"model"}
    assert all(torch.equal(tensor, states[1].tensors[name]) for name, tensor in states[0].tensors.items())
    assert not any("sent_whole" in client for record in resumed.rounds() for client in record["clients"].values())


def test_a_client_that_lost_its_disk_is_sent_everything_whole(run: Runner, runs_dir: Path) -> None:
    def disk_fails(node_id: int, message: Message, reply: Message | None) -> Message | None:
        if node_id == FIRST_NODE + 1 and message.metadata.group_id == "1":
            for name in ("slots", "history"):
                shutil.rmtree(runs_dir / "test" / "clients" / "client-1" / name)
        return reply

    directory = run(tamper=disk_fails, num_server_rounds=3, **FOUR_BITS)
    seen = [record["clients"] for record in directory.rounds() if record["phase"] == "train"]
    assert [{client["status"] for client in clients.values()} for clients in seen] == [{"ok"}] * 3
    assert [[name for name, client in clients.items() if "sent_whole" in client] for clients in seen] == [
        [],
        ["client-1"],
        [],
    ]
    assert seen[1]["client-1"]["attempts"] == 2


def test_fedmerge_with_frozen_a_moves_fewer_bytes_than_fedavg_and_local_none(run: Runner) -> None:
    fedavg = summary(run(run_name="fedavg"))["bytes"]
    fedmerge = summary(run(run_name="fedmerge", strategy="fedmerge"))["bytes"]
    local = summary(run(run_name="local", strategy="local"))["bytes"]
    assert fedmerge["up"]["tensor"] < fedavg["up"]["tensor"]
    assert local["up"]["tensor"] == local["down"]["tensor"] == 0
    assert 0 < local["up"]["message"] < fedavg["up"]["message"]


def test_an_existing_run_is_never_overwritten(run: Runner, runs_dir: Path) -> None:
    run()
    before = (runs_dir / "test" / "summary.json").read_bytes()
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        run()
    assert (runs_dir / "test" / "summary.json").read_bytes() == before


def test_an_unknown_key_names_its_neighbour(run: Runner) -> None:
    with pytest.raises(OptionError, match=r"'fedmerge.lr-v'; did you mean 'fedmerge.lr-w'\?"):
        run(fedmerge__lr_v=0.1)


def replace_upload(change: Any) -> Any:
    """A tamper that changes the second client's upload from round 1 on."""

    def tamper(node_id: int, message: Message, reply: Message | None) -> Message | None:
        if (
            reply is None
            or node_id != FIRST_NODE + 1
            or not message.metadata.message_type.startswith("train")
            or reply.has_error()
        ):
            return reply
        report, blobs = unpack(reply.content, "report", report_pb2.Report)
        if not blobs:
            return reply
        return change(message, reply, report, blobs)

    return tamper


def with_nan(message: Message, reply: Message, report: report_pb2.Report, blobs: dict[str, bytes]) -> Message:
    blob = bytearray(blobs["global"])
    blob[-4:] = b"\x00\x00\xc0\x7f"  # a float32 NaN
    return Message(pack("report", report, {"global": bytes(blob)}), reply_to=message)


def with_other_client(message: Message, reply: Message, report: report_pb2.Report, blobs: dict[str, bytes]) -> Message:
    report.client_id = "client-0"
    return Message(pack("report", report, blobs), reply_to=message)


def with_wrong_shape(message: Message, reply: Message, report: report_pb2.Report, blobs: dict[str, bytes]) -> Message:
    return Message(pack("report", report, {"global": blobs["global"][:-8]}), reply_to=message)


def with_error(message: Message, reply: Message, report: report_pb2.Report, blobs: dict[str, bytes]) -> Message:
    return Message(Error(code=8, reason="ClientApp stopped responding."), reply_to=message)


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (with_nan, "rejected", "client 'client-1' sent slot 'global': NOT_FINITE"),
        (with_other_client, "rejected", "client 'client-1' answered for client_id 'client-0', expected 'client-1'"),
        (with_wrong_shape, "rejected", "client 'client-1' sent slot 'global': BAD_LENGTH"),
        (with_error, "failed", "ClientApp stopped responding."),
        (lambda *arguments: None, "late", "no answer within"),
    ],
)
def test_one_bad_client_is_named_and_the_run_goes_on_as_if_it_were_absent(
    run: Runner, change: Any, status: str, reason: str
) -> None:
    directory = run(tamper=replace_upload(change), min_clients=2, round_timeout=1.0)
    for record in directory.rounds():
        if record["phase"] == "train":
            assert record["clients"]["client-1"]["status"] == status
            assert reason in record["clients"]["client-1"]["reason"]
            assert record["settled"]["merged"] == 2
    assert set(summary(directory)["clients"]) == {"client-0", "client-1", "client-2"}


def test_below_min_clients_the_run_stops_with_everything_saved(run: Runner, runs_dir: Path) -> None:
    with pytest.raises(NotEnoughClientsError, match="round 1: 2 of at least 3"):
        run(tamper=replace_upload(with_nan), min_clients=3)
    directory = RunDirectory(runs_dir / "test")
    assert [record["phase"] for record in directory.rounds()] == ["register", "train", "stopped"]
    assert "settled" not in directory.rounds()[1]  # a round settles only with as many answers
    loaded = directory.newest_checkpoint()
    assert loaded is not None
    assert loaded.round == 0


def test_too_few_nodes_is_a_clear_error_after_a_wait(run: Runner) -> None:
    with pytest.raises(NotEnoughClientsError, match="3 of at least 5 SuperNodes are online after 1 s"):
        run(min_clients=5, startup_timeout=1.0)


def test_a_checkpoint_continues_to_the_same_state(run: Runner, runs_dir: Path) -> None:
    directory = run(strategy="fedmerge")
    loaded = directory.newest_checkpoint()
    assert loaded is not None
    round_, state = loaded.round, loaded.state
    assert round_ == 2
    assert state.tensors["theta"].isfinite().all()
    (directory.path / "checkpoints" / "round-0002" / "state.safetensors").write_bytes(b"torn")
    torn = directory.newest_checkpoint()
    assert torn is not None
    assert torn.round == 1


def test_a_run_that_goes_on_with_other_code_says_so(
    run: Runner, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(node_id: int, message: Message, reply: Message | None) -> Message | None:
        return None if message.metadata.group_id == "2" else reply

    with pytest.raises(NotEnoughClientsError, match="round 2"):
        run(tamper=silent, round_timeout=1.0, strategy="local")
    monkeypatch.setattr("server_app.run.resume.source_digest", lambda _: "another")
    directory = run(resume=str(runs_dir / "test"), strategy="local")
    (resumed,) = [record for record in directory.rounds() if record["phase"] == "resumed"]
    assert set(resumed["code"]) == {"fedalloy"}
    assert resumed["code"]["fedalloy"].startswith("another, it was ")


def test_uploads_decode_only_as_what_was_asked() -> None:
    """The helpers above do change what a receiver sees."""
    from fedalloy_adapters.layout import Entry, Factor, Layout

    layout = Layout((Entry("m", Factor.WEIGHT, (2, 2)),), {}, "base")
    blob = encode(Adapter(layout, torch.ones(4))).blob
    assert blob.startswith(MAGIC)
    with pytest.raises(CodecError, match="NOT_FINITE"):
        decode(blob[:-4] + b"\x00\x00\xc0\x7f")
