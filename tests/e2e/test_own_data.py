"""Models and data of one's own on real SuperLink and SuperNode processes: every kind of model, tiny, built offline.

One cluster, started from the worked example's ``clients.toml``, serves all tests: each replaces what lies at the three
clients' data paths, as a client's owner would, and names another base model. The first client is a site that stays its
owner's: its trainer is the installed package's service, which takes plans with the server's signature only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from client_app.site.audit import audit
from examples import three_clients
from fedalloy_adapters.wire.signing import new_key
from server_app.ledger.store import Ledger
from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.local import LocalCluster, Settings, stop
from server_app.tools.commands.arguments import read_clients_file
from server_app.tools.handover.export import export_adapter
from tests.toys import tiny_models, toy_data

CLIENTS = tuple(three_clients.GREETINGS)


@dataclass
class Own:
    """The running cluster and the folder of the worked example."""

    cluster: LocalCluster
    folder: Path
    site: Path
    """The first client's ``site.toml``."""

    def run(self, name: str, **config: Any) -> tuple[RunDirectory, dict[str, Any]]:
        """One run of one round; its directory and summary."""
        runs = self.cluster.settings.runs_dir
        given = {"num-server-rounds": 1, "min-clients": len(CLIENTS), "run-name": name, "strategy": "fedavg"}
        given |= {"runs-dir": str(runs), "sign-with": str(self.site.parent / "plans")} | {
            key.replace("_", "-"): value for key, value in config.items()
        }
        outcome = self.cluster.run(given)
        assert outcome.completed, outcome.log.read_text()
        run = RunDirectory(runs / name)
        summary: dict[str, Any] = json.loads((run.path / "summary.json").read_text())
        assert set(summary["clients"]) == set(CLIENTS)
        return run, summary

    def replace_data(self, rows: Callable[[int], list[dict[str, Any]]]) -> None:
        """Other data at the same paths; the clients notice."""
        for number, client in enumerate(CLIENTS):
            toy_data.write_jsonl(self.folder / f"{client}.jsonl", rows(number))


SITE = """
socket = "berlin.sock"
servers = ["plans.pub"]
runs = ["*"]
base-models = ["/*"]
[client]
client-id = "{client}"
data-path = "{data}"
state-dir = "{runs}"
[policy]
allow-steps = "initialise,train,merge,evaluate,save,send"
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    folder = tmp_path_factory.mktemp("own data")  # a path with a space, as users have
    three_clients.write(folder / "own")
    node_config = dict(read_clients_file(folder / "own" / "clients.toml"))
    first = CLIENTS[0]
    (folder / "runs").mkdir()
    private, public = new_key()
    (folder / "plans").write_bytes(private)
    (folder / "plans.pub").write_bytes(public)
    data = node_config[first]["data-path"]
    (folder / "site.toml").write_text(SITE.format(client=first, data=data, runs=folder / "runs"))
    node_config[first] = {"site-socket": str(folder / "berlin.sock")}  # and nothing of its data
    settings = Settings(tuple(node_config), folder / "runs", node_config=node_config)
    command = [str(Path(sys.executable).parent / "fedalloy"), "site", "serve", str(folder / "site.toml")]
    with (folder / "site.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as service:
        try:
            with LocalCluster(folder / "cluster", settings) as cluster:
                yield Own(cluster, folder / "own", folder / "site.toml")
        finally:
            service.terminate()


def losses(run: RunDirectory, client: str) -> list[float]:
    """Training loss of each round."""
    return [r["clients"][client]["train_loss"][0] for r in run.rounds() if r["phase"] == "train"]


def test_the_worked_example_of_the_readme(own: Own, tmp_path: Path) -> None:
    """Three JSONL files and a causal LM: every client's model answers in its own language."""
    run, summary = own.run(
        "greetings",
        strategy="local",
        base_model=str(own.folder / "base"),
        target_modules="all-linear",
        local_steps=80,
        learning_rate=1e-2,
        generate_examples=4,
        max_new_tokens=8,
    )
    for client, greeting in three_clients.GREETINGS.items():
        assert summary["clients"][client]["exact_match"] == summary["clients"][client]["rouge_l"] == 1.0
        assert losses(run, client)[0] < 3.5  # a mean over the steps; untrained it is near 5
        assert _written(own.folder / "base", export_adapter(run.path, client, tmp_path / client)) == greeting
    (registered,) = [record["clients"] for record in run.rounds() if record["phase"] == "register"]
    modes = {client: said["trainer"] for client, said in registered.items()}
    assert modes == {client: "installed" if client == CLIENTS[0] else "bundled" for client in CLIENTS}


