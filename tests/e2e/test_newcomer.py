"""A newcomer's way, from the documentation alone, on real SuperLink and SuperNode processes with TLS and keys.

Own chat data and a tiny chat model; a misspelt key, a site that is refused, one that is killed, a late delivery, an
export, and plain PEFT. Every command is one that the pages name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from examples import tiny_models
from tests.toys import toy_data

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
SITES = ("movies", "shop", "news")


class Newcomer:
    """A folder of one's own, and commands typed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / ".fedalloy" / "cluster" / "flwr-home"),
            "COLUMNS": "200",
        }

    def types(self, *command: str, succeeds: bool = True) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        said = done.stdout + done.stderr
        assert (done.returncode == 0) == succeeds, said
        return said

    def config(self, name: str, **config: Any) -> str:
        """Run-config of one round, small."""
        given = {"run-name": name, "runs-dir": str(self.folder / "runs"), "strategy": "fedavg", "num-server-rounds": 1}
        given |= {"local-steps": 3, "base-model": str(self.folder / "base"), "target-modules": "all-linear"}
        given |= {"evaluate-split": "validation", "round-timeout": 240.0, "startup-timeout": 240.0}
        given |= {key.replace("_", "-"): value for key, value in config.items()}
        return " ".join(f"{key}={json.dumps(value)}" for key, value in given.items())

    def submits(self, config: str, command: tuple[str, ...] = ("fedalloy", "submit"), succeeds: bool = True) -> str:
        """``fedalloy submit`` or ``flwr run``; what it streamed."""
        words = (*command, str(REPOSITORY), "fedalloy", "--stream", "--run-config", config)
        return self.types(*words, succeeds=succeeds)

    def clients_file(self, **changes: str) -> None:
        """One table for each site, with paths beside the file."""
        tables = {site: f'data-path = "{site}.jsonl"' for site in SITES} | changes
        text = "".join(f"[{site}]\n{table}\n" for site, table in tables.items())
        (self.folder / "clients.toml").write_text(text)

    def summary(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "runs" / name / "summary.json").read_text())
        return found

    def kill_a_site(self, site: str) -> None:
        """The machine of a site goes down."""
        state = json.loads((self.folder / ".fedalloy" / "cluster" / "cluster.json").read_text())
        (pid,) = [item["pid"] for item in state["processes"] if item["name"] == f"supernode-{site}"]
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            member.kill()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    folder = tmp_path_factory.mktemp("newcomer")
    tiny_models.save_llama(folder / "base", chat=True)
    for number, site in enumerate(SITES):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"say {number} {count}"},
                    {"role": "assistant", "content": f"{site} {count}"},
                ]
            }
            for count in range(30)
        ]
        toy_data.write_jsonl(folder / f"{site}.jsonl", rows)
    found = Newcomer(folder)
    try:
        yield found
    finally:
        found.types("fedalloy", "cluster", "down")


@pytest.mark.skipif(
    os.environ.get("FEDALLOY_FAULTS") != "long", reason="three minutes; run it with FEDALLOY_FAULTS=long"
)
@pytest.mark.timeout(1800)  # a busy machine takes longer than the ten minutes of other tests
def test_the_way_of_a_newcomer(newcomer: Newcomer) -> None:
    newcomer.clients_file(shop='data-pth = "shop.jsonl"')
    said = newcomer.types("fedalloy", "cluster", "up", "--clients-file", "clients.toml", succeeds=False)
    assert "client 'shop' has an unknown key: 'data-pth' (did you mean 'data-path'?)" in said

    newcomer.clients_file()
    said = newcomer.types("fedalloy", "cluster", "up", "--clients-file", "clients.toml")
    assert "base-model='BASE-MODEL'" in said

    said = newcomer.submits(newcomer.config("typo", lora_r=0), succeeds=False)
    (told,) = [line for line in said.splitlines() if "the run failed: " in line]
    assert told.endswith("run-config: lora-r = 0, expected at least 1")
    assert "Traceback" not in said

    shop = (newcomer.folder / "shop.jsonl").read_text()
    (newcomer.folder / "shop.jsonl").write_text('{"messages": "no list"}\n')
    said = newcomer.types("fedalloy", "run", newcomer.config("refused"), succeeds=False)
    assert "error: client 'shop': " in said
    assert not (newcomer.folder / "runs" / "refused").exists()
    said = newcomer.submits(newcomer.config("refused"), ("flwr", "run"))  # its exit code is 0 even if the run failed
    (told,) = [line for line in said.splitlines() if "the run stopped: " in line]
    assert "2 of 3 sites that are online can take part; refused: shop: DataError" in told
    assert told.endswith("or go on without: min-clients=2")
    assert all(word not in said for word in ("JobFailedError", "Traceback", "Exit Code"))
    assert not (newcomer.folder / "runs" / "refused" / "summary.json").exists()

    (newcomer.folder / "shop.jsonl").write_text(shop)
    said = newcomer.types("fedalloy", "run", newcomer.config("all"))
    assert "refused" not in said
    assert "finished: " in said
    assert set(newcomer.summary("all")["clients"]) == set(SITES)

    newcomer.kill_a_site("news")
    said = newcomer.types("fedalloy", "cluster", "status", succeeds=False)
    assert "fedalloy cluster up restarts what has ended" in said
    more = {"num_server_rounds": 2, "resume": str(newcomer.folder / "runs" / "all"), "min_clients": 2}
    said = newcomer.submits(newcomer.config("all", **more))
    assert newcomer.summary("all")["not_delivered"] == ["news"]
    assert "finished: 2 of 3 sites; without their models: news (fedalloy deliver)" in said

    assert "supernode-news is running again" in newcomer.types("fedalloy", "cluster", "up")
    assert "delivered: news" in newcomer.types("fedalloy", "deliver", "runs/all")
    assert set(newcomer.summary("all")["clients"]) == set(SITES)
    said = newcomer.types("fedalloy", "cluster", "status")
    assert "causal-lm" in said

    newcomer.types("fedalloy", "export", "runs/all", "news", "news-model")
    newcomer.types("fedalloy", "export", "runs/all", "news", "news-merged", "--merge")
    assert _logits_differ(newcomer.folder) < 1e-3


def _logits_differ(folder: Path) -> float:
    """How far the merged model is from PEFT's, both loaded by transformers and PEFT alone."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "news-model")
    prompt = tokenizer("say 2 5", return_tensors="pt")
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(folder / "news-model")).eval()
    merged = AutoModelForCausalLM.from_pretrained(str(folder / "news-merged")).eval()
    with torch.no_grad():
        return float((adapted(**prompt).logits - merged(**prompt).logits).abs().max())
