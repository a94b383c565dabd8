"""Three clients with data of their own and one small causal LM, all made here, without a network.

    python -m examples.three_clients own

writes ``own/base`` (a Llama of 60,000 random parameters over characters; it knows nothing, so a small adapter on all
its linear layers has to learn everything), ``own/{berlin,paris,rome}.jsonl`` and ``own/clients.toml``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from examples.tiny_models import save_llama

GREETINGS = {"berlin": "hallo", "paris": "salut", "rome": "ciao"}
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ivo", "Jo", "Kim", "Lea")


def write(folder: Path, rows: int = 60) -> None:
    """Model, data and ``clients.toml``."""
    save_llama(folder / "base")
    clients = []
    for number, (client, greeting) in enumerate(GREETINGS.items()):
        chance = random.Random(number)
        path = folder / f"{client}.jsonl"
        with path.open("w") as file:
            for _ in range(rows):
                prompt = f"{chance.choice(NAMES)} and {chance.choice(NAMES)} say:"
                file.write(json.dumps({"prompt": prompt, "completion": greeting}) + "\n")
        clients.append(f'[{client}]\ndata-path = "{path.resolve()}"\n')
    (folder / "clients.toml").write_text("\n".join(clients))


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "own"))
