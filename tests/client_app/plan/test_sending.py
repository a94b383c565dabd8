"""Uploads with a lossy encoding: what one drops is in the next, across rounds on the disk, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.data.dataset import ClientData
from client_app.model.personal import PersonalModel
from client_app.plan import interpreter
from client_app.plan.interpreter import Interpreter
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import Workbench
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.codec import Encoding, decode, encode
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.plan.plan_client import data_of
from tests.fedalloy_adapters.samples import INTEGERS, distance, random_adapter

SLOT, ROUNDS = "model", 16


class Sender:
    """A client on whose disk each round moves the slot by the same change, in the place of training."""

    def __init__(self, model: PersonalModel, folder: Path, encoding: Encoding, patch: pytest.MonkeyPatch) -> None:
        model.unload_all()
        self.model, self.folder, self.encoding = model, folder, encoding
        self.change = random_adapter(model.layout, 1, scale=0.1)
        patch.setitem(interpreter.STEPS, "train", self.move)

    def move(self, bench: Workbench, step: plan_pb2.TrainStep) -> report_pb2.TrainResult:
        bench.slots[SLOT] = Adapter(bench.slots[SLOT].layout, bench.slots[SLOT].vector + self.change.vector)
        return report_pb2.TrainResult()

    def answer(self, round_: int, received: Adapter, *, keep: bool = False) -> tuple[Adapter, float]:
        """What the server decodes of a round's upload, and the norm that the client reports to have dropped."""
        training = Training(uplink_encoding=self.encoding)
        asked = [plan_pb2.Step(train=plan_pb2.TrainStep()), steps.send(training, SLOT)]
        plan = plan_pb2.Plan(
            version=1, run_name="r", client_id="ada", round=round_, seed=1, steps=asked, keep_received=keep
        )
        blob = encode(received, Encoding.FP32, include_layout=True).blob
        data = ClientData("t", "image-classification", dict.fromkeys(("train", "validation", "test"), data_of()))
        with SlotStore(self.folder, "tiny", lambda: self.model.heads).transaction(round_) as slots:
            report, uploads = Interpreter("ada", self.model, data, slots).run(plan, {SLOT: blob})
        known = {received.layout.digest: received.layout}
        decoded = decode(uploads[SLOT], layouts=known, references={received.digest: received})
        return decoded, report.results[1].send.residual_norm


@pytest.mark.parametrize("encoding", INTEGERS)
def test_the_sum_of_what_was_decoded_is_what_was_meant_but_for_what_the_last_upload_dropped(
    model: PersonalModel, tmp_path: Path, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = random_adapter(model.layout, 0, scale=0.3)
    sender, server = Sender(model, tmp_path, encoding, monkeypatch), start
    for round_ in range(1, ROUNDS + 1):
        server, dropped = sender.answer(round_, server)
    meant = Adapter(start.layout, start.vector + ROUNDS * sender.change.vector)
    assert distance(server, meant) == pytest.approx(dropped, rel=1e-2)
    one = distance(encode(sender.change, encoding).decoded, sender.change)
    assert distance(server, meant) < 0.25 * ROUNDS * one, "without feedback it would be all of that"


def test_a_round_that_is_asked_for_again_sends_the_same_bits(
    model: PersonalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, server = Sender(model, tmp_path, Encoding.INT4, monkeypatch), random_adapter(model.layout, 0, scale=0.3)
    for round_ in (1, 2):
        server, _ = sender.answer(round_, server)
    first, again = (sender.answer(3, server) for _ in range(2))
    assert first[0].digest == again[0].digest
    assert first[1] == again[1]


def test_nothing_is_made_up_for_where_the_server_starts_anew(
    model: PersonalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that the client holds comes whole: its last upload may not have arrived, nor what that one dropped."""
    server = random_adapter(model.layout, 0, scale=0.3)
    sender = Sender(model, tmp_path / "old", Encoding.INT2, monkeypatch)
    sender.answer(1, server, keep=True)
    new = Sender(model, tmp_path / "new", Encoding.INT2, monkeypatch)
    assert sender.answer(2, server, keep=True)[0].digest == new.answer(2, server, keep=True)[0].digest
