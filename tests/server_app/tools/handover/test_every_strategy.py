"""For every strategy: the exported forms of a client's model, loaded by other libraries, have the client's logits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flwr.app import ArrayRecord
from flwr.supercore.task_identity import TaskIdentity
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from torch import Tensor

from client_app.data.dataset import ClientData, Dataset
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import find_model
from client_app.model.personal import PersonalModel
from client_app.plan.mixtures import activate
from client_app.plan.slots import SlotStore
from client_app.plan.workbench import Workbench
from client_app.settings import ModelSettings
from examples import tiny_models
from proto.fedalloy.v1 import plan_pb2, report_pb2
from server_app.tools.handover.export import ExportError, export_adapter, is_in_parts
from strategies import STRATEGIES
from strategies.framework.steps import Training
from tests.strategies.conftest import FakeGrid, FakeNode
from tests.strategies.test_every_strategy import RealNode
from tests.strategies.test_own_heads import OPTIONS

TRAINING = Training(local_steps=3, batch_size=6, learning_rate=0.05, evaluate_split="validation")
NAMES = ("ada", "ben")
TEXTS, IMAGES = "causal-lm", "image-classification"
SAVED = {TEXTS: lambda folder: tiny_models.save_llama(folder, chat=True), IMAGES: tiny_models.save_vit}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {} if name == "fedalt" else OPTIONS.get(name, {})) for name in sorted(STRATEGIES)),
    ("fedalt", {"mixer": "scalar"}),
    ("fedmosaic", {"gate": "input"}),
]
INPUT_GATED = [("fedalt", {}), ("fedem", {}), ("fedgmm", {}), ("fedpae", {}), ("fedmosaic", {"gate": "input"})]
"""Strategies whose model is a sum with coefficients that depend on the input."""


def examples(kind: str, count: int, seed: int) -> Dataset:
    """Random texts or images, whose labels follow from them."""
    draw = torch.Generator().manual_seed(seed)
    if kind == IMAGES:
        pixels = torch.randn(count, 3, 16, 16, generator=draw)
        return Dataset({"pixel_values": pixels}, (pixels[:, 0].mean(dim=(1, 2)) > 0).long(), kind)
    ids = torch.randint(10, 90, (count, 8), generator=draw)
    return Dataset({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone(), kind)


@dataclass(frozen=True)
class World:
    """A base model on disk and what clients make of it."""

    kind: str
    base: Path
    model: PersonalModel
    tried: set[str] = field(default_factory=set)
    """Descriptions of adapters whose every form has been loaded."""

    def plain(self) -> Any:
        """The base model by ``transformers`` alone."""
        auto = getattr(transformers, KINDS[self.kind].auto_model)
        return auto.from_pretrained(self.base, **({"num_labels": 2} if self.kind == IMAGES else {}))


class Node(RealNode):
    """A client of such a world; its files lie where a run puts them."""

    def __init__(self, index: int, world: World, run: Path) -> None:
        FakeNode.__init__(self, NAMES[index], world.model.layout, 12)
        splits = {split: examples(world.kind, 12, 10 * index + n) for n, split in enumerate(("train", "validation"))}
        self.kind, self.model = world.kind, world.model
        self.data = ClientData("toy", world.kind, splits)
        self.folder = run / "clients" / self.name
        model = self.model
        self.store = SlotStore(
            self.folder, str(world.base), lambda: model.heads, 1, lambda: model.drawn, model.own_layout
        )
        self.reports = []

    def registration(self) -> report_pb2.Registration:
        found = super().registration()
        found.tasks[0].kind = self.kind
        return found

    def own_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """The logits of the model that the client evaluated and saved last, by the client's own code."""
        (mix,) = [step.save.mixture for step in self.plans[-1].steps if step.HasField("save")]
        with self.store.transaction(99) as slots, torch.no_grad():
            activate(Workbench(plan_pb2.Plan(), self.model, self.data, slots), mix)
            self.model.module.eval()
            return self.model.logits(inputs)


