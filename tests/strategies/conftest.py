"""Small layouts, clients that answer without a model, and a grid in one process.

``FakeNode`` is a second, much smaller reading of ``proto/README.md`` than ``client_app``: it decodes what it is sent,
moves its slots by a rule that the test gives, and encodes what it is asked for. Tests of the algorithms use ``play``
instead, which hands adapters over directly.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient, precision_mean, squared_distances, stack, truncate, weighted_sum
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.parts import layout_of_gram, layout_of_part, layout_of_sketch, layouts_of_plan
from fedalloy_adapters.wire.codec import decode, encode, encoding_from_proto
from fedalloy_adapters.wire.flower_records import COUNTERS_TYPE, PLAN_TYPE, REGISTER_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework.dispatch import Dispatch
from strategies.framework.exchange import Answer, Brief, Client
from strategies.framework.flower import AlloyStrategy
from tests.strategies.searching import best_alone, look

Move = Callable[[str, int, Adapter], Adapter]
"""``(client id, round, received adapter) -> trained adapter`` in the same layout."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets


def layout_of(
    rank: int = 4,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    d_in: int = 6,
    d_out: int = 5,
    alpha: float = 8.0,
    base: str = "base-model",
    head: int = 3,
) -> Layout:
    """LoRA on ``modules``, and a classifier with ``head`` outputs (0: none)."""
    entries = []
    for module in modules:
        entries += [Entry(module, Factor.A, (rank, d_in)), Entry(module, Factor.B, (d_out, rank))]
    if head:
        entries += [Entry("head", Factor.WEIGHT, (head, d_out)), Entry("head", Factor.BIAS, (head,))]
    return Layout(tuple(entries), dict.fromkeys(modules, alpha / rank), base)


REFERENCE = Layout((Entry("down_proj", Factor.GRADIENT, (10, 6)),), {}, "reference")


def client_of(name: str, layout: Layout, examples: int = 10, node_id: int = 7) -> Client:
    task = report_pb2.Task(name="toy", kind="toy", examples={"train": examples, "validation": 8, "test": 5})
    registration = report_pb2.Registration(tasks=[task])
    return Client(name, node_id, layout, examples, layout.base_fingerprint, registration, REFERENCE)


