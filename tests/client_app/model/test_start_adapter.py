"""A peer's adapter, trained with PEFT and transformers alone, as a client's start; heads that stay at home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import find_model
from client_app.model.personal import PersonalModel
from client_app.model.start_adapter import StartAdapterError, read_start_adapter
from client_app.settings import ModelSettings
from server_app.run.loop import run
from server_app.run.run_directory import RunDirectory
from tests.in_process import InProcessGrid
from tests.toys import tiny_models, toy_data

LABELS = ("neg", "pos")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_bert(tmp_path_factory.mktemp("bert"), toy_data.VOCABULARY)


def classifier(bert: Path) -> Any:
    """What a stranger loads, with a head that is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        model.get_parameter("classifier.weight").data.normal_(std=0.1)
    return model


def train_elsewhere(bert: Path, folder: Path, rank: int = 4, **options: Any) -> PeftModel:
    """PEFT's own model, trained a little on the same kind of data."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=12, target_modules=["query", "value"], modules_to_save=["classifier"], **options
    )
    model: Any = get_peft_model(classifier(bert), config)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = toy_data.opinions(40, 9)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([LABELS.index(row["label"]) for row in rows])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def personal_model(bert: Path, cache: Path, rank: int = 4) -> PersonalModel:
    found = find_model(str(bert), cache)
    settings = ModelSettings(labels=",".join(LABELS))
    return PersonalModel(load_base(found, KINDS["text-classification"], settings, LABELS, 0), rank, alpha=16.0)


@pytest.mark.parametrize(("theirs", "ours", "options"), [(4, 4, {}), (4, 7, {}), (8, 8, {"use_rslora": True})])
def test_the_slot_gives_the_logits_of_the_peers_model(
    bert: Path, tmp_path: Path, theirs: int, ours: int, options: dict[str, Any]
) -> None:
    peer = train_elsewhere(bert, tmp_path / "peer", theirs, **options)
    model = personal_model(bert, tmp_path, ours)
    start = read_start_adapter(str(tmp_path / "peer"), model.layout, model.heads)
    assert start.layout == model.layout
    model.load("local", start)
    model.activate({"local": 1.0})
    tokenizer = AutoTokenizer.from_pretrained(bert)
    inputs = tokenizer([row["text"] for row in toy_data.opinions(20, 3)], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, found = peer(**inputs).logits, model.logits(dict(inputs))
        model.activate({})
        untouched = model.logits(dict(inputs))
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((untouched - expected).abs().max()) > 0.1


def test_an_adapter_that_does_not_fit_is_refused_by_name(bert: Path, tmp_path: Path) -> None:
    train_elsewhere(bert, tmp_path / "peer")
    model = personal_model(bert, tmp_path)

    def start() -> None:
        read_start_adapter(str(tmp_path / "peer"), model.layout, model.heads)

    config, weights = tmp_path / "peer" / "adapter_config.json", tmp_path / "peer" / "adapter_model.safetensors"
    good, state = json.loads(config.read_text()), load_file(weights)
    config.write_text(json.dumps(good | {"peft_type": "IA3"}))
    with pytest.raises(StartAdapterError, match="is a 'IA3' adapter, expected 'LORA'"):
        start()
    config.write_text(json.dumps(good | {"use_dora": True}))
    with pytest.raises(StartAdapterError, match="trained with use_dora"):
        start()
    config.write_text(json.dumps(good | {"init_lora_weights": "pissa_niter_16"}))
    with pytest.raises(StartAdapterError, match="'pissa_niter_16', which changes the base model"):
        start()
    for alpha, said in (({"lora_alpha": "x"}, "no alpha"), ({"lora_alpha": float("inf")}, "scaling of .* is inf")):
        config.write_text(json.dumps(good | alpha))
        with pytest.raises(StartAdapterError, match=said):
            start()
    config.write_text(json.dumps(good | {"alpha_pattern": {"(": 3}}))
    with pytest.raises(StartAdapterError, match="no alpha"):
        start()
    config.write_text(json.dumps(good))
    key = next(name for name in state if "lora_A" in name)
    save_file(state | {key.replace("query", "key").replace("value", "key"): state[key].clone()}, weights)
    with pytest.raises(StartAdapterError, match=r"key\.A', which this client does not adapt"):
        start()
    save_file(state | {key: torch.zeros(4, 5)}, weights)
    with pytest.raises(StartAdapterError, match=r"of shape \(4, 5\), expected \(4, 32\)"):
        start()
    weights.unlink()
    with pytest.raises(StartAdapterError, match=r"adapter_model\.safetensors cannot be read"):
        start()


def federate(folder: Path, base: Path, nodes: list[dict[str, Any]], **config: Any) -> RunDirectory:
    config = {"strategy": "local", "num-server-rounds": 1, "min-clients": len(nodes), "base-model": str(base)} | {
        key.replace("_", "-"): value for key, value in config.items()
    }
    config["runs-dir"] = str(folder)
    grid = InProcessGrid(len(nodes), folder, config, node_config=lambda index: nodes[index])
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    return run(grid, context)


def test_a_client_with_a_peers_adapter_starts_where_the_peer_stopped(bert: Path, tmp_path: Path) -> None:
    train_elsewhere(bert, tmp_path / "peer")
    nodes: list[dict[str, Any]] = [
        {"data-path": str(toy_data.write_jsonl(tmp_path / f"{i}.jsonl", toy_data.opinions(40, i)))} for i in range(2)
    ]
    nodes[1]["start-adapter"] = str(tmp_path / "peer")
    done = federate(tmp_path / "runs", bert, nodes, labels="neg,pos", local_steps=1, learning_rate=1e-5, lora_r=4)
    scores = json.loads((done.path / "summary.json").read_text())["clients"]
    assert scores["client-0"]["loss"] > 0.6
    assert scores["client-1"]["loss"] < 0.5
    assert scores["client-1"]["accuracy"] == 1.0


def test_each_client_has_the_rank_that_its_owner_gave_it(bert: Path, tmp_path: Path) -> None:
    """Where nothing is merged; strategies that cannot merge them name both ranks (tests/strategies/test_contract)."""
    nodes: list[dict[str, Any]] = [
        {
            "data-path": str(toy_data.write_jsonl(tmp_path / f"{rank}.jsonl", toy_data.opinions(20, rank))),
            "lora-r": rank,
        }
        for rank in (2, 5)
    ]
    nodes[1]["lora-alpha"] = 10
    done = federate(tmp_path / "runs", bert, nodes, labels="neg,pos", local_steps=1, lora_r=4, lora_alpha=16.0)
    for number, (rank, alpha) in enumerate(((2, 16), (5, 10))):
        folder = done.path / "clients" / f"client-{number}" / "adapter"
        assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == alpha
        shapes = {
            tuple(tensor.shape)
            for key, tensor in load_file(folder / "adapter_model.safetensors").items()
            if "lora_A" in key
        }
        assert shapes == {(rank, 32)}


def test_clients_with_labels_of_their_own_keep_their_heads(bert: Path, tmp_path: Path) -> None:
    topics = [{"sentence": f"{word} {noun}", "topic": noun} for noun in toy_data.NOUNS for word in toy_data.VOCABULARY]
    nodes: list[dict[str, Any]] = [
        {"data-path": str(toy_data.write_jsonl(tmp_path / "a.jsonl", toy_data.opinions(60, 0)))},
        {
            "data-path": str(toy_data.write_jsonl(tmp_path / "b.jsonl", topics)),
            "text-column": "sentence",
            "label-column": "topic",
        },
    ]
    done = federate(
        tmp_path / "runs", bert, nodes, strategy="fedavg", num_server_rounds=2, local_steps=30, learning_rate=1e-2
    )
    summary = json.loads((done.path / "summary.json").read_text())
    assert all(client["accuracy"] >= 0.6 for client in summary["clients"].values())
    for client, labels in (("client-0", 2), ("client-1", 4)):
        folder = done.path / "clients" / client
        slot = load_file(folder / "slots" / "global" / "adapter_model.safetensors")  # its own head beside it
        assert {tensor.shape for key, tensor in slot.items() if "classifier.weight" in key} == {(labels, 32)}
        model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=labels)
        loaded = PeftModel.from_pretrained(model, str(folder / "adapter"))
        assert loaded.get_submodule("base_model.model.classifier").weight.shape == (labels, 32)  # type: ignore[union-attr]
