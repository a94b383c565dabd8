"""The commands of claims.sh run here at toy size, so that no GPU is the first to see them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client_app.scenarios import instruct
from tests.toys import tiny_models

SCRIPT = Path(__file__).with_name("claims.sh")


def write_texts(root: Path) -> None:
    """Texts of every task, enough for all clients."""
    (root / "text").mkdir()
    chance = np.random.default_rng(0)
    for task, question in instruct.QUESTIONS.items():
        rows = [{"meta": task, "labels": list(question.answers)}]
        for number in range(900):
            label = int(chance.integers(len(question.answers)))
            text = f"text {number} of {task} is {question.answers[label]}"
            rows.append({"s": "test" if number % 4 == 0 else "train", "x": text, "y": label})
        with gzip.open(root / "text" / f"{task}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.long
def test_the_script_runs_both_experiments_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write_texts(tmp_path)
    model = tiny_models.save_llama(tmp_path / "tiny", chat=True)
    out = tmp_path / "found"
    arms = ["local", "potara", "oracle"]
    command = [str(SCRIPT), str(model), str(tmp_path), str(out), "--seeds", "0", "--arms", *arms]
    command += ["--dials", "same", "pairs", "--cache", str(tmp_path / "cache")]
    command += ["--set", "num-server-rounds=2 local-steps=1 batch-size=2 max-length=32"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path) not in (out / "potara.jsonl").read_text(), "lines have no folder of this machine"
    lines = {name: [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
             for name in ("potara", "fedmosaic")}  # fmt: skip
    tested = {name: {line["arm"] for line in found if line["split"] == "test"} for name, found in lines.items()}
    assert tested == {"potara": {"local", "potara"}, "fedmosaic": {"local", "oracle"}}
    searches = [line for line in lines["potara"] if line["split"] == "validation" and line["client"] == "client-0"]
    assert [line["arm"] for line in searches].count("local") == [line["arm"] for line in searches].count("potara") == 3
    steps = {line["train_steps"] for line in lines["potara"] if line["arm"] == "local"}
    assert steps == {2}
    assert "| claim, by loss | same |" in done.stdout
    again = subprocess.run(
        [*command, "--table"], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert again.stdout.splitlines()[0].startswith("### Potara")
