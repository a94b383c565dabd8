"""The model card of an export, in the form of the Hugging Face hub: what it is, how it was made, how to load it.

It has the number and kind of the client's examples, but nothing of their content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server_app.run.run_directory import RunDirectory, RunDirectoryError
from server_app.tools.handover.personal import ExportError, Personal

LOADING = {
    "adapter": 'AutoPeftModelForCausalLM.from_pretrained("FOLDER")',
    "other adapter": 'PeftModel.from_pretrained(BASE_MODEL, "FOLDER")  # BASE_MODEL: {base}, loaded by transformers',
    "merged": 'AutoModelForCausalLM.from_pretrained("FOLDER")',
    "other merged": 'AutoModel...from_pretrained("FOLDER")  # the class that the base model is loaded with',
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {client}=FOLDER",
    "gguf": "llama-cli -m FOLDER/model.gguf",
}


def write_card(personal: Personal, folder: Path, what: str, kind: str, **more: object) -> None:
    """Write ``README.md`` and ``metrics.json``.

    Args:
        personal: the client's model.
        folder: the export's folder.
        what: the kind of export, in words.
        kind: a key of :data:`LOADING`.
        more: values for the line that loads it.
    """
    about = personal.about
    base = base_name(personal)
    licence = licence_of_base(personal)
    front = ["---", f"base_model: {json.dumps(base)}"]
    front += [f"license: {licence}"] if licence else []
    front += ["library_name: peft" if "adapter" in kind or kind == "vllm" else "library_name: transformers"]
    front += ["tags: [fedalloy, lora, federated-learning]", "---", ""]
    lines = [*front, f"# Personal {what} of client {about.get('client', '?')}", ""]
    lines += [f"Trained with FedAlloy in run `{about.get('run', '?')}`, on base model `{base}`."]
    lines += [f"The base model says that its licence is `{licence}`.", ""] if licence else [""]
    if about.get("base_precision"):
        lines += [f"The base model's numbers were {about['base_precision']} while this was trained.", ""]
    lines += ["## Load it", "", "```"]
    lines += [LOADING[kind].format(base=base, client=about.get("client", "?"), **more), "```", ""]
    lines += ["## Data", "", *_data(about), "", *_training(personal)]
    if about.get("metrics"):
        lines += ["## Metrics", "", "| split | metric | value |", "|---|---|---|"]
        for split, metrics in about["metrics"].items():
            lines += [f"| {split} | {name} | {value:.4f} |" for name, value in sorted(metrics.items())]
        (folder / "metrics.json").write_text(json.dumps(about["metrics"], indent=2) + "\n")
    lines += ["", *_by_round(personal)]
    (folder / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def base_name(personal: Personal) -> str:
    """The base model's name; for a folder only its last part, because the rest of the path is private."""
    config = json.loads((personal.folder / "adapter_config.json").read_text())
    name = str(config.get("base_model_name_or_path", ""))
    return Path(name).name if Path(name).is_absolute() else name


def licence_of_base(personal: Personal) -> str:
    """The licence in the base model's own card; empty if there is none."""
    try:
        text = (personal.base / "README.md").read_text(errors="replace")
    except (ExportError, OSError):
        return ""
    front = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.M) if front else None
    return found[1] if found else ""


def _data(about: Mapping[str, Any]) -> Iterator[str]:
    tasks = about.get("tasks", {})
    yield "The client's own data; this folder contains none of them." if tasks else "Not known."
    for name, kind in tasks.items():
        yield f"* task `{name}`: {kind}"
    if about.get("examples"):
        yield "* examples: " + ", ".join(f"{split} {count}" for split, count in about["examples"].items())


def _training(personal: Personal) -> Iterator[str]:
    """How the model was trained, if the server's files are on this machine."""
    run = RunDirectory(personal.run)
    try:
        config = run.config()
    except RunDirectoryError:
        return
    shown = ("strategy", "num-server-rounds", "local-steps", "local-epochs", "learning-rate", "schedule", "seed")
    yield "## Training"
    yield ""
    yield from (f"* {key}: {config[key]}" for key in shown if key in config)
    try:
        sizes = json.loads((personal.run / "summary.json").read_text())["bytes"]
        total = {way: size.get("wire") or size.get("message") for way, size in sizes.items()}
        yield "* bytes of all clients: " + ", ".join(f"{way} {size:,}" for way, size in total.items() if size)
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    yield ""


def _by_round(personal: Personal) -> Iterator[str]:
    client, rows = str(personal.about.get("client", "")), []
    for record in RunDirectory(personal.run).rounds():
        found = record["clients"].get(client, {}).get("metrics", {}).get("personal", {})
        if record["phase"] == "train" and found:
            score = ", ".join(
                f"{name} {found[name]:.4f}" for name in ("accuracy", "loss", "exact_match") if name in found
            )
            rows.append(f"| {record['round']} | {score} |")
    if rows:
        yield "## Metrics by round"
        yield ""
        yield "Metrics of the model that the client had when the round began."
        yield ""
        yield from ["| round | metrics |", "|---|---|", *rows]
