"""Every kind of data with a model of its kind, in process: what is read and learnt, and that training learns it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers

from client_app.data.dataset import ClientData
from client_app.data.targets import IGNORED
from client_app.model.bases import base_models
from client_app.model.personal import PersonalModel
from client_app.own.examples import guess_kind
from client_app.own.files import load_own, read_own
from client_app.own.reading.text_files import DataError
from client_app.plan import evaluation, training
from client_app.settings import DataSettings, Settings
from fedalloy_adapters.files.peft_format import write_peft_directory
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data


def taught(settings: Settings, steps: int) -> tuple[PersonalModel, ClientData, list[float]]:
    """A model after some steps, its data, and its loss on the training split before and after."""
    model, data = loaded(settings)
    losses = [evaluation.evaluate(model, data.splits["train"], data)["loss"]]
    parameters = model.trainable("local", model.whole_layout)
    step = plan_pb2.TrainStep(steps=steps, batch_size=8, learning_rate=1e-2, max_grad_norm=1.0)
    training.train(model, step, parameters, data.splits["train"], 0)
    losses.append(evaluation.evaluate(model, data.splits["train"], data)["loss"])
    return model, data, losses


def test_folders_of_images(tmp_path: Path) -> None:
    folder = toy_data.write_pictures(tmp_path / "all", 10, 0)
    base = tiny_models.save_vit(tmp_path / "vit")
    (base / "preprocessor_config.json").unlink()
    _, data, (before, after) = taught(settings_of(folder, tmp_path, base), 20)
    assert any("has no preprocessor_config.json: images are prepared by vit's default, at 16" in n for n in data.notes)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 24, "validation": 3, "test": 3}
    assert after < before / 2
    for split in ("train", "val", "test"):
        toy_data.write_pictures(tmp_path / "given" / split, 2, len(split))
    found = read_own(settings_of(tmp_path / "given", tmp_path))
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 6, "validation": 6, "test": 6}
    assert found.labels == ("blue", "green", "red")
    (tmp_path / "all" / "red" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: not an image"):
        read_own(settings_of(folder, tmp_path))


def test_images_with_texts_and_labels(tmp_path: Path) -> None:
    path = toy_data.write_captions(tmp_path / "data", 10, 0, question=True)
    base = tiny_models.save_vilt(tmp_path / "vilt", tuple(toy_data.COLOURS))
    model, data, (before, after) = taught(settings_of(path, tmp_path, base), 20)
    assert data.kind == "image-text-classification"
    batch = data.splits["train"].batch(torch.arange(3))
    assert {"input_ids", "pixel_values"} <= set(batch.inputs)
    assert training.logits_of(model, batch).shape == (3, 2)
    assert after < before


def test_images_with_prompts_and_completions(tmp_path: Path) -> None:
    path = toy_data.write_captions(tmp_path / "data", 6, 0)
    base = tiny_models.save_llava(tmp_path / "llava")
    settings = settings_of(path, tmp_path, base, target_modules="all-linear", max_new_tokens=6, generate_examples=2)
    _, data, (before, after) = taught(settings, 15)
    assert data.kind == "image-text-to-text"
    assert data.decode is not None
    batch = data.splits["train"].batch(torch.arange(4))
    learnt = [data.decode(labels[labels != IGNORED]) for labels in batch.labels]
    assert set(learnt) <= set(toy_data.COLOURS)
    assert after < before
    with pytest.raises(DataError, match=r"data\.jsonl, line \d+: \d+ tokens with its image, expected at most 6"):
        load_own(settings_of(path, tmp_path, base, max_length=6))


def test_pairs_of_texts(tmp_path: Path) -> None:
    rows = [
        {"premise": f"good {noun}", "hypothesis": f"{word} {noun}", "label": word}
        for noun in toy_data.NOUNS
        for word in ("fine", "bad")
    ]
    path = toy_data.write_jsonl(tmp_path / "pairs.jsonl", rows)
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    _, data, (before, after) = taught(settings_of(path, tmp_path, base, {"text_column": "premise,hypothesis"}), 20)
    batch = data.splits["train"].batch(torch.arange(2))
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    assert after < before


def test_texts_alone_are_learnt_whole(tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{n}, {n}"} for n in range(5)])
    _, data = load_own(settings_of(path, tmp_path, tiny_models.save_llama(tmp_path / "llama")))
    assert data.kind == "causal-lm"
    batch = data.splits["train"].batch(torch.tensor([0]))
    assert torch.equal(batch.labels[0, 1:], batch.inputs["input_ids"][0, 1:])


def test_messages_in_csv(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a, b?"}, {"role": "assistant", "content": '"c"'}]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], *([json.dumps(turns)] for _ in range(3))])
    toy_data.write_jsonl(tmp_path / "x.jsonl", [{"messages": turns}] * 3)
    contents = [
        [
            example.content
            for split in read_own(settings_of(tmp_path / name, tmp_path)).splits.values()
            for example in split
        ]
        for name in ("x.csv", "x.jsonl")
    ]
    assert contents[0] == contents[1]


def test_a_hugging_face_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``datasets.load_dataset`` gives it: splits by name, labels by number, others ignored."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    asked: list[tuple[str, str | None]] = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        parts = {"train": 6, "validation": 2, "test": 2, "unsupervised": 5}
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list(
                    [{"sentence": f"{split} {n}", "label": n % 2} for n in range(count)], features=features
                )
                for split, count in parts.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    settings = settings_of("org/reviews", tmp_path, data={"text_column": "sentence", "data_config": "en"})
    found = read_own(settings)
    assert asked == [("org/reviews", "en")]
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 6, "validation": 2, "test": 2}
    assert found.labels == ("no", "yes")
    assert found.splits["train"][1].place == "org/reviews/train, row 2"


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.modeling_utils

    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.echoes(20, 0, "xyz"))
    base = tiny_models.save_llama(tmp_path / "llama")
    calls: list[int] = []
    checkpoint = transformers.modeling_utils.checkpoint

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return checkpoint(*arguments, **named)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    plain = taught(settings_of(path, tmp_path, base), 3)[0].read("local")
    assert not calls
    saving = taught(settings_of(path, tmp_path, base, gradient_checkpointing=True), 3)[0].read("local")
    assert len(calls) == 3 * 2  # steps x layers
    assert torch.allclose(saving.vector, plain.vector, atol=1e-5)


def test_a_base_in_four_bits_learns_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'fedalloy[quantization]'")
    tokenizer = tiny_models.character_tokenizer()
    config = tiny_models.llama_config(tokenizer, 64)  # bitsandbytes quantises blocks of 64
    config.intermediate_size = 128
    base = tiny_models.save_model(tmp_path / "llama", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.echoes(60, 0, "yes"))
    settings = settings_of(path, tmp_path, base, quantization="4bit", target_modules="all-linear")
    model, _, (before, after) = taught(settings, 30)
    assert after < before / 2
    assert any("4bit" in type(module).__name__.lower() for module in model.module.modules())
    again, data = loaded(settings)
    again.load("local", model.read("local"))
    assert evaluation.evaluate(again, data.splits["train"])["loss"] == pytest.approx(after, rel=1e-4)
    step = plan_pb2.TrainStep(steps=20, batch_size=8, learning_rate=1e-2, max_grad_norm=1.0)
    training.train(again, step, again.trainable("local", again.whole_layout), data.splits["train"], 1)
    assert evaluation.evaluate(again, data.splits["train"])["loss"] < after
    # Evaluated or not, gradients pass through every layer: some CPUs have a form of these weights without any.
    first = next(iter(again.trainable("local", again.whole_layout).values()))
    training.batch_loss(again, data.splits["train"].batch(torch.arange(8))).backward()
    assert first.grad is not None
    assert float(first.grad.abs().max()) > 0
    write_peft_directory(tmp_path / "adapter", model.read("local"), str(base), model.heads)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(base, **base_models.four_bit())
    base_models.keep_trainable(quantised)
    exported = peft.PeftModel.from_pretrained(quantised, tmp_path / "adapter").eval()
    one = data.splits["test"].batch(torch.arange(1))
    again.load("local", model.read("local"))
    with torch.no_grad():
        ours, theirs = again.logits(again.inputs(one.inputs)), exported(**one.inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_column_that_was_named_and_is_not_there_is_said_first() -> None:
    with pytest.raises(
        DataError, match=r"^messages-column = 'mesages': there is no such column\. Columns 'part', 'messages'"
    ):
        guess_kind({"part": "train", "messages": []}, DataSettings(messages_column="mesages"))
