"""The stock client: for every message it imports PyTorch, loads the base model and its data, and works."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def load_model(folder: Path) -> Any:
    """The base model with PEFT's LoRA, in float32, around it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    facts = json.loads((folder / "facts.json").read_text())
    labels = {"num_labels": facts["labels"], "ignore_mismatched_sizes": True} if "labels" in facts else {}
    kind = getattr(transformers, facts["class"])
    base = kind.from_pretrained(facts["base"], dtype=getattr(torch, facts["dtype"]), **labels)
    config = LoraConfig(
        r=facts["rank"],
        lora_alpha=facts["alpha"],
        target_modules=facts["targets"],
        modules_to_save=facts["trained"] or None,
    )
    return get_peft_model(base, config)


def load_split(folder: Path, partition: int, split: str) -> dict[str, Any]:
    """The model's inputs, and labels."""
    import numpy as np
    import torch

    with np.load(folder / f"{partition}.npz") as data:
        names = [name for name in data.files if name.startswith(f"{split}_")]
        return {name.removeprefix(f"{split}_"): torch.from_numpy(data[name]) for name in names}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Install the global adapter, train it, send it back as a state dict."""
    if context.run_config["empty"]:
        content = RecordDict({"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = context.run_config
    folder = Path(str(config["folder"]))
    model = load_model(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    data = load_split(folder, int(context.node_config["partition-id"]), "train")
    count = len(data["labels"])
    round_ = int(message.content["config"]["server-round"])
    torch.manual_seed(10_000 * int(config["seed"]) + 100 * round_ + int(context.node_config["partition-id"]))
    started = time.monotonic()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=float(config["learning-rate"]), weight_decay=0.0)
    model.train()
    loss = torch.zeros(())
    for _ in range(int(config["steps"])):
        chosen = torch.randint(count, (int(config["batch-size"]),))
        loss = model(**{name: tensor[chosen] for name, tensor in data.items()}).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    metrics = {
        "train-seconds": time.monotonic() - started,
        "train-loss": float(loss.detach()),
        "num-examples": count,
    }
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Install the global adapter and evaluate it on the client's test split: mean loss of examples or tokens."""
    import torch
    from peft import set_peft_model_state_dict

    folder = Path(str(context.run_config["folder"]))
    model = load_model(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    data = load_split(folder, int(context.node_config["partition-id"]), "test")
    model.eval()
    count, at_once = len(data["labels"]), 20
    loss, weights = 0.0, 0
    with torch.no_grad():
        for start in range(0, count, at_once):
            batch = {name: tensor[start : start + at_once] for name, tensor in data.items()}
            labels = batch["labels"]
            weight = int((labels[:, 1:] != -100).sum()) if labels.dim() > 1 else len(labels)
            loss, weights = loss + float(model(**batch).loss) * weight, weights + weight
    metrics = {"loss": loss / weights, "num-examples": count, "partition-id": int(context.node_config["partition-id"])}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
