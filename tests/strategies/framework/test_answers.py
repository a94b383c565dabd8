"""Plans out, answers in: honest answers arrive exactly, and a bad one raises nothing but BadAnswerError."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import MAX_BLOB_BYTES, Encoding, decode, payload_size
from fedalloy_adapters.wire.flower_records import (
    ARRAY_RECORD,
    CONFIG_RECORD,
    COUNTERS_TYPE,
    PLAN_TYPE,
    REGISTER_TYPE,
    pack,
    unpack,
)
from proto.fedalloy.v1 import adapter_pb2, plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.answers import answer_from, client_from, read_answer, read_counters, read_registration
from strategies.framework.dispatch import Dispatch, counters_message, plan_dispatch, register_message
from strategies.framework.exchange import BadAnswerError
from strategies.framework.steps import Training
from tests.strategies.conftest import FakeNode, error_from_the_superlink, layout_of, random_adapter
from tests.strategies.hostile import (
    HOSTILE,
    LAYOUT,
    NAME,
    NODE,
    PART,
    Hostile,
    asked,
    claims,
    dispatch_of,
    honest,
    reply_with,
    results,
)

# ------------------------------------------------------------------------------------------------------- honest answers


@pytest.mark.parametrize("downlink", list(Encoding))
@pytest.mark.parametrize("uplink", list(Encoding))
def test_an_honest_answer_arrives_to_the_bit(uplink: Encoding, downlink: Encoding) -> None:
    dispatch = dispatch_of(uplink, downlink)
    report, blobs, node = honest(dispatch)
    found, adapters = read_answer(dispatch, reply_with(dispatch, report, blobs))
    assert found == report
    assert set(adapters) == {"global", "extra"}
    assert adapters["global"].layout.digest == LAYOUT.digest
    assert adapters["extra"].layout.digest == PART.digest
    digests = {result.send.slot: result.send.content_digest for result in report.results if result.HasField("send")}
    assert {slot: adapter.digest for slot, adapter in adapters.items()} == digests
    assert adapters["extra"].digest == dispatch.received["extra"].select([Factor.B]).digest  # was not trained
    if uplink is Encoding.FP32:
        assert torch.equal(adapters["global"].vector, node.slots["global"].vector)
    else:
        sent = node.slots["global"].vector - dispatch.received["global"].vector
        lost = float((adapters["global"].vector - node.slots["global"].vector).norm() / sent.norm())
        assert 0 < lost < {Encoding.INT4: 0.2, Encoding.INT2: 0.6}.get(uplink, 0.02)
    answer = answer_from(dispatch, reply_with(dispatch, report, blobs))
    assert answer.examples == 10
    assert {s: a.digest for s, a in answer.received.items()} == {s: a.digest for s, a in dispatch.received.items()}
    assert dict(answer.metrics["personal"]) == dict(report.results[0].evaluate.metrics)


@pytest.mark.parametrize("downlink", list(Encoding))
def test_received_is_what_the_client_decodes_and_not_what_was_meant(downlink: Encoding) -> None:
    dispatch = dispatch_of(downlink=downlink)
    _, blobs = unpack(dispatch.content, "plan", plan_pb2.Plan)
    for slot, seed in (("global", 1), ("extra", 2)):
        decoded = decode(blobs[slot], expected=LAYOUT)
        assert decoded.digest == dispatch.received[slot].digest
        same = torch.equal(decoded.vector, random_adapter(LAYOUT, seed).vector)
        assert same == (downlink is Encoding.FP32)
        assert dispatch.tensor_bytes[slot] == payload_size(LAYOUT, downlink.whole) < len(blobs[slot])


def test_a_plan_is_a_flower_message_of_its_own_kind() -> None:
    dispatch = dispatch_of()
    message = dispatch.message(NODE, ttl=60)
    assert message.metadata.message_type == PLAN_TYPE
    assert message.metadata.dst_node_id == NODE
    assert message.metadata.group_id == "3"
    assert message.metadata.ttl == 60
    plan, blobs = unpack(message.content, "plan", plan_pb2.Plan)
    assert plan == dispatch.plan
    assert (plan.version, plan.client_id, plan.run_name, plan.round, plan.seed) == (1, NAME, "run", 3, 4)
    assert set(blobs) == {"global", "extra"}
    assert register_message(NODE, 5).metadata.message_type == REGISTER_TYPE
    assert counters_message(NODE, 5).metadata.message_type == COUNTERS_TYPE


def test_layouts_that_the_client_knows_are_left_out() -> None:
    def with_layout(step_factors: list[Factor], sent: Layout) -> bool:
        dispatch = plan_dispatch(
            [steps.send(Training(), "s", factors=step_factors)],
            {"s": Adapter.zeros(sent)},
            client_id=NAME, layout=LAYOUT, round_=1, seed=0, run_name="run",
        )  # fmt: skip
        blob = dispatch.content.array_records[ARRAY_RECORD]["s"].data
        length = int.from_bytes(blob[8:12], "little")
        return adapter_pb2.AdapterHeader.FromString(blob[12 : 12 + length]).HasField("layout")

    assert not with_layout([], LAYOUT)
    assert not with_layout([Factor.B], PART)
    assert with_layout([], PART)
    assert with_layout([Factor.A], PART)
    assert with_layout([], layout_of(rank=16))


# ------------------------------------------------------------------------------------------------------ hostile answers


def test_the_hostile_answers_start_from_one_that_is_accepted() -> None:
    hostile = Hostile()
    for reply in (hostile.reply(), hostile.header(), hostile.payload("global", 0, b""), results(lambda r: r)(hostile)):
        read_answer(hostile.dispatch, reply)
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_refused_by_name(name: str) -> None:
    spoilt, finding = HOSTILE[name]
    hostile = Hostile()
    reply = spoilt(hostile)
    for reader in (read_answer, answer_from):
        with pytest.raises(BadAnswerError) as caught:
            reader(hostile.dispatch, reply)
        text = str(caught.value)
        assert len(text) < 2100
        assert text.startswith("client 'berlin'"), text
        assert re.search(finding, text), text
        assert text.isprintable()


def evidence_reply(spoil: Callable[[report_pb2.Report], object]) -> tuple[Dispatch, Message]:
    """An answer with the numbers behind Potara's weights, one of them spoilt."""
    training, mix = Training(), steps.mixture("global")
    plan = [
        steps.evaluate(training, mix, "search-0.500", "validation"),
        steps.distance("global", "local"),
        steps.fisher("global", "local", split="train", samples=3, damping=1.0),
    ]
    dispatch = plan_dispatch(plan, {}, client_id=NAME, layout=LAYOUT, round_=3, seed=4, run_name="run", encoding="fp32")
    node = FakeNode(NAME, LAYOUT)
    node.slots |= {"global": random_adapter(LAYOUT, 1), "local": random_adapter(LAYOUT, 2)}
    report, uploads = node.run(unpack(asked(dispatch).content, "plan", plan_pb2.Plan)[0], {})
    spoil(report)
    return dispatch, reply_with(dispatch, report, uploads)


