"""Families of models that read images: what processors say reaches the model, alone and in company, and it learns."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.targets import IGNORED
from client_app.kinds import kind_of
from client_app.model.bases.model_folders import BaseModelError, find_model
from client_app.model.personal import PersonalModel
from client_app.own.encoding import Encoder, load_encoder
from client_app.own.examples import read_example
from client_app.own.files import load_own
from client_app.own.reading.text_files import Row
from client_app.plan import evaluation, training
from client_app.settings import DataSettings
from proto.fedalloy.v1 import plan_pb2
from server_app.tools.handover.export import export_adapter
from tests.client_app.own_clients import loaded, personal, settings_of
from tests.in_process import run_in_process
from tests.toys import tiny_models, toy_data, vision_models

KIND = kind_of("image-text-to-text")
SIZES = ((40, 40), (64, 24), (24, 64), (32, 32))
ASKED = ("?", "what is this?", "and this", "? ?")
FAMILIES = [*vision_models.SAVED, *vision_models.QWEN]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, and a prompt and a completion of several lengths for each."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = [*toy_data.COLOURS, "red"]
    for number, (colour, size) in enumerate(zip(colours, SIZES, strict=True)):
        toy_data.picture(colour, 64, number).resize(size).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "prompt": ASKED[n % 4], "completion": colours[n]} for n in range(4)]
    toy_data.write_jsonl(folder / "data.jsonl", rows)
    return folder


def made(family: str, folder: Path, pictures: Path) -> tuple[PersonalModel, Dataset, Any]:
    """A model, all four examples in order, and its processor."""
    if family in vision_models.SAVED:
        base = vision_models.SAVED[family](folder / family)
        encoder = load_encoder(find_model(str(base), folder), KIND, 512)
        model, _ = loaded(settings_of(pictures / "data.jsonl", folder / "state", base, target_modules="q_proj,v_proj"))
    else:
        processor = tiny_models.QwenProcessor()
        encoder = Encoder(KIND, 512, processor.tokenizer, processor.image_processor, processor)
        module = vision_models.QWEN[family](processor)
        names = ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.self_attn.v_proj"]
        model = personal(Base(family, module, "0" * 64, tuple(names), ()))
    rows = [json.loads(line) for line in (pictures / "data.jsonl").read_text().splitlines()]
    examples = [read_example(Row(row, "x.jsonl", pictures), KIND, DataSettings()) for row in rows]
    return model, encoder.encode(examples, ()), encoder.joint


def targets(model: PersonalModel, data: Dataset, positions: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return training.logits_of(model, data.batch(torch.tensor(positions)))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_alone_and_in_company_and_inputs_the_processors(
    family: str, pictures: Path, tmp_path: Path
) -> None:
    model, data, processor = made(family, tmp_path, pictures)
    together = targets(model, data, [0, 1, 2, 3])
    assert torch.allclose(together, torch.cat([targets(model, data, [n]) for n in range(4)]), atol=1e-4)
    assert torch.allclose(
        targets(model, data, [2, 0]), torch.cat([targets(model, data, [n]) for n in (2, 0)]), atol=1e-4
    )
    tokenizer, image = processor.tokenizer, str(processor.image_token)
    for number in range(4):
        one = data.batch(torch.tensor([number]))
        learnt = one.labels[0][one.labels[0] != IGNORED]
        assert tokenizer.decode(learnt) == ("red", "green", "blue", "red")[number] + tokenizer.eos_token
        answer = tokenizer.decode(learnt[:-1])
        text, options = f"{image}{ASKED[number]}", {}
        if "suffix" in inspect.signature(type(processor).__call__).parameters:
            options["suffix"] = [answer]
        else:
            text = f"{tokenizer.bos_token}{text}{answer}{tokenizer.eos_token}"
            options["add_special_tokens"] = False
        direct = processor(
            images=[[PIL.Image.open(pictures / f"{number}.png")]], text=[text], return_tensors="pt", **options
        )
        for name, found in one.inputs.items():
            if name in direct and name != "attention_mask":
                assert torch.equal(found, direct[name]), name
        told = {name for name in direct if name.endswith("token_type_ids")}
        assert told <= set(one.inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_learns_and_what_is_written_is_what_the_model_finds_likeliest(
    family: str, pictures: Path, tmp_path: Path
) -> None:
    model, data, processor = made(family, tmp_path, pictures)
    batch = data.batch(torch.arange(4))
    step = plan_pb2.TrainStep(steps=8, batch_size=4, learning_rate=2e-2)
    before = float(KIND.mean_loss(targets(model, data, [0, 1, 2, 3]), batch.labels))
    training.train(model, step, model.trainable("local", model.layout), data, 0)
    assert float(KIND.mean_loss(targets(model, data, [0, 1, 2, 3]), batch.labels)) < before
    client = ClientData("x", KIND.name, {}, decode=lambda ids: json.dumps(ids.tolist()), max_new_tokens=3)
    written = evaluation.write(model, data, client, 4)
    order = evaluation._by_length(data).tolist()
    image = int(processor.image_token_id)
    for number, text in zip(order, written.texts, strict=True):
        found = json.loads(text)
        count = found.index(image) + 1 if image in found else 3  # one that writes places for images is still a text
        assert found[:count] == _step_by_step(model, data.batch(torch.tensor([number])), count)


def _step_by_step(model: PersonalModel, one: Dataset, count: int) -> list[int]:
    """The likeliest tokens after a prompt, each from a forward pass over all of the text so far."""
    start = int((one.labels[0] != IGNORED).nonzero()[0])
    width, written = one.inputs["attention_mask"].shape[1], []
    inputs = {name: value[:, :start] if value.shape[1:2] == (width,) else value for name, value in one.inputs.items()}
    types = 1 if int(one.inputs.get("token_type_ids", torch.zeros(1, width))[0, -1]) else 0
    for _ in range(count):
        with torch.no_grad():
            logits = model.logits(model.inputs(inputs))[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] in evaluation._ends_of(model.module):
            break
        for name, more in (("input_ids", written[-1]), ("attention_mask", 1), ("token_type_ids", types)):
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[more]])], dim=1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    return written


@pytest.mark.parametrize("family", vision_models.SAVED)
def test_a_family_is_federated_and_exported(family: str, tmp_path: Path) -> None:
    base = vision_models.SAVED[family](tmp_path / "base")
    paths = [toy_data.write_captions(tmp_path / name, 8, seed) for seed, name in enumerate("ab")]
    directory = run_in_process(
        tmp_path / "runs",
        2,
        node_config=lambda index: {"data-path": str(paths[index])},
        strategy="fedavg",
        base_model=str(base),
        target_modules="q_proj,v_proj",
        lora_r=2,
        local_steps=2,
        num_server_rounds=1,
        generate_examples=2,
        max_new_tokens=3,
    )
    summary = json.loads((directory.path / "summary.json").read_text())
    assert all({"loss", "rouge_l"} <= set(scores) for scores in summary["clients"].values())
    adapter = export_adapter(directory.path, "client-0", tmp_path / "adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2


def test_messages_for_a_processor_that_takes_an_answer_apart_are_refused(pictures: Path, tmp_path: Path) -> None:
    """As one text the prompt would see the answer."""
    base = vision_models.save_paligemma(tmp_path / "base")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}]
    path = toy_data.write_jsonl(pictures / "chat.jsonl", [{"image": "0.png", "messages": turns}] * 4)
    with pytest.raises(BaseModelError, match="has no chat template, which messages need"):
        load_own(settings_of(path, tmp_path / "state", base, target_modules="q_proj"))