def random_adapter(layout: Layout, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(layout, scale * torch.randn(layout.size, generator=generator, dtype=torch.float64).to(dtype))


def noise(name: str, round_: int, layout: Layout) -> Adapter:
    """Numbers that depend only on client, round and tensor name, so a part of an adapter has the same numbers."""
    found = Adapter.zeros(layout)
    for entry, tensor in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {round_} {entry.name}".encode()))
        tensor.copy_(torch.randn(entry.shape, generator=generator))
    return found


def target(name: str, layout: Layout) -> Adapter:
    """The target of a client's training: partly common to all clients, partly its own."""
    return Adapter(layout, noise("everybody", 0, layout).vector + 0.5 * noise(name, 0, layout).vector)


def drift(name: str, round_: int, received: Adapter) -> Adapter:
    """A move towards the client's own target with some noise: what training does, as far as a server can see."""
    step = (
        0.3 * (target(name, received.layout).vector - received.vector)
        + 0.05 * noise(name, round_, received.layout).vector
    )
    return Adapter(received.layout, received.vector + step)


def send_step(brief: Brief) -> plan_pb2.SendStep:
    sends = [step.send for step in brief.steps if step.WhichOneof("kind") == "send"]
    assert len(sends) == 1
    return sends[0]


def play(strategy: AlloyStrategy, names: Iterable[str], round_: int, move: Move = drift) -> dict[str, Any]:
    """One round: every named client moves what it is sent, in the order given; the round's record."""
    for name in names:
        client = strategy.clients[name]
        brief = strategy.brief(round_, client)
        sketches = [step.sketch for step in brief.steps if step.HasField("sketch")]
        if sketches:  # it sends what it keeps, and what it receives it only uses
            slot, received = send_step(brief).slot, Adapter.initial(client.layout, round_)
        else:
            ((slot, received),) = brief.adapters.items()
        asked = layout_of_part(client.layout, send_step(brief).part)
        answers = {slot: move(name, round_, received).part(asked)}
        answers |= {step.slot: noise(name, 0, layout_of_sketch(REFERENCE, step.row_count)) for step in sketches}
        strategy.absorb(round_, client, Answer(answers, {slot: received}, {}, client.examples, report_pb2.Report()))
    return strategy.settle(round_)


def personal(strategy: AlloyStrategy, name: str) -> Adapter:
    """What would be delivered to the client now."""
    ((_, adapter),) = strategy.deliver(strategy.clients[name]).adapters.items()
    return adapter


def dispatch_of(strategy: AlloyStrategy, name: str, round_: int = 1) -> Dispatch:
    client = strategy.clients[name]
    return strategy.dispatch(round_, client, strategy.brief(round_, client), "run", b"")


@dataclass
class FakeNode:
    """A client: slots in memory, training is ``move`` on the part that the plan trains.

    Like a real one, it starts a round that it knows from the slots before that round.
    """

    name: str
    layout: Layout
    examples: int = 10
    move: Move = drift
    slots: dict[str, Adapter] = field(default_factory=dict)
    before: dict[str, Adapter] = field(default_factory=dict)
    held: dict[str, Adapter] = field(default_factory=dict)
    held_before: dict[str, Adapter] = field(default_factory=dict)
    last_round: int = 0
    runs: set[str] = field(default_factory=set)
    plans: list[plan_pb2.Plan] = field(default_factory=list)
    saved: Adapter | None = None
    lends: bool = False

    def registration(self) -> report_pb2.Registration:
        task = report_pb2.Task(name="toy", kind="toy", examples={"train": self.examples, "validation": 8, "test": 5})
        layouts = {"layout": self.layout.to_proto(), "reference": REFERENCE.to_proto()}
        about: dict[str, Any] = {"client_id": self.name, "lends_adapter": self.lends, **layouts}
        return report_pb2.Registration(version=1, base_model="toy", tasks=[task], **about)

    def run(self, plan: plan_pb2.Plan, blobs: Mapping[str, bytes]) -> tuple[report_pb2.Report, dict[str, bytes]]:
        assert plan.client_id == self.name
        self.plans.append(plan)
        self.runs.add(plan.run_name)
        if plan.round <= self.last_round:
            self.slots, self.held = dict(self.before), dict(self.held_before)
        self.before, self.held_before, self.last_round = dict(self.slots), dict(self.held), plan.round
        report = report_pb2.Report(
            version=1,
            run_name=plan.run_name,
            client_id=self.name,
            round=plan.round,
            examples=self.examples,
            seconds=0.5,
        )
        known = layouts_of_plan(self.layout, plan.steps)
        references = {adapter.digest: adapter for adapter in self.held.values()}
        received = {slot: decode(blob, layouts=known, references=references) for slot, blob in blobs.items()}
        if plan.keep_received:
            self.held |= received
        uploads: dict[str, bytes] = {}
        installed = False
        for step in plan.steps:
            if step.WhichOneof("kind") != "initialise" and not installed:
                installed = True
                for slot, adapter in received.items():
                    part = slot in self.slots and self.slots[slot].layout.contains(adapter.layout)
                    self.slots[slot] = self.slots[slot].with_part(adapter) if part else adapter
            report.results.append(self._step(plan, step, received, uploads))
        return report, uploads

    def _step(
        self, plan: plan_pb2.Plan, step: plan_pb2.Step, received: Mapping[str, Adapter], uploads: dict[str, bytes]
    ) -> report_pb2.StepResult:
        result = report_pb2.StepResult()
        match step.WhichOneof("kind"):
            case "initialise":
                create = not (step.initialise.keep_existing and step.initialise.slot in self.slots)
                if create and step.initialise.copy_of:
                    self.slots[step.initialise.slot] = self.slots[step.initialise.copy_of].clone()
                elif create:  # gates, too: here a gate is always one half
                    self.slots[step.initialise.slot] = Adapter.initial(self.layout, step.initialise.seed)
                result.initialise.created = create
            case "train":
                slot = step.train.slots[0]
                part = layout_of_part(self.layout, step.train.part)
                moved = self.move(self.name, plan.round, self.slots[slot].part(part))
                self.slots[slot] = self.slots[slot].with_part(moved)
                result.train.CopyFrom(
                    report_pb2.TrainResult(steps=1, examples=1, first_loss=2, mean_loss=1.5, last_loss=1)
                )
            case "evaluate":
                result.evaluate.CopyFrom(
                    report_pb2.EvaluateResult(label=step.evaluate.label, split=step.evaluate.split, examples=8)
                )
                for metric, value in self.metrics(self.mixed(step.evaluate.mixture)).items():
                    result.evaluate.metrics[metric] = value
            case "save":
                self.saved = self.mixed(step.save.mixture)
                result.save.content_digest = self.saved.digest
            case "send":
                part = layout_of_part(self.layout, step.send.part)
                reference = received[step.send.slot].part(part) if step.send.relative_to_received else None
                encoded = encode(
                    self.slots[step.send.slot].part(part),
                    encoding_from_proto(step.send.encoding),
                    reference=reference,
                    include_layout=False,
                )
                uploads[step.send.slot] = encoded.blob
                result.send.CopyFrom(report_pb2.SendResult(slot=step.send.slot, content_digest=encoded.decoded.digest))
            case "sketch":
                layout = layout_of_sketch(REFERENCE, step.sketch.row_count)
                self.slots[step.sketch.slot] = noise(self.name, 0, layout)
                encoding = encoding_from_proto(step.sketch.encoding)
                uploads[step.sketch.slot] = encode(self.slots[step.sketch.slot], encoding, include_layout=False).blob
                result.sketch.CopyFrom(report_pb2.SketchResult(slot=step.sketch.slot, examples=1, norm=1.0))
            case "gram":
                moments = noise(self.name, 0, layout_of_gram(self.layout))
                for entry, tensor in moments.items():  # positive definite: any diagonal, and nothing beside it
                    width = next(n for n in range(1, 99) if n * (n + 1) // 2 == entry.size)
                    diagonal = torch.diag(1 + tensor[:width].abs())
                    tensor.copy_(diagonal[tuple(torch.triu_indices(width, width))])
                uploads[step.gram.slot] = encode(
                    moments, encoding_from_proto(step.gram.encoding), include_layout=False
                ).blob
                result.gram.slot = step.gram.slot
            case "attribute" | "likeness" as kind:
                getattr(result, kind).examples = 5
            case "density":
                look(step.density, self.name, result.density)
            case "select":
                losses = [self.metrics(self.slots[slot])["loss"] for slot in step.select.slots]
                best = min(range(len(losses)), key=lambda index: losses[index])
                found, target_slot = self.slots[step.select.slots[best]], step.select.target
                is_best = step.select.rule == plan_pb2.SELECT_RULE_BEST
                chosen = is_best or losses[best] < self.metrics(self.slots[target_slot])["loss"]
                self.slots[target_slot] = found.clone() if chosen else self.slots[target_slot]
                result.select.weights.extend(float(chosen and index == best) for index in range(len(losses)))
                result.select.losses.extend(losses)
            case "search":
                losses_of = {slot: self.metrics(self.slots[slot])["loss"] for slot in step.search.slots}
                alone = best_alone(step.search, losses_of, self.examples, result.search)
                self.slots[step.search.target] = self.slots[alone].clone()
            case "merge" if step.merge.own_heads_only:  # these clients have none
                result.merge.max_rank = max(self.layout.ranks.values())
            case "merge":
                terms = [self.slots[term.slot] for term in step.merge.mixture.terms]
                if any(found.layout.digest != self.layout.digest for found in terms):
                    merged = stack(terms, [term.scalar for term in step.merge.mixture.terms])
                    ranks = dict.fromkeys(self.layout.ranks, step.merge.truncate_rank)
                    rank = step.merge.truncate_rank
                    self.slots[step.merge.target] = truncate(merged, self.layout.with_ranks(ranks)) if rank else merged
                else:
                    self.slots[step.merge.target] = self.mixed(step.merge.mixture)
                result.merge.max_rank = max(self.layout.ranks.values())
            case "distance":
                first, second = self.slots[step.distance.first], self.slots[step.distance.second]
                squared = squared_distances(first, second)
                result.distance.squared.extend(squared[module] for module in self.layout.modules)
            case "replace":
                fired = [rule.task for rule in step.replace.rules if rule.margin < float("inf")]
                for rule in step.replace.rules:
                    result.replace.tasks.add(task=rule.task, replaced=rule.task in fired, source_loss=1.5)
                if fired:
                    self.slots[step.replace.target] = self.slots[step.replace.source].clone()
            case "distill":
                slot = step.distill.train.slots[0]
                self.slots[slot] = self.move(self.name, plan.round, self.slots[slot])
                result.distill.train.CopyFrom(report_pb2.TrainResult(steps=1, mean_loss=1.5))
            case "fisher":
                slots = (
                    (step.fisher.first, step.fisher.keep_first),
                    (step.fisher.second, step.fisher.keep_second),
                )
                for slot, kept in slots:
                    if kept:
                        self.slots[kept] = Adapter(self.layout, 1 + self.slots[slot].vector.square())
                result.fisher.CopyFrom(self.fisher())
            case kind:
                raise AssertionError(f"a plan of these strategies has no {kind} step")
        return result

    def mixed(self, mixture: plan_pb2.Mixture) -> Adapter:
        """The mixture in factor space: these clients measure factors."""
        if mixture.terms[0].WhichOneof("coefficient") == "precision":
            pairs = [(self.slots[term.slot], self.slots[term.precision]) for term in mixture.terms]
            return precision_mean(*zip(*pairs, strict=True))
        coefficients: list[Coefficient] = [
            dict(term.per_module.values)
            if term.HasField("per_module")
            else 0.5
            if term.HasField("gate")
            else term.scalar
            for term in mixture.terms
        ]
        if mixture.shares:
            coefficients = [1 / len(mixture.terms)] * len(mixture.terms)
        slots = [self.slots[term.slot] for term in mixture.terms]
        if len(coefficients) == 1 and coefficients[0] == 1.0:
            return slots[0].clone()
        if len({slot.layout.digest for slot in slots}) > 1:  # other ranks: there are no factors to be added
            return stack(slots, coefficients)
        return weighted_sum(slots, coefficients)

    def fisher(self) -> report_pb2.FisherResult:
        """Numbers of the client's name; nothing is computed."""
        modules = len(self.layout.modules)
        drawn = torch.rand(7, modules, generator=torch.Generator().manual_seed(zlib.crc32(self.name.encode())))
        described = report_pb2.FisherResult.DESCRIPTOR.fields
        fields = [field.name for field in described if field.is_repeated and field.message_type is None]
        lists = dict(zip(fields, drawn.tolist(), strict=True))
        return report_pb2.FisherResult(samples=3, damping=1.0, **lists)

    def metrics(self, model: Adapter) -> dict[str, float]:
        """Squared distance to the target of ``drift``, and an "accuracy" that grows as it falls."""
        if model.layout.digest != self.layout.digest:
            model = truncate(model, self.layout)
        loss = float((model.vector - target(self.name, model.layout).vector).square().mean())
        return {"loss": loss, "accuracy": 1 / (1 + loss)}


class FakeGrid(Grid):
    """Flower's grid over ``FakeNode``s, numbered from 1; ``tamper(message, reply)`` may replace a reply, or drop it."""

    def __init__(
        self, nodes: Sequence[FakeNode], tamper: Callable[[Message, Message], Message | None] | None = None
    ) -> None:
        self.nodes = dict(enumerate(nodes, start=1))
        self.tamper = tamper or (lambda message, reply: reply)
        self.count = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id) for node_id in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = f"message-{self.count}"  # as Flower's grids do
            reply = self.tamper(message, self.answer(message))
            if reply is not None:
                replies.append(reply)
        return replies[::-1]  # in no order that a strategy may rely on

    def answer(self, message: Message) -> Message:
        node = self.nodes[message.metadata.dst_node_id]
        kind = message.metadata.message_type
        if kind == REGISTER_TYPE:
            return Message(pack("registration", node.registration()), reply_to=message)
        assert kind in (PLAN_TYPE, COUNTERS_TYPE)
        plan, blobs = unpack(message.content, "plan", plan_pb2.Plan)
        report, uploads = node.run(plan, blobs)
        return Message(pack("report", report, uploads), reply_to=message)


def error_from_the_superlink(message: Message, reason: str = "Node Unavailable", code: int = 5) -> Message:
    """An error that Flower's SuperLink makes for a node: its sender is the SuperLink (1), not the node."""
    reply = Message(Error(code=code, reason=reason), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return reply