EVIDENCE: dict[str, tuple[Callable[[report_pb2.Report], object], str]] = {
    "no loss": (lambda r: r.results[0].evaluate.metrics.pop("loss"), "no loss under the label 'search-0.500'"),
    "other scores, and the loss withheld": (
        lambda r: (
            r.results[0].evaluate.metrics.pop("loss")
            and r.results[0].evaluate.MergeFrom(report_pb2.EvaluateResult(withheld=True, metrics={"accuracy": 0.5}))
        ),
        "no loss under the label 'search-0.500'",
    ),
    "a loss that is no number": (lambda r: r.results[0].evaluate.metrics.update(loss=float("nan")), "finite"),
    "a distance too few": (lambda r: r.results[1].distance.squared.pop(), "numbers in squared, expected one for each"),
    "a distance too many": (lambda r: r.results[1].distance.squared.append(1.0), "numbers in squared"),
    "a distance whose sum overflows": (lambda r: r.results[1].distance.squared.__setitem__(0, 1e300), "0 to 1e"),
    "a negative distance": (lambda r: r.results[1].distance.squared.__setitem__(0, -1.0), "expected 0 to"),
    "no variances": (lambda r: r.results[2].fisher.ClearField("variance_first"), "0 numbers in variance_first"),
    "a negative variance": (lambda r: r.results[2].fisher.variance_second.__setitem__(1, -1e-9), "variance_second"),
    "an infinite covariance": (
        lambda r: r.results[2].fisher.covariance.__setitem__(0, float("inf")),
        "to inf, expected 0 to",
    ),
    "a huge dimension": (lambda r: r.results[2].fisher.effective_dimension.__setitem__(0, 1e61), "0 to 1e"),
}


