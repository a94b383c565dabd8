"""Three orchards that sort fruit by images in folders named after the classes; each has a background of its own.

    python -m examples.image_folders orchards

writes ``orchards/{north,south,west}/{green,ripe,rotten}/*.png``, ``orchards/clients.toml`` and a tiny ViT. The orchards
share their classes (``labels``), so the head is part of the adapter and is merged. To use your own images, replace the
folders, and set ``base-model`` to a model such as ``google/vit-base-patch16-224``.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from examples.tiny_models import save_vit

FRUIT = {"green": (90, 180, 60), "ripe": (220, 50, 40), "rotten": (70, 45, 30)}
BACKGROUNDS = {"north": (200, 200, 210), "south": (150, 140, 110), "west": (90, 100, 120)}
SIZE = 24


def draw(colour: tuple[int, int, int], background: tuple[int, int, int], chance: random.Random) -> Image.Image:
    """One fruit, somewhere in the image."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(value + chance.randint(-20, 20) for value in background))
    left, top = chance.randint(1, 6), chance.randint(1, 6)
    box = (left, top, left + chance.randint(12, 16), top + chance.randint(12, 16))
    ImageDraw.Draw(image).ellipse(box, fill=tuple(value + chance.randint(-20, 20) for value in colour))
    return image


def write(folder: Path, each: int = 30) -> None:
    """``each`` images of each class at each orchard, the tiny model, and ``clients.toml``."""
    save_vit(folder / "base", SIZE)
    tables = []
    for number, (orchard, background) in enumerate(BACKGROUNDS.items()):
        chance = random.Random(number)
        for label, colour in FRUIT.items():
            (folder / orchard / label).mkdir(parents=True)
            for index in range(each):
                draw(colour, background, chance).save(folder / orchard / label / f"{index}.png")
        tables.append(f'[{orchard}]\ndata-path = "{(folder / orchard).resolve()}"\n')
    (folder / "clients.toml").write_text("\n".join(tables))


def main(folder: Path) -> None:
    """Write everything, and say how to run it."""
    write(folder)
    settings = f"base-model='{(folder / 'base').resolve()}' labels='{','.join(FRUIT)}' learning-rate=1e-2"
    print(f"fedalloy compare --clients-file {folder}/clients.toml --strategies fedmerge,potara \\")
    print(f'    --out {folder}/comparison --set "{settings}"')


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "orchards"))
