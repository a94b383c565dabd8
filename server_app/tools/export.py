"""A client's personal model out of a run: as a PEFT directory, or merged into its base model.

A form is a function in :data:`FORMS`: it fills a new folder from the client's files.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedalloy_adapters.words import one_line
from server_app.tools.errors import ToolError

MIXTURE_FILE = "mixture.json"
FILES = ("adapter_config.json", "adapter_model.safetensors")
_PEFT_HEADS = ("classifier", "score", "qa_outputs")
"""Modules that PEFT saves whole for tasks with a head; it misses a saved module inside one (RoBERTa's
``classifier.dense``)."""


class ExportError(ToolError):
    """There is nothing to export, or the destination is taken; the message names what there is."""


@dataclass(frozen=True)
class Personal:
    """A client's personal model on its disk: its PEFT directory, and what its client wrote about it."""

    folder: Path
    about: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The kind of its task; empty where it has several, or is older than ``about.json``."""
        kinds = set(self.about.get("tasks", {}).values())
        return str(kinds.pop()) if len(kinds) == 1 else ""

    @property
    def base(self) -> Path:
        """The folder of the base model on this machine.

        Raises:
            ExportError: it is not here.
        """
        from client_app.model.bases.model_folders import find_model

        name = json.loads((self.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        try:
            return Path(find_model(name, self.folder.parents[3] / ".cache").folder)
        except ValueError as error:
            raise ExportError(f"the base model {name!r} is not on this machine: {error}") from None


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
        say: told what a user should know of the result.

    Raises:
        ExportError: no such run or client, no personal model yet, not in this form, or the destination is not empty.
    """
    personal = _find(run, client_id)
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


def is_in_parts(folder: Path) -> bool:
    """Whether a personal model could not become one adapter, because its coefficients depend on the input.

    It is then a PEFT directory per slot, ``gates.safetensors``, and ``mixture.json``, which says how they add up.
    """
    return (folder / MIXTURE_FILE).is_file()


def _find(run: Path, client_id: str) -> Personal:
    clients = run / "clients"
    if not clients.is_dir():
        raise ExportError(
            f"{run} has no clients/ folder; clients keep their models on their own machines: run this at the client, "
            f"with <state-dir>/{run.name}"
        )
    known = sorted(path.name for path in clients.iterdir() if path.is_dir())
    if client_id not in known:
        raise ExportError(f"run {run.name!r} has no client {client_id!r}; it has {', '.join(known) or 'none'}")
    source = clients / client_id / "adapter"
    if not is_in_parts(source) and not all((source / name).is_file() for name in FILES):
        raise ExportError(f"client {client_id!r} has no personal model yet in {run} (it is saved after the last round)")
    try:
        about = json.loads((clients / client_id / "about.json").read_text())
    except (OSError, ValueError):
        about = {}
    return Personal(source, about)


# --------------------------------------------------------------------------------------------------------------- forms


def _peft(personal: Personal, folder: Path, say: Say) -> None:
    """What ``PeftModel.from_pretrained`` loads; where it :func:`is_in_parts`, each folder in it."""
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
    config = _config(personal)
    inner = [part for name in config.get("modules_to_save") or () for part in name.split(".")[:-1]]
    kind = KINDS.get(personal.task)
    config["task_type"] = None if kind is None or set(inner) & set(_PEFT_HEADS) else kind.peft_task
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _tokenizer(personal, folder, say)
    _card(personal, folder, "adapter")
    trained = personal.about.get("rank")
    if trained and config.get("r") != trained:
        say(
            f"rank {config.get('r')}: the clients trained rank {trained}, and this model is the sum of several "
            "adapters, which stack"
        )


def _merged(personal: Personal, folder: Path, say: Say) -> None:
    """The base model with the adapter added, in float32: rounding the sum to bfloat16 would change its answers."""
    import torch
    from peft import PeftModel

    from client_app.kinds import KINDS

    if is_in_parts(personal.folder) or personal.task not in KINDS:
        raise ExportError("this model cannot be merged: it is in parts, or its client did not say its one task")
    transformers: Any = importlib.import_module("transformers")
    heads: dict[str, Any] = {}
    kind = KINDS[personal.task]
    if kind.head:
        heads["num_labels"] = _labels_in(personal.folder)
    auto = getattr(transformers, kind.auto_model)
    transformers.utils.logging.disable_progress_bar()
    base = auto.from_pretrained(personal.base, dtype=torch.float32, local_files_only=True, **heads)
    model: Any = PeftModel.from_pretrained(base, str(personal.folder))
    model.merge_and_unload().save_pretrained(folder)
    _tokenizer(personal, folder, say)
    _card(personal, folder, "model, the adapter merged into its base")
    say("merged in float32; to save memory, load it with dtype=torch.bfloat16")


FORMS: Mapping[str, Callable[[Personal, Path, Say], None]] = {"peft": _peft, "merged": _merged}


def _config(personal: Personal) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((personal.folder / "adapter_config.json").read_text())
    return found


def _labels_in(folder: Path) -> int:
    """How many classes the saved head has."""
    from safetensors import safe_open

    heads = _heads(folder)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        rows = [file.get_slice(key).get_shape()[0] for key in file.keys() if any(f".{h}." in key for h in heads)]  # noqa: SIM118
    if not rows:
        raise ExportError(f"{folder} has no head")
    return int(rows[-1])


def _heads(folder: Path) -> list[str]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return list(config.get("modules_to_save") or [])


def _tokenizer(personal: Personal, folder: Path, say: Say) -> None:
    """The base model's tokenizer and processors, as their own library writes them."""
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


def _card(personal: Personal, folder: Path, what: str) -> None:
    """A model card in the form of the Hugging Face hub, and ``metrics.json``."""
    about = personal.about
    base = str(_config(personal).get("base_model_name_or_path", ""))
    lines = ["---", f"base_model: {json.dumps(base)}", "library_name: peft", "tags: [fedalloy, lora]", "---", ""]
    lines += [f"# Personal {what} of client {about.get('client', '?')}", ""]
    lines += [f"Trained with FedAlloy in run `{about.get('run', '?')}`, on base model `{base}`.", ""]
    if about.get("base_precision"):
        lines += [f"The base model's numbers were {about['base_precision']} while this was trained.", ""]
    if about.get("metrics"):
        lines += ["| split | metric | value |", "|---|---|---|"]
        for split, metrics in about["metrics"].items():
            lines += [f"| {split} | {name} | {value:.4f} |" for name, value in sorted(metrics.items())]
        (folder / "metrics.json").write_text(json.dumps(about["metrics"], indent=2) + "\n")
    (folder / "README.md").write_text("\n".join(lines) + "\n")
