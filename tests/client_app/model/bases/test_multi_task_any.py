"""Several tasks over bases that are no FLAVA: LLaVA, Qwen-VL, ViLT; groups, outputs, and TAP over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client_app.model.bases.multi_task_any import AnyMultiTaskModel
from client_app.model.personal import PersonalModel
from client_app.own.task_file import load_tasks
from fedalloy_adapters.groups import groups_of
from tests.client_app import own_clients
from tests.in_process import run_in_process
from tests.toys import tiny_models, toy_data

MOOD = '[mood]\ndata-path = "mood.jsonl"\nlabels = "neg,pos"\n'
_WRITES = "generate-examples = 2\nmax-new-tokens = 2\n"
CAPTION = '[caption]\ntask = "image-text-to-text"\ndata-path = "captions/data.jsonl"\n' + _WRITES
ECHO = '[echo]\ntask = "causal-lm"\ndata-path = "echo.jsonl"\n' + _WRITES
COLOUR = '[colour]\ntask = "image-text-classification"\ndata-path = "questions/data.jsonl"\nlabels = "false,true"\n'
SHADE = COLOUR.replace("[colour]", "[shade]") + 'expert = "shades"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("any")
    toy_data.write_jsonl(found / "mood.jsonl", toy_data.opinions(20, 0))
    toy_data.write_jsonl(found / "echo.jsonl", toy_data.echoes(20, 0, "yes"))
    toy_data.write_captions(found / "captions", 6, 0)
    toy_data.write_captions(found / "questions", 6, 1, question=True)
    tiny_models.save_llava(found / "llava")
    tiny_models.save_qwen_vl(found / "qwen-vl")
    tiny_models.save_vilt(found / "vilt", [*toy_data.COLOURS])
    for name, text in (("both", MOOD + CAPTION), ("mood", MOOD), ("write", CAPTION + ECHO)):
        (found / f"{name}.toml").write_text(text)
    for name, text in (("colour", COLOUR), ("colour-and-shade", COLOUR + SHADE), ("shade", SHADE)):
        (found / f"{name}.toml").write_text(text)
    return found


@pytest.fixture(autouse=True)
def _processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-VL's processor would need torchvision for videos."""
    plain = transformers.AutoProcessor.from_pretrained

    def load(folder: Any, **options: Any) -> Any:
        return tiny_models.QwenProcessor() if Path(folder).name == "qwen-vl" else plain(folder, **options)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)


def loaded(folder: Path, base: str, tasks: str) -> Any:
    return load_tasks(own_clients.settings_of(folder / f"{tasks}.toml", folder / "state", folder / base))


@pytest.mark.parametrize(
    ("base", "tasks", "groups"),
    [
        (
            "llava",
            "both",
            {
                "mood": {"shared", "task/classify", "head/mood"},
                "caption": {"shared", "mod/image", "task/write", "pair/image/write"},
            },
        ),
        (
            "qwen-vl",
            "write",
            {"caption": {"shared", "mod/image", "task/write", "pair/image/write"}, "echo": {"shared", "task/write"}},
        ),
        (
            "vilt",
            "colour-and-shade",
            {
                "colour": {"shared", "task/classify", "head/colour"},
                "shade": {"shared", "task/shades", "head/shade"},
            },
        ),
    ],
)
def test_groups_lie_where_the_model_has_a_place_for_them(
    folder: Path, base: str, tasks: str, groups: dict[str, set[str]]
) -> None:
    found, data = loaded(folder, base, tasks)
    assert {name: set(task.groups) for name, task in data.tasks.items()} == groups
    model = PersonalModel(found, 2, 4.0)
    assert set(groups_of(model.layout)) == set.union(*groups.values())
    towers = {m for m in model.layout.lora_modules if m.startswith("mod/image::")}
    assert all("vision" in module or "visual" in module for module in towers)
    assert not any("language_model" in module for module in towers)


@pytest.mark.parametrize("base", ["llava", "qwen-vl"])
def test_a_written_task_is_the_models_own_and_only_its_groups_change_it(folder: Path, base: str) -> None:
    found, data = loaded(folder, base, "both" if base == "llava" else "write")
    model = PersonalModel(found, 2, 4.0)
    assert isinstance(found.model, AnyMultiTaskModel)
    batch = data.splits["train"].parts["caption"].batch(torch.arange(3))

    def logits() -> torch.Tensor:
        return model.logits(model.inputs(batch.inputs), batch.task)

    with torch.no_grad():
        model.load("local", model.initial(0))
        model.activate({"local": 1.0})
        before = logits()
        plain = transformers.AutoModelForImageTextToText.from_pretrained(folder / base, dtype=torch.float32).eval()
        expected = plain(**{name: value for name, value in batch.inputs.items()}).logits
        torch.testing.assert_close(before, expected, atol=1e-4, rtol=0)
        changed = model.initial(0)
        for entry, tensor in changed.items():
            if entry.module.startswith(("task/classify::", "head/")):
                tensor.normal_(generator=torch.Generator().manual_seed(1))
        model.load("local", changed)
        assert torch.equal(logits(), before)
        for entry, tensor in changed.items():
            if entry.module.startswith("pair/image/write::"):
                tensor.normal_(generator=torch.Generator().manual_seed(1))
        model.load("local", changed)
        assert not torch.allclose(logits(), before, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "tasks"),
    [
        ("llava", ("both", "mood", "write")),
        ("qwen-vl", ("write", "both", "mood")),
        ("vilt", ("colour", "colour-and-shade", "shade")),
    ],
)
def test_tap_over_clients_whose_tasks_differ(folder: Path, tmp_path: Path, base: str, tasks: tuple[str, ...]) -> None:
    """A whole federation: registration, both adapters, groups averaged over their owners, stage 2, delivery."""
    directory = run_in_process(
        tmp_path, 3,
        node_config=lambda index: {"data-path": str(folder / f"{tasks[index]}.toml"), "client-id": f"c{index}"},
        strategy="tap", base_model=str(folder / base), num_server_rounds=2, local_steps=2, batch_size=4, lora_r=2,
        tap__distill_steps=1, learning_rate=0.01, run_name="any",
    )  # fmt: skip
    records = [record for record in directory.rounds() if record["phase"] == "train"]
    assert [record["settled"]["merged"] for record in records] == [3, 3]
    assert records[0]["settled"]["replaced"] == 5 if base != "vilt" else 4, "nothing is known of X before"
    delivered = next(record for record in directory.rounds() if record["phase"] == "deliver")
    personal = {name: set(client["metrics"]["personal"]) for name, client in delivered["clients"].items()}
    wanted = {"both": "caption/perplexity", "mood": "mood/accuracy", "write": "echo/perplexity"}
    wanted |= {"colour": "colour/accuracy", "shade": "shade/accuracy", "colour-and-shade": "shade/accuracy"}
    for index, name in enumerate(tasks):
        alone = {"mood": "accuracy", "colour": "accuracy", "shade": "accuracy"}
        assert {wanted[name], alone.get(name, "loss")} & personal[f"c{index}"]
    assert len(json.loads((directory.path / "summary.json").read_text())["clients"]) == 3