@pytest.fixture(scope="module", params=[TEXTS, IMAGES])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # what Flower's process start sets
    kind = request.param
    folder = SAVED[kind](tmp_path_factory.mktemp(kind) / "base")
    labels = () if kind == TEXTS else ("dark", "bright")
    base = load_base(find_model(str(folder), folder / ".cache"), KINDS[kind], ModelSettings(), labels, 0)
    return World(kind, folder, PersonalModel(base, 2, 4.0))


def finished(name: str, options: dict[str, Any], world: World, run: Path) -> list[Node]:
    """The clients of a run of two rounds."""
    world.model.unload_all()
    nodes = [Node(index, world, run) for index in range(2)]
    kind = STRATEGIES[name]
    strategy = kind(kind.Options(**options), training=TRAINING, seed=3)
    strategy.start(FakeGrid(nodes), initial_arrays=ArrayRecord(), num_rounds=2)
    for node in nodes:
        about = {"client": node.name, "run": run.name, "rank": 2, "tasks": {"toy": world.kind}}
        (node.folder / "about.json").write_text(json.dumps(about))
    return nodes


def loaded(form: str, folder: Path, world: World) -> Any:
    """An export as a stranger to FedAlloy loads it."""
    if form == "merged":
        return getattr(transformers, KINDS[world.kind].auto_model).from_pretrained(folder)
    if world.kind == TEXTS and form != "hub":
        return AutoPeftModelForCausalLM.from_pretrained(str(folder))
    return PeftModel.from_pretrained(world.plain(), str(folder))


def about_adapter(folder: Path) -> str:
    """All that an export knows of a saved adapter besides its numbers: PEFT's settings, and the tensors' shapes."""
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as found:
        shapes = {name: found.get_slice(name).get_shape() for name in sorted(found.keys())}
    return f"{(folder / 'adapter_config.json').read_text()} {shapes}"


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_every_form_has_the_clients_own_logits(
    name: str, options: dict[str, Any], world: World, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "r"
    node = finished(name, options, world, run)[-1]
    adapter, out = node.folder / "adapter", tmp_path / "out"
    inputs = dict(examples(world.kind, 5, 99).inputs)
    gated = (name, options) in INPUT_GATED
    assert is_in_parts(adapter) == gated
    if gated:
        for form in ("merged", "vllm", "gguf", "hub"):
            with pytest.raises(ExportError, match="coefficients that depend on the input"):
                export_adapter(run, node.name, out, form)
        export_adapter(run, node.name, out)
        assert {path.name for path in out.iterdir()} == {path.name for path in adapter.iterdir()}
        return
    expected = node.own_logits(inputs)
    with torch.no_grad():
        assert not torch.allclose(expected, world.plain().eval()(**inputs).logits, atol=1e-2)
    known = about_adapter(adapter)  # strategies whose adapters differ in numbers only share the other forms' code
    forms = ("peft",) if known in world.tried else ("peft", "hub", "merged", "vllm")
    world.tried.add(known)
    for form in forms:
        if form == "vllm" and world.kind == IMAGES:
            with pytest.raises(ExportError, match="no heads and no biases"):
                export_adapter(run, node.name, out / form, form)
            continue
        model = loaded(form, export_adapter(run, node.name, out / form, form), world)
        with torch.no_grad():
            found = model.eval()(**inputs).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=f"as {form}")


def test_a_pipeline_takes_the_whole_model_and_the_adapter(world: World, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    node = finished("fedavg", {}, world, run)[0]
    merged = str(export_adapter(run, node.name, tmp_path / "merged", "merged"))
    if world.kind == IMAGES:
        from PIL import Image

        said = transformers.pipeline("image-classification", model=merged)(Image.new("RGB", (16, 16), "red"))
        assert sum(answer["score"] for answer in said) == pytest.approx(1.0, abs=1e-4)
        return
    adapter = str(export_adapter(run, node.name, tmp_path / "adapter"))
    texts = [
        transformers.pipeline("text-generation", model=model)("hello", max_new_tokens=8, do_sample=False)
        for model in (merged, adapter)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != transformers.pipeline("text-generation", model=str(world.base))(
        "hello", max_new_tokens=8, do_sample=False
    )
