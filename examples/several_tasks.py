"""Three clinics with one or two tasks each, over one small FLAVA: sorting notes, and writing what an image shows.

    python -m examples.several_tasks clinics

writes for each clinic a TOML file with a table for each of its tasks, the tasks' data, ``clinics/clients.toml``, and
``clinics/base``, a tiny FLAVA. Tasks of one name share their head, so the clinics that sort notes agree on the labels.
``tap``, ``fedavg``, ``potara`` and ``local`` can merge clients whose tasks differ. To use your own data, replace the
files, and set the base model to ``facebook/flava-full@refs/pr/5``.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image

from examples.tiny_models import save_flava

TASKS = {"bern": ("notes", "scans"), "lyon": ("notes",), "graz": ("scans",)}
LABELS = ("calm", "urgent")
WORDS = {"calm": ("stable", "resting", "routine"), "urgent": ("bleeding", "fainted", "now")}
SIDES = ("left", "right")
PARTS = ("arm", "knee", "hand", "foot", "ear", "eye")
DAYS = ("monday", "tuesday", "friday")
SHADES = {"dark": 40, "bright": 210}
TABLES = {
    "notes": f'[notes]\ndata-path = "notes.jsonl"\nlabels = "{",".join(LABELS)}"\n',
    "scans": '[scans]\ntask = "image-text-to-text"\ndata-path = "scans.jsonl"\n'
    "max-length = 16\ngenerate-examples = 4\nmax-new-tokens = 3\n",
}


def notes(chance: random.Random, count: int) -> list[dict[str, str]]:
    """Texts with a label."""
    rows = []
    for _ in range(count):
        label = chance.choice(LABELS)
        rows.append(
            {"text": " ".join(chance.choice(these) for these in (DAYS, SIDES, PARTS, WORDS[label])), "label": label}
        )
    return rows


def scans(chance: random.Random, count: int, folder: Path) -> list[dict[str, str]]:
    """Images beside the file, each with a prompt and the text to be written."""
    rows = []
    (folder / "images").mkdir()
    for number in range(count):
        shade, value = chance.choice(list(SHADES.items()))
        Image.new("L", (16, 16), value + chance.randint(-20, 20)).convert("RGB").save(folder / f"images/{number}.png")
        rows.append({"image": f"images/{number}.png", "prompt": "shows", "completion": f"{shade} scan"})
    return rows


def write(folder: Path, count: int = 60) -> None:
    """Data, task files, the tiny model, and ``clients.toml``."""
    words = [*LABELS, *SIDES, *PARTS, *DAYS, *SHADES, *sum(WORDS.values(), ()), "shows", "scan"]
    save_flava(folder / "base", words)
    tables = []
    for number, (clinic, tasks) in enumerate(TASKS.items()):
        chance, own = random.Random(number), folder / clinic
        own.mkdir()
        for task in tasks:
            rows = notes(chance, count) if task == "notes" else scans(chance, count, own)
            (own / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (own / "tasks.toml").write_text("\n".join(TABLES[task] for task in tasks))
        tables.append(f'[{clinic}]\ndata-path = "{(own / "tasks.toml").resolve()}"\n')
    (folder / "clients.toml").write_text("\n".join(tables))


def main(folder: Path) -> None:
    """Write everything, and say how to run it."""
    write(folder)
    settings = f"base-model='{(folder / 'base').resolve()}' learning-rate=1e-2"
    print(f"fedalloy compare --clients-file {folder}/clients.toml --strategies tap,potara \\")
    print(f'    --out {folder}/comparison --set "{settings}"')


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "clinics"))
