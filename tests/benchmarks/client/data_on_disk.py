"""How much a client's data add to its memory: texts of 2,048 tokens, encoded into a file, then read once.

    python -m tests.benchmarks.client.data_on_disk [--examples 100000] [--tokens 2048]

A client loads its own data (a JSON-lines file, a tiny language model whose tokens are characters) and reads every
training example once, in batches of 8. It prints the resident set beyond that of a client with 40 examples: after
loading, the most while reading, and the most while loading, when all rows are read as text; the part of it that is
anonymous memory, which the file's own pages are not; and the size of the same tokens padded in memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from client_app.data.stored import StoredDataset, give_back_memory
from client_app.own.files import load_own
from tests.benchmarks.client_step import resident, status_of
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models


def measure(folder: Path, examples: int, tokens: int) -> dict[str, Any]:
    """One client's memory, in a process of its own."""
    tokenizer = tiny_models.character_tokenizer()
    config = tiny_models.llama_config(tokenizer, 32)
    config.max_position_embeddings = tokens
    base = tiny_models.save_model(folder / "base", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(examples):
            letters = "abcdefghij"[number % 10] * (tokens - 12)
            file.write(json.dumps({"prompt": f"{number:08d}{letters}", "completion": "yes"}) + "\n")
    _, data = load_own(settings_of(path, folder / "state", base, max_length=tokens))
    train = data.splits["train"]
    give_back_memory()
    found = {"loading": status_of("VmHWM"), "loaded": resident(), "anonymous": status_of("RssAnon"), "most": 0}
    for part in torch.split(torch.arange(len(train)), 8):
        train.batch(part)
        found["most"] = max(found["most"], resident())
    return found | {"stored": isinstance(train, StoredDataset), "examples": len(train)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), arguments.one, arguments.tokens)))
        return
    found = []
    for count in (40, arguments.examples):
        command = [sys.executable, "-m", "tests.benchmarks.client.data_on_disk", "--one", str(count)]
        done = subprocess.run(
            [*command, "--tokens", str(arguments.tokens)], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parents[3],
        )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    few, many = found
    padded = 3 * 8 * many["examples"] * arguments.tokens
    beyond = {name: (many[name] - few[name]) / 1e6 for name in ("loading", "loaded", "anonymous", "most")}
    print(
        f"{arguments.examples} examples of {arguments.tokens} tokens, in a file: {many['stored']}. Beyond a client "
        f"with 40: {beyond['loaded']:.0f} MB after loading ({beyond['anonymous']:.0f} MB of it anonymous), "
        f"{beyond['most']:.0f} MB at most while reading, {beyond['loading']:.0f} MB at most while loading; "
        f"padded in memory: {padded / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