def _written(base: Path, adapter: Path) -> str:
    """What transformers and PEFT alone write with a client's personal model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    prompt = tokenizer("Kim and Zoe say:", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_classifier_shares_its_head_where_all_clients_have_the_same_labels(own: Own, tmp_path: Path) -> None:
    own.replace_data(lambda number: toy_data.opinions(80, number))
    base = tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)
    run, summary = own.run("opinions", base_model=str(base), labels="neg,pos", local_steps=60, learning_rate=1e-2)
    (first,) = [record["clients"] for record in run.rounds() if record["phase"] == "train"]
    for name, client in summary["clients"].items():  # one round on 64 examples: better than the untrained head
        assert client["loss"] < 0.9 * first[name]["metrics"]["personal"]["loss"]
        assert client["accuracy"] > 0.5
        assert 0 < client["f1"] <= 1
    found = audit(run.path.parent / "records" / f"{CLIENTS[0]}.jsonl")
    assert not found.problems
    with Ledger(run.path / "ledger.sqlite", read_only=True) as ledger:
        booked = sum(r.bytes for r in ledger.accounts().tensors if r.client == CLIENTS[0] and r.direction == "up")
        encodings = ledger.by_encoding()
    assert {way: set(bytes_) for way, bytes_ in encodings.items()} == {"up": {"fp16"}, "down": {"fp16"}}  # by default
    assert found.runs["opinions"].numbers == booked > 0
    assert "train: 64 examples" in (own.cluster.settings.runs_dir / "data-berlin.txt").read_text()
    assert not (run.path / "clients" / "berlin" / "slots" / "own-head").exists()


def test_a_vision_transformer_learns_from_images(own: Own, tmp_path: Path) -> None:
    def pictures(number: int) -> list[dict[str, Any]]:
        folder = toy_data.write_pictures(tmp_path / CLIENTS[number], 12, number)
        return [{"image": str(path), "label": path.parent.name} for path in sorted(folder.rglob("*.png"))]

    own.replace_data(pictures)
    base = tiny_models.save_vit(tmp_path / "vit")
    _, summary = own.run("pictures", base_model=str(base), labels="red,green,blue", local_steps=40, micro_batch_size=5)
    assert all(client["accuracy"] == 1.0 for client in summary["clients"].values())


def test_an_image_and_text_model_learns_to_say_what_it_sees(own: Own, tmp_path: Path) -> None:
    def captions(number: int) -> list[dict[str, Any]]:
        path = toy_data.write_captions(tmp_path / CLIENTS[number], 12, number)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row | {"image": str(path.parent / row["image"])} for row in rows]

    own.replace_data(captions)
    base = tiny_models.save_llava(tmp_path / "llava")
    _, summary = own.run(
        "captions",
        strategy="local",
        base_model=str(base),
        target_modules="all-linear",
        local_steps=60,
        learning_rate=1e-2,
        generate_examples=4,
        max_new_tokens=6,
    )
    assert all(client["exact_match"] >= 0.75 for client in summary["clients"].values())


def test_cluster_down_ends_the_resident_trainers(own: Own) -> None:
    """They have sessions of their own, so they do not end with their parents. The last test of this module."""

    def trainers() -> list[psutil.Process]:
        owners = [f"{process.pid}-" for process in own.cluster.processes]
        return [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if "client_app.trainer.server" in (command := process.info["cmdline"] or [])
            and any(part.startswith(owner) for owner in owners for part in command)
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    if not trainers():  # no other test of this module ran
        own.run("before", base_model=str(own.folder / "base"), local_steps=1)
    assert len(trainers()) == len(CLIENTS) - 1  # the first client's is its owner's
    assert stop(own.cluster.directory) > len(CLIENTS)
    deadline = time.monotonic() + 60
    while left := trainers():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
