"""Small data sets that a tiny model can learn, for clients of their own kinds; written as a user would have them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

WORDS = {"pos": ("good", "fine", "great", "lovely"), "neg": ("bad", "awful", "poor", "sad")}
NOUNS = ("film", "plot", "actor", "music")
VOCABULARY = (*WORDS["pos"], *WORDS["neg"], *NOUNS)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opinions(count: int, seed: int) -> list[dict[str, Any]]:
    """Text and label: one word decides."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("pos", "neg")[number % 2]
        words = [chance.choice(WORDS[label]), *(chance.choice(NOUNS) for _ in range(chance.randint(1, 4)))]
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def echoes(count: int, seed: int, end: str) -> list[dict[str, Any]]:
    """Prompt and completion: three letters, and what this client always answers."""
    chance = random.Random(seed)
    return [{"prompt": "".join(chance.choices("abcdef", k=3)) + ">", "completion": end} for _ in range(count)]


def picture(colour: str, size: int, seed: int) -> PIL.Image.Image:
    chance = random.Random(seed)
    shade = [max(0, min(255, value + chance.randint(-25, 25))) for value in COLOURS[colour]]
    return PIL.Image.new("RGB", (size, size), (shade[0], shade[1], shade[2]))


def write_pictures(folder: Path, each: int, seed: int, size: int = 20) -> Path:
    """A folder of images for each colour."""
    for number, colour in enumerate(COLOURS):
        (folder / colour).mkdir(parents=True, exist_ok=True)
        for index in range(each):
            picture(colour, size, 1000 * seed + 100 * number + index).save(folder / colour / f"{index}.png")
    return folder


def write_captions(folder: Path, each: int, seed: int, *, question: bool = False) -> Path:
    """Images with a text; ``question``: whether the image has the colour that is asked for, true or false."""
    rows = []
    for number, colour in enumerate(COLOURS):
        for index in range(each):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{colour}-{index}.png"
            picture(colour, 20, 1000 * seed + 100 * number + index).save(folder / name)
            if question:
                asked = colour if index % 2 else list(COLOURS)[(number + 1) % 3]
                rows.append({"image": name, "text": asked, "label": asked == colour})
            else:
                rows.append({"image": name, "prompt": "?", "completion": colour})
    return write_jsonl(folder / "data.jsonl", rows)
