"""A client's own data for several tasks: a TOML file with a table for each, over one base model.

::

    [species]
    task = "image-classification"
    data-path = "species.csv"
    labels = "oak,ash,elm"

    [report]
    task = "image-text-to-text"
    data-path = "reports.jsonl"
    expert = "write"

``data-path`` in node-config names this file; paths in it are relative to it. A table's name is the task's: clients
whose tasks have one name share its head, so they must agree on its ``labels``. ``expert`` (by default ``classify`` or
``write``) says which tasks share an expert's groups. All other keys of a client's data (columns, fractions) may be in a
table, too.

The base model is any that reads what the tasks have. A language model, with a tower for images (LLaVA, Qwen-VL) or
without one, writes texts and classifies them; an encoder (BERT, ViT, ViLT) classifies. A FLAVA does both, with encoders
of their own for images and texts: a folder, or a hub id such as ``facebook/flava-full@refs/pr/5``, the revision that
has safetensors.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from client_app.data.dataset import Base, ClientData
from client_app.kinds import Kind
from client_app.model.bases.base_models import load_backbone, load_flava
from client_app.model.bases.model_folders import FoundModel, find_model, load_config
from client_app.model.bases.multi_task import RoutedModel, TaskSpec, multi_task_base
from client_app.model.bases.multi_task_any import any_multi_task_base, require_answers
from client_app.own.encoding import Encoder, load_encoder
from client_app.own.files import check_images, end_answers, label_weights, notes_of, read_own
from client_app.own.reading.readers import stamp
from client_app.own.reading.text_files import DataError
from client_app.settings import DataSettings, ModelSettings, Settings

_MODALITIES = {
    "text-classification": ("text",),
    "image-classification": ("image",),
    "causal-lm": ("text",),
    "image-text-classification": ("image", "text"),
    "image-text-to-text": ("image", "text"),
}


_MODEL_KEYS = ("task", "labels", "label_weights", "max_length", "max_new_tokens", "generate_examples")


def is_task_file(data_path: str) -> bool:
    """Whether node-config's ``data-path`` is a file of several tasks."""
    return data_path.endswith(".toml")


def stamp_of(settings: Settings) -> object:
    """A value that changes when the client's data files do."""
    path = Path(settings.data.data_path).expanduser()
    if not is_task_file(settings.data.data_path):
        return stamp(settings.data.data_path)
    return [stamp(str(path)), *(stamp(_own(settings, path, n, t).data.data_path) for n, t in _tables(path).items())]


@dataclass(frozen=True)
class _Task:
    """One task as it was read: its declaration, its data, and what turned these into tensors."""

    spec: TaskSpec
    kind: Kind
    data: ClientData
    encoder: Encoder


def load_tasks(settings: Settings) -> tuple[Base, ClientData]:
    """The model that run-config names, and the client's tasks.

    Raises:
        DataError: the file or a task's data are not usable; names the task.
        BaseModelError: the base model is not here, or does not read what a task has.
    """
    path = Path(settings.data.data_path).expanduser()
    found = find_model(settings.model.base_model, settings.state_dir / ".cache")
    is_flava = load_config(found).model_type == "flava"
    tasks = [_read(settings, found, path, *item, is_flava=is_flava) for item in _tables(path).items()]
    specs = [task.spec for task in tasks]
    writers = [task.encoder for task in tasks if task.kind.generative]
    if is_flava:
        ends = (int(writers[0].tokenizer.eos_token_id), int(writers[0].padding_id or 0)) if writers else (0, 0)
        base = multi_task_base(found.name, found.fingerprint, load_flava(found, settings.model), specs, ends)
    else:
        padding = next((task.encoder.padding_id for task in tasks if task.kind.has_text), None)
        backbone = load_backbone(found, [task.kind for task in tasks], settings.model, padding)
        base = any_multi_task_base(found, backbone, specs)
        require_answers(base, [task.data for task in tasks])
        for task in tasks:
            if task.kind.generative:
                end_answers(backbone, task.encoder, task.data.splits["train"])
    assert isinstance(base.model, RoutedModel)
    groups = base.model.groups
    return base, ClientData.of_tasks([replace(task.data, groups=groups[task.spec.name]) for task in tasks])


def _read(
    settings: Settings, found: FoundModel, path: Path, name: str, table: dict[str, Any], *, is_flava: bool
) -> _Task:
    """One table's task."""
    own = _own(settings, path, name, table)
    read = read_own(own)
    if read.kind.name not in _MODALITIES:
        raise DataError(
            f"{path}, task {name!r}: with several tasks there are {', '.join(_MODALITIES)}, found {read.kind.name!r}"
        )
    writes = read.kind.generative
    if not writes and not own.model.label_names:
        raise DataError(f"{path}, task {name!r}: no labels, on which all owners of its head must agree")
    if read.kind.has_image:
        check_images(read, own)
    chat = any(split.chats for split in read.splits.values())
    encoder = load_encoder(found, read.kind, own.model.max_length, chat=chat, prompt_template=own.data.prompt_template)
    if writes and is_flava:  # BERT's tokenizers know no spaces, and end a text with a separator
        encoder.between = " "
        encoder.tokenizer.eos_token = encoder.tokenizer.eos_token or encoder.tokenizer.sep_token
    expert = str(table.get("expert", "write" if writes else "classify"))
    outputs = len(encoder.tokenizer) if writes else len(read.labels)
    spec = TaskSpec(name, read.kind.name, _MODALITIES[read.kind.name], expert, outputs)
    splits = {split: encoder.encode(examples, read.labels) for split, examples in read.splits.items()}
    data = ClientData(
        task=name,
        kind=read.kind.name,
        splits=splits,
        metrics=read.kind.scores,
        decode=encoder.decode if writes else None,
        generate_examples=own.model.generate_examples,
        max_new_tokens=own.model.max_new_tokens,
        notes=tuple(notes_of(read, encoder)),
        modalities=spec.modalities,
        labels=read.labels,
        shared_labels=read.labels,
        label_weights=label_weights(read, splits["train"], own.model),
    )
    return _Task(spec, read.kind, data, encoder)


def _tables(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    tables = {name: table for name, table in found.items() if isinstance(table, dict)}
    if not tables or len(tables) != len(found):
        raise DataError(
            f"{path}: expected a table for each task and nothing else, found {', '.join(found) or 'nothing'}"
        )
    return tables


def _own(settings: Settings, path: Path, name: str, table: dict[str, Any]) -> Settings:
    """The settings of one task: the client's, changed by the task's table."""
    given = {key.replace("-", "_"): value for key, value in table.items()}
    data = {key: given.pop(key) for key in [field.name for field in fields(DataSettings)] if key in given}
    model = {key: given.pop(key) for key in _MODEL_KEYS if key in given}
    given.pop("expert", None)
    if given:
        known = ", ".join(key.replace("_", "-") for key in (*_MODEL_KEYS, "expert", "data_path"))
        raise DataError(f"{path}, task {name!r}: unknown key {next(iter(given))!r}, expected some of {known}, columns")
    if not data.get("data_path"):
        raise DataError(f"{path}, task {name!r}: no data-path")
    data["data_path"] = str((path.parent / str(data["data_path"])).resolve())
    try:
        own_model: ModelSettings = replace(settings.model, **({"task": "", "labels": ""} | model))
        return replace(settings, model=own_model, data=replace(settings.data, **data))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, task {name!r}: {error}") from None
