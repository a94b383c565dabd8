"""Exports a client's personal model from a run: ``fedalloy export RUN CLIENT DEST --as peft|merged|vllm|gguf|hub``.

A form is a function in :data:`FORMS`: it fills a new folder from the client's files.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedalloy_adapters.words import one_line
from server_app.tools.handover.card import base_name, write_card
from server_app.tools.handover.personal import FILES, ExportError, Personal, clients_of, find, is_in_parts, require_one
from server_app.tools.handover.served import max_lora_rank, write_gguf, write_vllm

__all__ = ["FORMS", "ExportError", "Personal", "export_adapter", "export_all", "is_in_parts"]
_PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Modules that PEFT saves whole for tasks with a head; it misses a saved module inside one (RoBERTa's
``classifier.dense``)."""
Say = Callable[[str], None]


def export_adapter(
    run: Path, client_id: str, destination: Path, form: str = "peft", say: Say = lambda text: None
) -> Path:
    """Write a client's personal model to ``destination``, all of it or nothing.

    Args:
        run: a run directory on the machine that holds this client's files.
        client_id: one of its clients.
        destination: a folder that does not exist yet, or is empty.
        form: a key of :data:`FORMS`.
        say: called with what a user should know about the result.

    Raises:
        ExportError: there is no such run or client, or no personal model yet; the model does not fit this form; or the
            destination is not empty.
    """
    personal = find(run, client_id)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ExportError(f"{destination} exists and is not an empty folder")
    staged = destination.with_name(f".{destination.name}-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        FORMS[form](personal, staged, say)
        if destination.exists():
            destination.rmdir()
        os.rename(staged, destination)
    except OSError as error:
        raise ExportError(f"cannot write {destination}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return destination


def export_all(run: Path, destination: Path, form: str = "peft", say: Say = lambda text: None) -> list[Path]:
    """Write the models of all clients on this machine, each to a folder with the client's name; all of them or none.

    Raises:
        ExportError: as for :func:`export_adapter`, for any of them.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ExportError(f"{destination} exists and is not an empty folder")
    known = clients_of(run)
    if not known:
        raise ExportError(f"run {run.name!r} has no client's files on this machine")
    done: list[Path] = []
    try:
        for name in known:
            told: list[str] = []
            done.append(export_adapter(run, name, destination / name, form, told.append))
            for text in told:
                say(f"{name}: {text}")
    except ExportError:
        for folder in done:
            shutil.rmtree(folder)
        raise
    if form == "vllm":
        ranks = [json.loads((folder / FILES[0]).read_text())["r"] for folder in done]
        modules = " ".join(f"{folder.name}={folder}" for folder in done)
        base = base_name(find(run, known[0]))
        say(
            f"vllm serve {base} --enable-lora --max-loras {len(done)} --max-lora-rank {max_lora_rank(max(ranks))} "
            f"--lora-modules {modules}"
        )
    return done


# --------------------------------------------------------------------------------------------------------------- forms


def _peft(personal: Personal, folder: Path, say: Say) -> None:
    """A folder for ``PeftModel.from_pretrained``; if the model :func:`is_in_parts`, each folder in it is one."""
    if is_in_parts(personal.folder):
        shutil.copytree(personal.folder, folder, dirs_exist_ok=True)
        say(
            "Its coefficients depend on the input, so it cannot be one PEFT adapter: each slot is a PEFT directory of "
            "its own, gates.safetensors holds the gates, and mixture.json says how they add up."
        )
        return
    from client_app.kinds import KINDS

    for name in FILES:
        shutil.copyfile(personal.folder / name, folder / name)
    config = personal.config
    inner = [part for name in config.get("modules_to_save") or () for part in name.split(".")[:-1]]
    kind = KINDS.get(personal.task)
    config["task_type"] = None if kind is None or set(inner) & set(_PEFT_HEADS) else kind.peft_task
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _tokenizer(personal, folder, say)
    write_card(personal, folder, "adapter", "adapter" if personal.task == "causal-lm" else "other adapter")
    trained = personal.about.get("rank")
    if trained and config.get("r") != trained:
        say(
            f"rank {config.get('r')}: the clients trained rank {trained}, and this model is the sum of several "
            "adapters, which stack"
        )


def _merged(personal: Personal, folder: Path, say: Say) -> None:
    """The base model with the adapter added, in float32: rounding the sum to bfloat16 would change its answers."""
    _merge(personal, folder, say)
    write_card(
        personal, folder, "model, the adapter merged into its base",
        "merged" if personal.task == "causal-lm" else "other merged",
    )  # fmt: skip
    say("merged in float32; to save memory, load it with dtype=torch.bfloat16")


def _merge(personal: Personal, folder: Path, say: Say) -> None:
    import torch
    from peft import PeftModel

    from client_app.kinds import KINDS

    require_one(personal, "merged")
    if personal.task not in KINDS:
        raise ExportError("this model cannot be merged: its client does not have exactly one known task")
    transformers: Any = importlib.import_module("transformers")
    kind = KINDS[personal.task]
    auto = getattr(transformers, kind.auto_model)
    heads: dict[str, Any] = {}
    if kind.head:
        heads["num_labels"] = _labels_in(personal)
    transformers.utils.logging.disable_progress_bar()
    base = auto.from_pretrained(personal.base, dtype=torch.float32, local_files_only=True, **heads)
    model: Any = PeftModel.from_pretrained(base, str(personal.folder))
    model.merge_and_unload().save_pretrained(folder)
    _tokenizer(personal, folder, say)


def _vllm(personal: Personal, folder: Path, say: Say) -> None:
    """A LoRA adapter for ``vllm serve --enable-lora``."""
    rank = write_vllm(personal, folder)
    _tokenizer(personal, folder, say)
    write_card(personal, folder, "adapter for vLLM", "vllm", rank=max_lora_rank(rank))
    say(f"every module has rank {rank}: vllm serve --enable-lora --max-lora-rank {max_lora_rank(rank)}")


def _gguf(personal: Personal, folder: Path, say: Say) -> None:
    """One file for llama.cpp, made by its own converter."""
    require_one(personal, "gguf")
    write_gguf(lambda merged: _merge(personal, merged, say), folder)
    write_card(personal, folder, "model for llama.cpp", "gguf")


def _hub(personal: Personal, folder: Path, say: Say) -> None:
    """A folder to upload: like ``peft``, but without paths of this machine."""
    require_one(personal, "hub")
    _peft(personal, folder, say)
    config = json.loads((folder / "adapter_config.json").read_text())
    if Path(str(config["base_model_name_or_path"])).is_absolute():
        config["base_model_name_or_path"] = base_name(personal)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        say(
            f"its base model is a folder on this machine, here named {base_name(personal)!r}: write its hub name "
            "into adapter_config.json and README.md before you upload"
        )
    say(f"nothing was uploaded: hf upload NAMESPACE/NAME {folder.name.removeprefix('.').rsplit('-', 1)[0]}")


FORMS: Mapping[str, Callable[[Personal, Path, Say], None]] = {
    "peft": _peft,
    "merged": _merged,
    "vllm": _vllm,
    "gguf": _gguf,
    "hub": _hub,
}


def _labels_in(personal: Personal) -> int:
    """How many classes the saved head has."""
    from safetensors import safe_open

    heads = list(personal.config.get("modules_to_save") or [])
    with safe_open(personal.folder / "adapter_model.safetensors", "pt") as file:
        rows = [file.get_slice(key).get_shape()[0] for key in file.keys() if any(f".{h}." in key for h in heads)]  # noqa: SIM118
    if not rows:
        raise ExportError(f"{personal.folder} has no head")
    return int(rows[-1])


def _tokenizer(personal: Personal, folder: Path, say: Say) -> None:
    """Write the base model's tokenizer and processors in their own library's form."""
    from client_app.kinds import KINDS

    kind = KINDS.get(personal.task)
    if kind is None:
        return
    try:
        transformers: Any = importlib.import_module("transformers")
        for wanted, name in ((kind.has_text, "AutoTokenizer"), (kind.has_image, "AutoImageProcessor")):
            if wanted:
                loader = getattr(transformers, name)
                loader.from_pretrained(personal.base, local_files_only=True).save_pretrained(folder)
    except (ExportError, OSError, ValueError) as error:
        say(f"without tokenizer and processor: {one_line(error)}")
