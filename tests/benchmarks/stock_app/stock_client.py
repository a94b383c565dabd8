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
    """The base model with PEFT's LoRA around it, in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(1)
    facts = json.loads((folder / "facts.json").read_text())
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    config = LoraConfig(
        r=facts["rank"], lora_alpha=facts["alpha"], target_modules=facts["targets"], modules_to_save=facts["heads"]
    )
    return get_peft_model(base, config)


def load_split(folder: Path, partition: int, split: str) -> tuple[Any, Any]:
    """Images and labels."""
    import numpy as np
    import torch

    with np.load(folder / f"{partition}.npz") as data:
        return torch.from_numpy(data[f"{split}_inputs"]), torch.from_numpy(data[f"{split}_labels"])


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
    inputs, labels = load_split(folder, int(context.node_config["partition-id"]), "train")
    started = time.monotonic()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=float(config["learning-rate"]), weight_decay=0.0)
    model.train()
    loss = torch.zeros(())
    for _ in range(int(config["steps"])):
        chosen = torch.randint(len(labels), (int(config["batch-size"]),))
        loss = torch.nn.functional.cross_entropy(model(pixel_values=inputs[chosen]).logits, labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    metrics = {
        "train-seconds": time.monotonic() - started,
        "train-loss": float(loss.detach()),
        "num-examples": len(labels),
    }
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Install the global adapter and evaluate it on the client's test split."""
    import torch
    from peft import set_peft_model_state_dict

    folder = Path(str(context.run_config["folder"]))
    model = load_model(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    inputs, labels = load_split(folder, int(context.node_config["partition-id"]), "test")
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=part).logits for part in inputs.split(256)])
    metrics = {
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(dim=-1) == labels).double().mean()),
        "num-examples": len(labels),
    }
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
