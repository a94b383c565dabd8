"""The answers of a client without a model: right in form and size, and as cheap as possible."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Message, RecordDict

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.parts import layout_of_part, layout_of_sketch
from fedalloy_adapters.wire.codec import encode
from fedalloy_adapters.wire.flower_records import COUNTERS_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.strategies.conftest import REFERENCE, layout_of


def layout_of_bytes(size: int) -> Layout:
    """The layout of an adapter with this many bytes: rank 8, modules of 1024 (256 if it is small) in and out."""
    width = 1024 if size >= 2**20 else 256
    return layout_of(
        rank=8, modules=[f"m{i}" for i in range(size // (4 * 16 * width))], d_in=width, d_out=width, head=0
    )


def reference_of_bytes(size: int) -> Layout:
    """A gradient that sketches are rows of; 0.4 of it is sent."""
    return Layout((Entry("reference", Factor.GRADIENT, (size // 256, 64)),), {}, "reference")


class ThinClient:
    """Answers registrations, plans and questions for counters.

    Args:
        name: the client's id.
        layout: its adapter's layout.
        reference: its reference gradient's layout.
    """

    def __init__(self, name: str, layout: Layout, reference: Layout = REFERENCE) -> None:
        self.name = name
        self.layout = layout
        self.reference = reference

    def answer(self, message: Message) -> RecordDict:
        """The content of the reply."""
        kind = message.metadata.message_type
        if kind == REGISTER_TYPE:
            return pack("registration", self.registration())
        if kind == COUNTERS_TYPE:
            return pack("counters", report_pb2.Counters(version=1))
        plan, _ = unpack(message.content, "plan", plan_pb2.Plan)
        return self.report(plan)

    def registration(self) -> report_pb2.Registration:
        """Ten training examples, four for validation, five for testing."""
        task = report_pb2.Task(name="toy", kind="toy", examples={"train": 10, "validation": 4, "test": 5})
        return report_pb2.Registration(
            version=1,
            client_id=self.name,
            base_model="toy",
            layout=self.layout.to_proto(),
            tasks=[task],
            reference=self.reference.to_proto(),
            reads_beside=True,
        )

    def report(self, plan: plan_pb2.Plan) -> RecordDict:
        """A result for every step, and what is to be sent: numbers that depend on client and round."""
        report = report_pb2.Report(version=1, run_name=plan.run_name, client_id=plan.client_id, round=plan.round)
        uploads = {}
        modules = len(self.layout.modules)
        for step in plan.steps:
            kind = step.WhichOneof("kind") or ""
            result = report.results.add()
            body = getattr(result, kind)
            body.SetInParent()
            if kind == "evaluate":
                body.label, body.split = step.evaluate.label, step.evaluate.split
                body.metrics["loss"] = 1.0
            elif kind == "distance":
                body.squared.extend([1.0] * modules)
            elif kind == "fisher":
                for _ in step.fisher.more_dampings:
                    _fill(body.more.add(), modules)
                _fill(body, modules)
                body.samples = 3
            elif kind == "send":
                body.slot = step.send.slot
                uploads[body.slot] = self._blob(layout_of_part(self.layout, step.send.part), plan.round)
            elif kind == "sketch":
                body.slot = step.sketch.slot
                uploads[body.slot] = self._blob(layout_of_sketch(self.reference, step.sketch.row_count), plan.round)
        return pack("report", report, uploads, beside=plan.reads_beside)

    def _blob(self, layout: Layout, round_: int) -> bytes:
        generator = torch.Generator().manual_seed(hash((self.name, round_)) % 2**31)
        return encode(Adapter(layout, 1e-3 * torch.randn(layout.size, generator=generator)), include_layout=False).blob


def _fill(body: Any, modules: int) -> None:
    """A one for each module in every list of numbers."""
    for field in body.DESCRIPTOR.fields:
        if field.is_repeated and field.message_type is None:
            getattr(body, field.name).extend([1.0] * modules)