def test_evidence_for_a_weight_arrives() -> None:
    dispatch, reply = evidence_reply(lambda _: None)
    report, _ = read_answer(dispatch, reply)
    assert len(report.results) == 3


@pytest.mark.parametrize("name", EVIDENCE)
def test_hostile_evidence_for_a_weight_is_refused_by_name(name: str) -> None:
    spoil, finding = EVIDENCE[name]
    dispatch, reply = evidence_reply(spoil)
    with pytest.raises(BadAnswerError, match=finding) as caught:
        read_answer(dispatch, reply)
    assert str(caught.value).startswith("client 'berlin'")


def test_any_change_of_bytes_is_refused_or_changes_nothing() -> None:
    """An accepted blob differs from the honest one in its nonce only; a report may say anything, but never crash."""
    dice = random.Random(0)
    dispatch = dispatch_of()
    report, uploads, _ = honest(dispatch)
    _, expected = read_answer(dispatch, reply_with(dispatch, report, uploads))
    refused = 0
    for _ in range(600):
        changed = dict(uploads)
        slot = dice.choice(sorted(changed))
        changed[slot] = mutated(changed[slot], dice)
        try:
            _, adapters = read_answer(dispatch, reply_with(dispatch, report, changed))
        except BadAnswerError:
            refused += 1
        else:
            assert all(adapters[name].digest == expected[name].digest for name in expected)
    assert refused > 300
    records = pack("report", report, uploads)
    for _ in range(600):
        records[CONFIG_RECORD] = ConfigRecord({"report": mutated(report.SerializeToString(), dice)})
        try:
            answer_from(dispatch, Message(records, reply_to=asked(dispatch)))
        except BadAnswerError:
            refused += 1
    assert refused > 500


