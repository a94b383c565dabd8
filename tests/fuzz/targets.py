"""What is fuzzed: bytes from the other end may be refused with the errors that are documented, and do nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

from client_app.data.dataset import ClientData, Dataset
from client_app.guard.policy import PolicyError
from client_app.plan.interpreter import Interpreter
from client_app.plan.names import PlanError
from client_app.plan.slots import SlotError, SlotStore
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import CodecError, Encoding, decode, encode
from fedalloy_adapters.wire.flower_records import ARRAY_DTYPE, ARRAY_RECORD, ARRAY_STYPE, CONFIG_RECORD
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.run.run_directory import RunDirectory
from strategies.framework import steps
from strategies.framework.answers import client_from, read_answer, read_registration
from strategies.framework.exchange import BadAnswerError
from strategies.framework.limits import Limits, bounded, require_affordable
from strategies.framework.steps import Training
from tests.strategies.hostile import LAYOUT, NAME, asked, dispatch_of, honest

torch.set_num_threads(1)
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
DISPATCH = dispatch_of()
MAX_BYTES = 2**20
SPLIT = Dataset({"pixel_values": torch.zeros(2, 3, 4, 4)}, torch.zeros(2, dtype=torch.int64))
EXAMPLES = ClientData("toy", "image-classification", dict.fromkeys(("train", "validation", "test"), SPLIT))

HEADS = {
    f"{entry.module}.{entry.factor}": torch.zeros(entry.shape) for entry in LAYOUT.entries if not entry.factor.is_lora
}
GAUSSIANS = [plan_pb2.Gaussian(mean=[0.0, 1.0], variance=[1.0, 2.0])]
REGISTRATION = report_pb2.Registration(
    version=1,
    client_id=NAME,
    base_model="toy",
    layout=LAYOUT.to_proto(),
    reference=Layout((Entry("mlp", Factor.GRADIENT, (4, 6)),), {}, "toy").to_proto(),
    tasks=[{"name": "toy", "kind": "causal-lm", "examples": {"train": 9, "test": 3}, "notes": ["1 blank line"]}],
)
ROUNDS = """{"phase": "register", "round": 0, "clients": {"ada": {"status": "ok"}}}
{"phase": "train", "round": 1, "clients": {"ada": {"status": "ok", "metrics": {}}}, "settled": {"weights": {}}}
{"phase": "resumed", "round": 0, "clients": {}}
{"phase": "deliver", "round": 2, "clients": {}}
"""


class Memory(dict[str, Adapter]):
    """Slots without a disk."""

    residual = dict.get
    received = dict.get

    def __init__(self, slots: dict[str, Adapter]) -> None:
        super().__init__(slots)
        self.hidden: frozenset[str] = frozenset()
        self.losses = {"before": {"toy": 1.0}, "after": {"toy": 2.0}}

    def names(self) -> list[str]:
        return sorted(self)

    def __missing__(self, slot: str) -> Adapter:
        raise SlotError(f"no slot {slot!r}")

    def set_residual(self, slot: str, residual: Adapter) -> None:
        pass

    def save_personal(self, adapter: Adapter) -> None:
        assert adapter.vector.numel() < MAX_BYTES

    def whole(self, slot: str) -> Adapter:
        return self[slot]

    def set_whole(self, slot: str, adapter: Adapter, *, keep_own_heads: bool = False) -> None:
        self[slot] = adapter

    def optimizer(self, slot: str) -> dict[str, torch.Tensor]:
        return {}

    save_parts = set_received = set_optimizer = set_residual


class NoModel:
    """Knows what an adapter looks like; whatever is computed with it is refused."""

    layout, own_layout, device = LAYOUT, None, torch.device("cpu")

    def initial(self, seed: int) -> Adapter:
        return Adapter.initial(LAYOUT, seed)

    def __getattr__(self, name: str) -> Any:
        raise ValueError("there is no model here")


def adapter(data: bytes) -> None:
    """A blob from anywhere."""
    try:
        found = decode(data, layouts={LAYOUT.digest: LAYOUT}, max_bytes=MAX_BYTES)
    except CodecError:
        return
    assert bool(found.vector.isfinite().all())
    assert found.vector.numel() <= len(data)


def plan(data: bytes) -> None:
    """A plan from a server; model and data refuse, slots are in memory."""
    try:
        asked_for = plan_pb2.Plan.FromString(data)
    except DecodeError:
        return
    asked_for.client_id = NAME  # or everything ends there
    slots: Any = Memory({"global": Adapter.zeros(LAYOUT), "local": Adapter.initial(LAYOUT, 1)})
    model: Any = NoModel()
    try:
        _, uploads = Interpreter(NAME, model, EXAMPLES, slots).run(asked_for, {})
    except (PlanError, PolicyError, CodecError):
        return
    assert set(uploads) <= {step.send.slot for step in asked_for.steps if step.HasField("send")}


def report(data: bytes) -> None:
    """An answer from a client: its report, and what it says are the two uploads; lengths in the first four bytes."""
    first, second = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:4], "little")
    said, rest = data[4 : 4 + first], data[4 + first :]
    blobs = {"global": rest[:second], "extra": rest[second:]}
    arrays = {
        slot: Array(dtype=ARRAY_DTYPE, shape=(len(blob),), stype=ARRAY_STYPE, data=blob) for slot, blob in blobs.items()
    }
    records = RecordDict({CONFIG_RECORD: ConfigRecord({"report": said}), ARRAY_RECORD: ArrayRecord(arrays)})
    try:
        _, adapters = read_answer(DISPATCH, Message(records, reply_to=asked(DISPATCH)))
        kept = bounded(Limits(max_update_norm=1.0), DISPATCH, adapters)
    except BadAnswerError:
        return
    assert set(kept.adapters) == {"global", "extra"}


def registration(data: bytes) -> None:
    """What a node says of itself."""
    records = RecordDict({CONFIG_RECORD: ConfigRecord({"registration": data})})
    try:
        found, layout = read_registration(Message(records, reply_to=asked(DISPATCH)), 1)
        client = client_from(found, layout, 1)
        require_affordable(Limits(), client)
    except BadAnswerError:
        return
    assert client.layout.size > 0 or not client.layout.entries
    assert one_line(client.base_model).isprintable()


def slots(data: bytes) -> None:
    """A slot's file and the state beside it, after whatever happened to the disk; their lengths in two bytes."""
    length = int.from_bytes(data[:2], "little")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "slots" / "local"
        place.mkdir(parents=True)
        (place.parent / "state.json").write_bytes(data[2 : 2 + length])
        (place / "exact.safetensors").write_bytes(data[2 + length :])
        store = SlotStore(Path(folder), "toy", dict)
        try:
            with store.transaction(2) as held:
                assert bool(held["local"].vector.isfinite().all())
                raise SlotError("looked at")
        except SlotError:
            return


