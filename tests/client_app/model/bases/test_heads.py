"""The frozen base is frozen, a label means its name, and what a checkpoint lacks is in the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.heads import rows_by_name
from client_app.model.bases.model_folders import BaseModelError, find_model
from client_app.model.personal import PersonalModel
from client_app.plan import evaluation, training
from client_app.plan.slots import SlotStore
from client_app.settings import ModelSettings
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data

LABELS = ("neg", "pos")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("bert"), toy_data.VOCABULARY)


def with_head(folder: Path, bert: Path, *labels: str) -> Any:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert, id2label=dict(enumerate(labels)), label2id={name: number for number, name in enumerate(labels)}
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return model.classifier


def head_of(folder: Path, *labels: str) -> Any:
    found, settings = find_model(str(folder), folder.parent), ModelSettings(labels=",".join(labels))
    base = load_base(found, KINDS["text-classification"], settings, labels, 0)
    model: Any = base.model
    assert model.config.id2label == dict(enumerate(labels))
    assert model.classifier.out_features == model.num_labels == len(labels)
    return model.classifier, base.notes


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        (("neg", "pos"), ("pos", "neg"), [1, 0]),
        (("neg", "pos"), ("POS", "Neg"), [1, 0]),
        (("neg", "pos"), ("pos", "neutral", "neg"), [1, None, 0]),
        (("neg", "pos"), ("sport", "culture"), [None, None]),
        (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ("entailment", "neutral", "contradiction"), [2, 1, 0]),
        (("LABEL_0", "LABEL_1"), ("1", "0"), [1, 0]),
        (("LABEL_0", "LABEL_1"), ("neg", "pos"), [None, None]),
        (("se\u0301curite\u0301", "x"), ("x", "sécurité"), [1, 0]),
        (("a", "A"), ("A", "a"), [1, 0]),
        (("us", "x"), ("US", "us"), [None, 0]),
    ],
)
def test_rows_of_a_head_follow_names(old: tuple[str, ...], new: tuple[str, ...], rows: list[int | None]) -> None:
    assert rows_by_name(old, new) == rows


def test_a_head_of_other_order_or_size_keeps_its_rows_by_name(tmp_path: Path, bert: Path) -> None:
    own = with_head(tmp_path / "tuned", bert, *LABELS)
    for labels, rows in ((("pos", "neg"), [1, 0]), (("POS", "NEG"), [1, 0]), (("pos", "other", "neg"), [1, None, 0])):
        head, notes = head_of(tmp_path / "tuned", *labels)
        for number, row in enumerate(rows):
            assert torch.equal(head.weight[number], own.weight[row]) == (row is not None)
            assert row is None or torch.equal(head.bias[number], own.bias[row])
        assert any("by their names" in note for note in notes)
    again, _ = head_of(tmp_path / "tuned", "pos", "other", "neg")
    assert torch.equal(again.weight, head.weight)  # what is drawn is the same at every client


def test_a_head_for_other_labels_is_drawn_anew(tmp_path: Path, bert: Path) -> None:
    own = with_head(tmp_path / "tuned", bert, "CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    head, notes = head_of(tmp_path / "tuned", "sport", "politics", "culture")
    assert not any(torch.equal(a, b) for a in head.weight for b in own.weight)
    assert notes == ("the base model's head is for labels of other names: all its rows are drawn anew",)


def export(model: PersonalModel, folder: Path, base: Path) -> Path:
    """The personal model as a run saves it."""
    store = SlotStore(folder, str(base), lambda: model.heads, drawn=lambda: model.drawn)
    with store.transaction(1) as slots:
        slots.save_personal(model.read("local"))
    return folder / "adapter"


@pytest.mark.parametrize("targets", ["", "all-linear"])
def test_an_export_brings_along_what_the_checkpoint_lacks(tmp_path: Path, targets: str) -> None:
    """BertForMaskedLM saves no pooler: whoever loads the base draws another one."""
    tokenizer = tiny_models.word_tokenizer(toy_data.VOCABULARY)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(40, 0))
    model, data = loaded(settings_of(path, tmp_path, tmp_path / "base", labels="neg,pos", target_modules=targets))
    assert any("lacks bert.pooler.dense: drawn" in note for note in data.notes)
    step = plan_pb2.TrainStep(steps=5, batch_size=8, learning_rate=1e-2)
    training.train(model, step, model.trainable("local", model.layout), data.splits["train"], 0)
    batch = data.splits["train"].batch(torch.arange(8))
    with torch.no_grad():
        wanted = training.logits_of(model, batch)
    folder = export(model, tmp_path / "state", tmp_path / "base")
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
        plain = peft.PeftModel.from_pretrained(fresh, folder).eval()
        with torch.no_grad():
            assert torch.allclose(plain(**batch.inputs).logits, wanted, atol=1e-5)


def test_weights_of_another_architecture_are_refused(tmp_path: Path, bert: Path) -> None:
    """All but a few numbers would be drawn: a model of noise, which trains and says nothing about it."""
    found = transformers.BertConfig.from_pretrained(bert)
    state = {f"other.{name}": tensor for name, tensor in transformers.BertModel(found).state_dict().items()}
    from safetensors.torch import save_file

    found.save_pretrained(tmp_path / "noise")
    save_file(state, tmp_path / "noise" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lack \d+ of \d+ parameters of a 'bert' .*, expected all but a pooler"):
        head_of(tmp_path / "noise", *LABELS)


def test_a_language_model_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_models.character_tokenizer()
    transformers.LlamaModel(tiny_models.llama_config(tokenizer)).save_pretrained(tmp_path / "body")
    with pytest.raises(BaseModelError, match="has no output layer, which AutoModelForCausalLM needs"):
        load_base(find_model(str(tmp_path / "body"), tmp_path), KINDS["causal-lm"], ModelSettings(), (), 0)


def test_the_base_is_bit_equal_after_training_batch_norms_too(tmp_path: Path) -> None:
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    )
    transformers.LevitModel(config).save_pretrained(tmp_path / "levit")
    size = {"height": 32, "width": 32}
    transformers.LevitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "levit")
    folder = toy_data.write_pictures(tmp_path / "x", 4, 0)
    model, data = loaded(settings_of(folder, tmp_path, tmp_path / "levit", target_modules="all-linear"))
    norms = [m for m in model.module.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    assert norms
    before = {name: t.clone() for name, t in model.module.state_dict().items() if "lora" not in name}
    step = plan_pb2.TrainStep(steps=3, batch_size=4, learning_rate=1e-2)
    training.train(model, step, model.trainable("local", model.layout), data.splits["train"], 0)
    after = model.module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if "parametrizations" not in name)
    evaluation.evaluate(model, data.splits["train"], data)