def mutated(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        position = dice.randrange(min(len(found), dice.choice((120, len(found)))))
        match dice.randrange(4):
            case 0:
                found[position] ^= 1 << dice.randrange(8)
            case 1:
                found[position] = dice.randrange(256)
            case 2:
                del found[position : position + dice.choice((1, 4, 100))]
            case _:
                found[position:position] = dice.randbytes(dice.choice((1, 4, 100)))
        if not found:
            break
    return bytes(found)


# ------------------------------------------------------------------------------------------- registrations and counters


def registration_reply(registration: report_pb2.Registration | bytes, key: str = "registration") -> Message:
    value = registration if isinstance(registration, bytes) else registration.SerializeToString()
    return Message(RecordDict({CONFIG_RECORD: ConfigRecord({key: value})}), reply_to=register_message(NODE))


def registered(**fields: Any) -> report_pb2.Registration:
    registration = FakeNode(NAME, LAYOUT, examples=17).registration()
    for name, value in fields.items():
        if name in ("layout", "wire"):
            getattr(registration, name).CopyFrom(value)
        elif name == "tasks":
            registration.tasks[0].examples.update(value)
        else:
            setattr(registration, name, value)
    return registration


def test_an_honest_registration_is_a_client() -> None:
    registration, layout = read_registration(registration_reply(registered()))
    client = client_from(registration, layout, NODE)
    assert (client.id, client.node_id, client.examples, client.base_model) == (NAME, NODE, 17, "toy")
    assert client.layout.digest == LAYOUT.digest
    assert not client.registration.HasField("layout")  # a thousand clients have one layout between them
    assert client.registration_kept() == registration.SerializeToString(deterministic=True)
    for name in ("a", "A-1_b.c", "0", "x" * 64):
        assert read_registration(registration_reply(registered(client_id=name)))[0].client_id == name


def test_examples_of_several_tasks_add_up_and_only_training_examples_count() -> None:
    registration = registered()
    registration.tasks.add(name="second", examples={"train": 3, "validation": 100})
    registration.tasks.add(name="third", examples={"test": 100})
    assert client_from(registration, LAYOUT, NODE).examples == 20


def without_scalings(layout: adapter_pb2.Layout) -> adapter_pb2.Layout:
    del layout.scalings[:]
    return layout


def twice_scaled(layout: adapter_pb2.Layout) -> adapter_pb2.Layout:
    layout.scalings.append(layout.scalings[0])
    return layout


def huge() -> adapter_pb2.Layout:
    shape = (2**20, 2**20)
    return Layout((Entry("m", Factor.WEIGHT, shape),), {}, "base").to_proto()


REGISTRATIONS: dict[str, tuple[Callable[[], Message], str]] = {
    **{
        f"client-id-{index}": (
            lambda name=name: registration_reply(registered(client_id=name)),  # type: ignore[misc]
            "not valid: client id .*: expected 1 to 64 letters",
        )
        for index, name in enumerate(
            ("", ".", "..", "../x", "a/b", "/etc", "a\\b", "-a", ".a", "a b", "a\n", "a\0", "é", "x" * 65, "y" * 10**6)
        )
    },
    "version-2": (lambda: registration_reply(registered(version=2)), "Registration has version 2, expected 1"),
    "garbage": (lambda: registration_reply(b"\xff\xff\xff"), "'registration' is not a Registration"),
    "empty": (lambda: registration_reply(b""), "Registration has version 0"),
    "another-key": (lambda: registration_reply(registered(), "report"), "expected bytes 'registration'"),
    "no-records": (lambda: Message(RecordDict(), reply_to=register_message(NODE)), "expected bytes 'registration'"),
    "error": (lambda: Message(Error(2, "no data-path"), reply_to=register_message(NODE)), "failed .*no data-path"),
    "no-layout": (
        lambda: registration_reply(registered(layout=adapter_pb2.Layout())),
        "a layout needs at least one entry",
    ),
    "no-base": (
        lambda: registration_reply(registered(layout=adapter_pb2.Layout(entries=LAYOUT.to_proto().entries))),
        "base finger",
    ),
    "layout-with-an-unknown-factor": (
        lambda: registration_reply(registered(layout=claims(factor=9))),
        "unknown factor number 9",
    ),
    "layout-with-a-tensor-twice": (
        lambda: registration_reply(registered(layout=claims(factor=2))),
        "occurs twice|has rank",
    ),
    "layout-without-scalings": (
        lambda: registration_reply(registered(layout=without_scalings(LAYOUT.to_proto()))),
        "scalings and LoRA modules differ",
    ),
    "layout-with-two-scalings": (
        lambda: registration_reply(registered(layout=twice_scaled(LAYOUT.to_proto()))),
        "a module has two scalings",
    ),
    "layout-that-no-machine-holds": (
        lambda: registration_reply(registered(layout=huge())),
        f"claims {2**40} numbers, expected at most {MAX_BLOB_BYTES // 4}",
    ),
    "more-examples-than-there-are": (
        lambda: registration_reply(registered(tasks={"train": 2**64 - 1})),
        r"tasks\[0\]\.examples\['train'\] = 18446744",
    ),
    "nan-clock": (
        lambda: registration_reply(registered(wire=report_pb2.WireReading(unix_time=float("nan")))),
        "unix_time = nan",
    ),
}


@pytest.mark.parametrize("name", REGISTRATIONS)
def test_a_hostile_registration_is_refused_and_its_node_named(name: str) -> None:
    make, finding = REGISTRATIONS[name]
    reply = make()
    with pytest.raises(BadAnswerError) as caught:
        read_registration(reply)
    text = str(caught.value)
    assert len(text) < 2100
    assert f"node {NODE}" in text, text
    assert re.search(finding, text), text
    assert text.isprintable()


def test_an_error_without_a_sender_is_named_by_who_was_asked() -> None:
    reply = error_from_the_superlink(register_message(NODE))
    assert reply.metadata.src_node_id == 1
    with pytest.raises(BadAnswerError, match=f"node {NODE} failed .*Node Unavailable"):
        read_registration(reply, NODE)


def test_counters() -> None:
    def counted(counters: report_pb2.Counters) -> Message:
        return Message(pack("counters", counters), reply_to=counters_message(NODE))

    reading = report_pb2.WireReading(unix_time=2.0, connections=[report_pb2.ConnectionReading(cookie=2**64 - 1)])
    counters = report_pb2.Counters(version=1, client_id=NAME, wire=reading)
    assert read_counters(counted(counters)) == counters
    for reply, finding in (
        (Message(Error(8, "gone"), reply_to=counters_message(NODE)), "failed .*gone"),
        (Message(RecordDict(), reply_to=counters_message(NODE)), "expected bytes 'counters'"),
        (counted(report_pb2.Counters(version=3)), "Counters has version 3, expected 1"),
        (
            counted(report_pb2.Counters(version=1, wire=report_pb2.WireReading(unix_time=float("inf")))),
            "unix_time = inf",
        ),
        (registration_reply(b"\xff", "counters"), "is not a Counters"),
    ):
        with pytest.raises(BadAnswerError, match=f"node {NODE}.*{finding}"):
            read_counters(reply)
