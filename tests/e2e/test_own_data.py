"""Models and data of one's own on real SuperLink and SuperNode processes: every kind of model, tiny, built offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples import three_clients
from server_app.cli import read_clients_file
from server_app.cluster import LocalCluster, Settings
from server_app.export import export_adapter
from server_app.run_directory import RunDirectory
from tests import tiny_models, toy_data


def start(folder: Path, node_config: dict[str, dict[str, Any]], **config: Any) -> tuple[RunDirectory, dict[str, Any]]:
    """One run of one round on a cluster of its own; its directory and summary."""
    settings = Settings(tuple(node_config), folder / "runs", node_config=node_config)
    given = {"num-server-rounds": 1, "min-clients": len(node_config), "run-name": "own", "strategy": "fedavg"}
    given |= {"runs-dir": str(folder / "runs")} | {key.replace("_", "-"): value for key, value in config.items()}
    with LocalCluster(folder / "cluster", settings) as cluster:
        outcome = cluster.run(given)
        assert outcome.completed, outcome.log.read_text()
    run = RunDirectory(folder / "runs" / "own")
    summary: dict[str, Any] = json.loads((run.path / "summary.json").read_text())
    assert set(summary["clients"]) == set(node_config)
    return run, summary


def losses(run: RunDirectory, client: str) -> list[float]:
    """Training loss of each round."""
    return [r["clients"][client]["train_loss"][0] for r in run.rounds() if r["phase"] == "train"]


def test_the_worked_example_of_the_readme(tmp_path: Path) -> None:
    """Three JSONL files and a causal LM: every client's model answers in its own language."""
    three_clients.write(tmp_path)
    run, summary = start(
        tmp_path,
        read_clients_file(tmp_path / "clients.toml"),
        strategy="local",
        base_model=str(tmp_path / "base"),
        target_modules="all-linear",
        local_steps=80,
        learning_rate=1e-2,
        generate_examples=4,
        max_new_tokens=8,
    )
    for client, greeting in three_clients.GREETINGS.items():
        assert summary["clients"][client]["exact_match"] == summary["clients"][client]["rouge_l"] == 1.0
        assert losses(run, client)[0] < 3.5  # a mean over the steps; untrained it is near 5
        assert _written(tmp_path / "base", export_adapter(run.path, client, tmp_path / client)) == greeting


def _written(base: Path, adapter: Path) -> str:
    """What transformers and PEFT alone write with a client's personal model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    prompt = tokenizer("Kim and Zoe say:", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_classifier_shares_its_head_where_all_clients_have_the_same_labels(tmp_path: Path) -> None:
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    node: dict[str, dict[str, Any]] = {
        client: {"data-path": str(toy_data.write_jsonl(tmp_path / f"{client}.jsonl", toy_data.opinions(80, i)))}
        for i, client in enumerate(("berlin", "paris"))
    }
    run, summary = start(tmp_path, node, base_model=str(base), labels="neg,pos", local_steps=60, learning_rate=1e-2)
    (first,) = [record["clients"] for record in run.rounds() if record["phase"] == "train"]
    for name, client in summary["clients"].items():  # one round on 64 examples: better than the untrained head
        assert client["loss"] < 0.9 * first[name]["metrics"]["personal"]["loss"]
        assert client["accuracy"] > 0.5
        assert 0 < client["f1"] <= 1
    assert "train: 64 examples" in (tmp_path / "runs" / "data-berlin.txt").read_text()
    assert not (run.path / "clients" / "berlin" / "slots" / "own-head").exists()


def test_a_vision_transformer_learns_from_folders_of_images(tmp_path: Path) -> None:
    base = tiny_models.save_vit(tmp_path / "vit")
    node: dict[str, dict[str, Any]] = {
        client: {"data-path": str(toy_data.write_pictures(tmp_path / client, 12, i))}
        for i, client in enumerate(("berlin", "paris"))
    }
    _, summary = start(
        tmp_path, node, base_model=str(base), labels="red,green,blue", local_steps=40, micro_batch_size=5
    )
    assert all(client["accuracy"] == 1.0 for client in summary["clients"].values())


def test_an_image_and_text_model_learns_to_say_what_it_sees(tmp_path: Path) -> None:
    base = tiny_models.save_llava(tmp_path / "llava")
    node: dict[str, dict[str, Any]] = {
        client: {"data-path": str(toy_data.write_captions(tmp_path / client, 12, i))}
        for i, client in enumerate(("berlin", "paris"))
    }
    _, summary = start(
        tmp_path,
        node,
        strategy="local",
        base_model=str(base),
        target_modules="all-linear",
        local_steps=60,
        learning_rate=1e-2,
        generate_examples=4,
        max_new_tokens=6,
    )
    assert all(client["exact_match"] >= 0.75 for client in summary["clients"].values())