def rounds(data: bytes) -> None:
    """The record of a run, after whatever happened to the disk."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rounds.jsonl").write_bytes(data)
        found = RunDirectory(Path(folder)).rounds()
    assert all(isinstance(record["round"], int) for record in found)


def slot_seed() -> bytes:
    """A slot as it is written."""
    with tempfile.TemporaryDirectory() as folder:
        store = SlotStore(Path(folder), "toy", lambda: HEADS)
        with store.transaction(1) as held:
            held["local"] = Adapter.zeros(LAYOUT)
        state = (Path(folder) / "slots" / "state.json").read_bytes()
        slot = (Path(folder) / "slots" / "local" / "exact.safetensors").read_bytes()
    return len(state).to_bytes(2, "little") + state + slot


def seeds() -> dict[str, list[bytes]]:
    """Honest input for each target: without it a fuzzer spends its life before the first field."""
    said, blobs, _ = honest(DISPATCH)
    head, extra = said.SerializeToString(), blobs["extra"]
    joined = len(head).to_bytes(2, "little") + len(blobs["global"]).to_bytes(2, "little") + head + blobs["global"]
    training, mix = Training(), steps.mixture("global", "local", coefficients=(0.5, 0.5))
    plans = [
        [steps.initialise("new", 3), steps.send(training, "new", relative_to_received=False)],
        [steps.merge("merged", mix), steps.save(mix)],
        [steps.merge("merged", mix, space="factor"), steps.send(training, "merged", relative_to_received=False)],
        [steps.evaluate(training, mix), steps.train(training, mix, ["global"])],
        [steps.copy("new", "local"), steps.distance("new", "global"), steps.initialise_gates("gates", "input")],
        [steps.initialise_gates("gates", "token"), steps.save(steps.gated("global", "local", "gates"))],
        [steps.initialise_gates("gates", "scalar"), steps.save(steps.gated("global", "local", "gates"))],
        [steps.replace("local", "global", {"toy": 0.1}, records=("before", "after"))],
        [steps.replace("local", "global", {"toy": 0.1}, records=("after", "before"), relative=True, exclusive=True)],
        [steps.distill(steps.train(training, mix, ["local"]), steps.mixture("global"), {"toy": 0.5})],
        [steps.fisher("global", "local", split="train", samples=2, damping=0.1, keep=("f", "g"))],
        [steps.merge("merged", steps.precision_mixture({"global": "local"}), space="factor")],
        [steps.sketch(training, "sketch", batches=1, rows=2), steps.send(training, "sketch")],
        [steps.select("local", ["global", "local"], "improvement", split="train")],
        [steps.search("found", ["global", "local"], split="train", samples=2, evaluations=3, penalty=0.05, bound=1.5)],
        [steps.gram(training, "gram", mix), steps.attribute(["global", "local"], "shares")],
        [steps.density(["global", "local"], "mixed", GAUSSIANS, dimensions=2, seed=3)],
        [
            steps.likeness("like", "local", samples=2, most=0.5),
            steps.save(steps.by_likeness("local", "global", "like")),
        ],
        [steps.save(steps.ensemble(["global", "local"], "shares")), steps.merge("local", mix, truncate_rank=2)],
    ]
    filled = Adapter.initial(LAYOUT, 1)
    return {
        "adapter": [encode(filled, encoding).blob for encoding in Encoding] + list(blobs.values()),
        "plan": [
            plan_pb2.Plan(version=1, client_id=NAME, round=1, run_name="run", steps=found).SerializeToString()
            for found in plans
        ],
        "report": [joined + extra],
        "registration": [REGISTRATION.SerializeToString()],
        "slots": [slot_seed()],
        "rounds": [ROUNDS.encode()],
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    "adapter": adapter,
    "plan": plan,
    "report": report,
    "registration": registration,
    "slots": slots,
    "rounds": rounds,
}
