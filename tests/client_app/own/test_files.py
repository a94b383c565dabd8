"""A client's own data: divided in the same way every time, and encoded so that only the right tokens are learnt."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from torch.nn import functional

from client_app.data.dataset import Base
from client_app.data.targets import IGNORED
from client_app.kinds import KINDS, TaskError, example_losses, kind_of, mean_loss
from client_app.kinds.scores.classes import macro_f1
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import BaseModelError, find_model
from client_app.own.encoding import load_encoder
from client_app.own.files import load_own, read_own
from client_app.own.reading.text_files import DataError
from client_app.plan import evaluation, training
from client_app.settings import ModelSettings, Settings, SettingsError, read_settings
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("llama"), chat=True)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("bert"), toy_data.VOCABULARY)


def contents(path: Path, state: Path, **data: Any) -> dict[str, list[str]]:
    found = read_own(settings_of(path, state, data=data))
    return {name: [example.content for example in examples] for name, examples in found.splits.items()}


def test_the_split_is_the_same_wherever_the_file_lies_and_whatever_its_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": str(n % 3)} for n in range(50)]
    first = contents(toy_data.write_jsonl(tmp_path / "a" / "x.jsonl", rows), tmp_path)
    again = contents(toy_data.write_jsonl(tmp_path / "b" / "y.jsonl", rows[::-1]), tmp_path)
    assert {name: sorted(split) for name, split in first.items()} == {n: sorted(s) for n, s in again.items()}
    assert {name: len(split) for name, split in first.items()} == {"train": 40, "validation": 5, "test": 5}
    everything = [content for split in first.values() for content in split]
    assert len(set(everything)) == len(everything) == 50


def test_copies_of_an_example_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"text {n % 12}", "label": str(n % 2)} for n in range(96)]
    splits = contents(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path)
    sets = [set(split) for split in splits.values()]
    assert len(sets) == 3
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_splits_that_are_given_stay(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": str(n % 2), "part": ("train", "dev", "test")[n % 3]} for n in range(30)]
    by_column = contents(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, split_column="part")
    for name, part in (("train", "train"), ("validation", "dev"), ("test", "test")):
        toy_data.write_jsonl(tmp_path / "folder" / f"{name}.jsonl", [row for row in rows if row["part"] == part])
    by_file = contents(tmp_path / "folder", tmp_path)
    assert by_column == by_file
    assert {name: len(split) for name, split in by_file.items()} == {"train": 10, "validation": 10, "test": 10}


def test_formats_hold_the_same_examples(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": f'a "quoted", text\nof {n} lines', "label": ("no", "yes")[n % 2]} for n in range(20)]
    reference = contents(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path)
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    labels = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    numbered = [row | {"label": ("no", "yes").index(row["label"])} for row in rows]
    datasets.Dataset.from_list(numbered, features=labels).to_parquet(tmp_path / "named.parquet")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    assert contents(tmp_path / "x.csv", tmp_path) == reference
    assert contents(tmp_path / "x.parquet", tmp_path) == reference
    assert contents(tmp_path / "named.parquet", tmp_path) == reference


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "pathological", "natural"])
def test_partitions_are_disjoint_and_complete(tmp_path: Path, partitioner: str) -> None:
    rows = [{"text": f"text {n}", "label": str(n % 4), "site": f"s{n % 3}"} for n in range(120)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    shares: list[set[str]] = []
    by = "site" if partitioner == "natural" else ""
    for client in range(3):
        settings = settings_of(path, tmp_path, data={"partitioner": partitioner, "partition_by": by})
        found = read_own(replace(settings, partition_id=client, num_partitions=3))
        shares.append({example.content for split in found.splits.values() for example in split})
        if partitioner == "pathological":
            assert len(found.labels) == 2
    assert len(set.union(*shares)) == sum(map(len, shares))
    if partitioner != "pathological":
        assert sum(map(len, shares)) == 120


def test_an_unknown_partitioner_is_refused(tmp_path: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(10, 0))
    with pytest.raises(DataError, match="expected one of iid, dirichlet, pathological, natural"):
        read_own(settings_of(path, tmp_path, data={"partitioner": "even"}))


def test_only_the_completion_is_learnt_and_a_long_prompt_loses_its_beginning(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "a" * 40 + f"{n}>", "completion": "xy"} for n in range(4)]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    settings = settings_of(path, tmp_path, llama, {"prompt_template": "none"}, max_length=10)
    _, data = load_own(settings)
    batch = data.splits["train"].batch(torch.tensor([0]))
    assert batch.inputs["input_ids"].shape == (1, 10)
    assert batch.inputs["input_ids"][0, 0] == 1  # <s> stays
    assert data.decode is not None
    assert data.decode(batch.inputs["input_ids"][0]).endswith(">xy")
    assert (batch.labels[0] != IGNORED).tolist() == [False] * 7 + [True] * 3
    assert batch.labels[0, -1] == 2  # </s>
    assert any("4 of 4 texts were cut to 10 tokens" in note for note in data.notes)


def test_a_conversation_learns_what_the_assistant_says(tmp_path: Path, llama: Path) -> None:
    turns = [("system", "be brief"), ("user", "a?"), ("assistant", "A"), ("user", "b?"), ("assistant", "BB")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 3
    _, data = load_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, llama))
    batch = data.splits["train"].batch(torch.tensor([0]))
    learnt = batch.labels[0][batch.labels[0] != IGNORED]
    assert data.decode is not None
    assert data.decode(learnt) == "ABB"
    assert int((learnt == 2).sum()) == 2  # both ends


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    base = tiny_models.save_llama(tmp_path / "plain")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    with pytest.raises(BaseModelError, match="has no chat template"):
        load_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, base))


def test_padding_changes_neither_loss_nor_answers(tmp_path: Path, llama: Path) -> None:
    rows = [{"prompt": "a" * n + ">", "completion": "b" * (1 + n % 3)} for n in range(1, 12)]
    settings = settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, llama)
    model, data = loaded(settings)
    train = data.splits["train"]
    together = train.batch(torch.arange(len(train)))
    with torch.no_grad():
        found = example_losses("causal-lm", training.logits_of(model, together), together.labels)
        for index in range(len(train)):
            one = train.batch(torch.tensor([index]))
            assert one.inputs["input_ids"].shape[1] == int(one.inputs["attention_mask"].sum())
            alone = example_losses("causal-lm", training.logits_of(model, one), one.labels)
            assert float(alone) == pytest.approx(float(found[index]), abs=1e-4)
    many = evaluation.write(model, train, replace(data, max_new_tokens=4), 16)
    single = evaluation.write(model, train, replace(data, max_new_tokens=4), 1)
    assert many == single
    assert all(len(text) <= 4 for text in many.texts)


def test_losses_of_examples_average_to_the_training_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(5, 7, generator=generator), torch.tensor([0, 1, 2, 6, 3])
    assert float(example_losses("text-classification", logits, labels).mean()) == pytest.approx(
        float(functional.cross_entropy(logits, labels)), abs=1e-6
    )
    logits = torch.randn(2, 4, 7, generator=generator)
    labels = torch.tensor([[IGNORED, 3, 4, IGNORED], [IGNORED, IGNORED, 5, IGNORED]])
    token = functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="none")
    assert float(mean_loss("causal-lm", logits, labels)) == pytest.approx(float(token.sum() / 3), abs=1e-6)
    assert example_losses("causal-lm", logits, labels).tolist() == pytest.approx(
        [float(token[0] + token[1]) / 2, float(token[4])], abs=1e-6
    )
    with pytest.raises(TaskError, match="expected one of sentence-pairs"):
        kind_of("segmentation")


@pytest.mark.parametrize("kind", ["text-classification", "causal-lm"])
def test_parts_of_a_batch_train_like_the_whole(tmp_path: Path, llama: Path, bert: Path, kind: str) -> None:
    rows = toy_data.opinions(20, 0) if kind == "text-classification" else toy_data.echoes(20, 0, "xyz")
    base = bert if kind == "text-classification" else llama
    settings = settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, base, labels="neg,pos")
    found = []
    for micro in (0, 3):
        model, data = loaded(settings)
        for module in model.module.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.micro_batch = micro
        step = plan_pb2.TrainStep(steps=3, batch_size=8, learning_rate=1e-2, max_grad_norm=1.0)
        result = training.train(model, step, model.trainable("local", model.layout), data.splits["train"], 0)
        found.append((result.mean_loss, model.read("local").vector))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert float((found[0][1] - found[1][1]).abs().max()) < 1e-3


def test_metrics_are_those_of_torchmetrics_and_scikit_learn(tmp_path: Path, bert: Path, llama: Path) -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from torchmetrics.text import Perplexity

    settings = settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(60, 0)), tmp_path, bert)
    model, data = loaded(settings)
    train = data.splits["train"]
    found = evaluation.evaluate(model, train, data)
    with torch.no_grad():
        batch = train.batch(torch.arange(len(train)))
        answers = training.logits_of(model, batch).argmax(dim=-1)
    assert found["accuracy"] == pytest.approx(accuracy_score(train.labels, answers))
    assert found["f1"] == pytest.approx(f1_score(train.labels, answers, average="macro"), abs=1e-6)

    rows = [{"prompt": "a" * n + ">", "completion": "b" * (1 + n % 3)} for n in range(1, 40)]
    model, data = loaded(settings_of(toy_data.write_jsonl(tmp_path / "y.jsonl", rows), tmp_path, llama))
    metric = Perplexity(ignore_index=IGNORED)
    with torch.no_grad():
        for index in range(len(data.splits["train"])):
            one = data.splits["train"].batch(torch.tensor([index]))
            metric.update(training.logits_of(model, one, everywhere=True)[:, :-1], one.labels[:, 1:])
    found = evaluation.evaluate(model, data.splits["train"], data)
    assert found["perplexity"] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert "exact_match" not in found


def test_macro_f1_counts_every_class_that_occurs() -> None:
    answers, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert macro_f1(answers, labels, 5) == pytest.approx((2 / 3 + 0.8) / 2)


def test_heads_of_own_labels_are_outside_the_layout(tmp_path: Path, bert: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(30, 0))
    own, _ = loaded(settings_of(path, tmp_path, bert))
    shared, _ = loaded(settings_of(path, tmp_path, bert, labels="neg,pos"))
    assert own.layout.lora_modules == own.layout.modules == shared.layout.lora_modules
    assert shared.layout.modules == (*shared.layout.lora_modules, "classifier")
    assert own.own_layout is not None
    assert [entry.name for entry in own.own_layout.entries] == ["classifier.weight", "classifier.bias"]
    assert shared.own_layout is None


def test_modules_that_the_checkpoint_lacks_are_the_same_at_every_client(tmp_path: Path, bert: Path) -> None:
    found = find_model(str(bert), tmp_path)
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = load_base(found, KINDS["text-classification"], ModelSettings(labels="a,b"), ("a", "b"), 0)
        weights.append(base.model.get_parameter("classifier.weight").clone())
    assert torch.equal(weights[0], weights[1])
    assert float(weights[0].std()) > 0.005


def test_a_trained_head_with_the_same_labels_stays(tmp_path: Path, bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        bert, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1}
    )
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "tuned")
    found = find_model(str(tmp_path / "tuned"), tmp_path)
    same = load_base(found, KINDS["text-classification"], ModelSettings(), ("neg", "pos"), 0)
    assert torch.equal(same.model.get_parameter("classifier.weight"), model.classifier.weight)
    other = load_base(found, KINDS["text-classification"], ModelSettings(), ("a", "b", "c"), 0)
    assert other.model.get_parameter("classifier.weight").shape == (3, 32)


def base_with(path: Path, cache: Path, **settings: Any) -> Base:
    return load_base(find_model(str(path), cache), KINDS["causal-lm"], ModelSettings(**settings), (), 0)


def test_targets_are_pefts_or_those_that_are_named(tmp_path: Path, llama: Path) -> None:
    def ends(base: Base) -> set[str]:
        return {name.rsplit(".", 1)[-1] for name in base.targets}

    assert ends(base_with(llama, tmp_path)) == {"q_proj", "v_proj"}
    assert ends(base_with(llama, tmp_path, target_modules="o_proj, up_proj")) == {"o_proj", "up_proj"}
    everything = base_with(llama, tmp_path, target_modules="all-linear")
    assert len(everything.targets) == 14
    assert "lm_head" not in everything.targets
    with pytest.raises(BaseModelError, match=r"no linear module 'c_attn'; it has down_proj, gate_proj, k_proj"):
        base_with(llama, tmp_path, target_modules="q_proj,c_attn")


def test_a_missing_model_says_what_to_download(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(BaseModelError, match=r"hf download nobody/nothing --revision v1"):
        find_model("nobody/nothing@v1", tmp_path)
    with pytest.raises(BaseModelError, match="there is no such folder"):
        find_model("./nothing", tmp_path)
    with pytest.raises(BaseModelError, match="base-model is not set"):
        find_model("", tmp_path)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BaseModelError, match=r"no \*\.safetensors \(found pytorch_model\.bin\)"):
        find_model(str(tmp_path / "pickled"), tmp_path)
    with pytest.raises(BaseModelError, match="'llama', for which transformers has no AutoModelForImageClassification"):
        load_base(find_model(str(llama), tmp_path), KINDS["image-classification"], ModelSettings(), ("a", "b"))
    with pytest.raises(BaseModelError, match="no image processor"):
        load_encoder(find_model(str(llama), tmp_path), KINDS["image-classification"], 8)


def test_a_model_in_the_cache_is_used_without_a_network(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--some--llama" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in llama.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = find_model("some/llama", tmp_path)
    assert found.folder == snapshot
    assert found.fingerprint == find_model(str(llama), tmp_path).fingerprint


def test_bfloat16_bases_keep_float32_adapters(tmp_path: Path, bert: Path) -> None:
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", toy_data.opinions(30, 0))
    model, data = loaded(
        settings_of(path, tmp_path, bert, model_dtype="bfloat16", gradient_checkpointing=True, labels="neg,pos")
    )
    parameters = model.trainable("local", model.layout)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert model.module.get_parameter("bert.embeddings.word_embeddings.weight").dtype == torch.bfloat16
    step = plan_pb2.TrainStep(steps=5, batch_size=8, learning_rate=1e-2)
    before = model.read("local").vector
    training.train(model, step, parameters, data.splits["train"], 0)
    assert not torch.equal(model.read("local").vector, before)


def test_node_config_wins_over_run_config() -> None:
    def settings(node: dict[str, Any], **run: Any) -> Settings:
        context = Context(run_id=1, node_id=5, node_config=node, state=RecordDict(), run_config=run)
        return read_settings(context)

    run = {"base-model": "org/a", "lora-r": 8, "max-length": 128, "partition-alpha": 1}
    found = settings({"data-path": "x.jsonl", "base-model": "org/b", "lora-r": 2, "lora-alpha": 4}, **run)
    assert (found.model.base_model, found.rank, found.alpha, found.model.max_length) == ("org/b", 2, 4.0, 128)
    assert found.client_id == "node-5"
    assert found.data.partition_alpha == 1.0
    with pytest.raises(SettingsError, match="neither a data-path"):
        settings({})
    with pytest.raises(SettingsError, match="node-config max-length = 'long' is str, expected int"):
        settings({"data-path": "x", "max-length": "long"})
    with pytest.raises(SettingsError, match="model-dtype = 'float8', expected one of"):
        settings({"data-path": "x", "model-dtype": "float8"})
    for labels in ("pos", "a,b,a", ","):
        with pytest.raises(SettingsError, match="expected at least two names that differ, or none"):
            settings({"data-path": "x", "labels": labels})
    with pytest.raises(SettingsError, match="split-fractions"):
        settings({"data-path": "x", "split-fractions": "0.5,0.5"})


def test_the_report_names_counts_and_the_notes_do_not_name_labels(tmp_path: Path, bert: Path) -> None:
    rows = [*toy_data.opinions(20, 0), toy_data.opinions(20, 0)[0]]
    _, data = load_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, bert))
    text = (tmp_path / "data-berlin.txt").read_text()
    assert "task: text-classification" in text
    assert "neg: " in text
    assert data.notes
    assert not any("pos" in note or "neg" in note for note in data.notes)
    assert json.dumps(data.notes).count("copies") == 1
