"""A client's own data and base model: read, divided, checked, reported, encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.targets import IGNORED
from client_app.guard.privacy import PrivacyError
from client_app.kinds import Kind, kind_of
from client_app.kinds.contract import TaskError
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import BaseModelError, FoundModel, find_model, first_line
from client_app.model.forward.padding import ALONE, find_padding, inputs_taken
from client_app.own.checked import Checked, copies_among
from client_app.own.encoding import Encoder, load_encoder
from client_app.own.examples import columns_read, guess_kind
from client_app.own.labels import first_trained, labels_in_order, most_telling, remarks_on, without_unlabelled
from client_app.own.reading.images import frames_in, read_image
from client_app.own.reading.readers import SPLIT_NAMES, SPLITS, Table, read_table, stamp
from client_app.own.reading.text_files import DataError
from client_app.own.stored_splits import encode_split
from client_app.settings import DataSettings, ModelSettings, Settings
from fedalloy_adapters.files.atomic_files import write_durably

MIN_EXAMPLES = 3
_LEAST_TOKENS = 0.5
"""If a tokenizer has a smaller share of tokens than this, compared with the model's embeddings, it is probably not the
model's."""


@dataclass
class Found:
    """What was found in the data: checked examples by split, the kind of task, and its labels in order."""

    kind: Kind
    splits: dict[str, Checked]
    labels: tuple[str, ...]
    source: str
    findings: list[str] = field(default_factory=list)


def load_own(settings: Settings) -> tuple[Base, ClientData]:
    """The base model that run-config names, and this client's data; also writes ``data-<client-id>.txt``.

    Raises:
        DataError: the data are not usable; names file, line and column.
        BaseModelError: the base model is not here, or is not for this task.
    """
    cache = settings.state_dir / ".cache"
    found = read_own(settings)
    chat = any(split.chats for split in found.splits.values())
    model = find_model(settings.model.base_model, cache)
    encoder = load_encoder(
        model, found.kind, settings.model.max_length, chat=chat, prompt_template=settings.data.prompt_template
    )
    if found.kind.has_image:
        check_images(found, settings)
    splits, samples = _encoded(encoder, found, model, settings)
    base = _checked(load_base(model, found.kind, settings.model, found.labels, encoder.padding_id), samples)
    if found.kind.generative:
        end_answers(base.model, encoder, samples["train"])
    notes = [*base.notes, *encoder.remarks, *tokenizer_notes(encoder, base), *notes_of(found, encoder)]
    for_reference: dict[str, Dataset] = {}
    if settings.model.reference_model:
        reference, for_reference["train"] = _reference(found, settings, chat=chat)
        base = replace(base, reference=reference)
    write_durably(settings.state_dir / f"data-{settings.client_id}.txt", report(found, notes).encode())
    return base, ClientData(
        task=found.kind.name,
        kind=found.kind.name,
        splits=splits,
        metrics=found.kind.scores,
        decode=encoder.decode if found.kind.has_text else None,
        generate_examples=settings.model.generate_examples if found.kind.generative else 0,
        max_new_tokens=settings.model.max_new_tokens,
        notes=tuple(notes),
        for_reference=for_reference,
        labels=found.labels,
        shared_labels=settings.model.label_names if found.labels else (),
        label_weights=label_weights(found, splits["train"], settings.model),
        streams=found.splits["train"].numbered(settings.data.task_column) if settings.data.task_column else None,
    )


def _encoded(
    encoder: Encoder, found: Found, model: FoundModel, settings: Settings
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The splits, and enough examples of each to check it with."""
    splits: dict[str, Dataset] = {}
    for name, examples in found.splits.items():
        if settings.task_arrival == "all":
            folder = settings.state_dir / ".cache" / "encoded"
            splits[name] = encode_split(encoder, examples, found.labels, model, folder)
        else:
            splits[name] = encoder.encode(list(examples), found.labels)
    return splits, {name: split.sample() for name, split in splits.items()}


def read_own(settings: Settings) -> Found:
    """The client's examples, checked and divided, without any model.

    Raises:
        DataError: see :func:`load_own`.
    """
    data = settings.data
    table = read_table(data.data_path, data.data_config, settings.state_dir / ".cache" / "datasets")
    if data.split_column:
        table = _split_by_column(table, data.split_column)
    if data.partitioner:
        from client_app.own.reading.partitions import partition

        table = partition(table, data, settings.partition_id, settings.num_partitions)
    first = first_trained(table)
    if first is None:
        raise DataError(f"{table.rows[0].place}: no row is in split 'train'")
    kind = kind_of(settings.model.task or guess_kind(most_telling(table, first, settings).values, data))
    rows_read = len(table.rows)
    table = without_unlabelled(table, first, kind, data)
    examples = Checked.of(table.rows, kind, data)
    read = columns_read(kind, data, examples.columns)
    shared = settings.model.label_names
    if kind.has_labels and not shared and settings.privacy.epsilon:
        raise PrivacyError(
            "dp.epsilon with classes that are found in the examples: how many there are, which the head's size tells, "
            "would depend on a single one; name them (labels)"
        )
    named = shared or kind.labels_named(data)
    labels = labels_in_order(examples, named, asked=bool(settings.model.task)) if kind.has_labels else ()
    splits = _divide(examples, table.splits, data)
    found = Found(kind, splits, labels, data.data_path, list(table.findings))
    kept = sum(len(split) for split in splits.values())
    if kept != rows_read:
        found.findings.append(f"{rows_read} rows were read, {kept} are examples")
    found.findings += remarks_on(labels, examples.counts())
    unread = sorted(examples.columns - read)
    if unread:
        found.findings.append(f"columns that are not read: {', '.join(map(repr, unread))}")
    return found


def label_weights(found: Found, train: Dataset, model: ModelSettings) -> Tensor | None:
    """How much each class counts in training ``[C]``, as the key ``label-weights`` says; None: all the same.

    Raises:
        DataError: the kind of task has no classes, or ``label-weights`` has no number for each.
    """
    if model.label_weights == "none":
        return None
    try:
        return found.kind.weigh(train, model.weights_asked, len(found.labels))
    except TaskError as error:
        raise DataError(f"{found.source}: {error}") from None


def _reference(found: Found, settings: Settings, *, chat: bool) -> tuple[Base, Dataset]:
    """The model whose gradients make the sketches, and the training examples as it reads them."""
    model = find_model(settings.model.reference_model, settings.state_dir / ".cache")
    encoder = load_encoder(
        model, found.kind, settings.model.max_length, chat=chat, prompt_template=settings.data.prompt_template
    )
    # No part of it is adapted, and a quantised weight would have no gradient.
    plain = replace(settings.model, target_modules="all-linear", quantization="none", gradient_checkpointing=False)
    base = load_base(model, found.kind, plain, found.labels, encoder.padding_id)
    examples = encoder.encode(list(found.splits["train"]), found.labels)
    return _checked(base, {"train": examples}), examples


def _checked(base: Base, splits: Mapping[str, Dataset]) -> Base:
    """The base model with the padding that its architecture needs for these texts.

    If a tokenizer has more tokens than the model, that is an index error, and on a GPU it ends the process.
    """
    rows, train = _rows_of(base), splits["train"]
    kind = kind_of(train.kind)
    for ids in [ids for split in splits.values() for ids in kind.token_ids(split)]:
        if rows is not None and int(ids.max()) >= rows:
            raise BaseModelError(
                f"base-model {base.name!r}: its tokenizer gives token {int(ids.max())}, but it has embeddings of "
                f"{rows} tokens only"
            )
    parameter = next(base.model.parameters())
    probe = kind.probe(train)
    if probe is None:
        return base

    def forward(inputs: Mapping[str, Tensor]) -> Tensor:
        return kind.read_output(base.model(**inputs_taken(base.model, inputs)), inputs).float()

    inputs = {name: tensor.to(parameter.device) for name, tensor in probe.items()}
    tolerance = 5e-2 if parameter.dtype is torch.bfloat16 else 1e-3
    try:
        with torch.no_grad():
            forward({name: tensor[:1] for name, tensor in inputs.items()})
        padding_id = getattr(base.model.config, "pad_token_id", None) or 0
        found = find_padding(forward, inputs, tolerance, per_token=kind.per_token, padding_id=padding_id)
    except (ValueError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"base-model {base.name!r} does not answer as the task {kind.name!r} needs it: {first_line(error)}"
        ) from None
    note = "in this architecture, texts of a batch or their padding affect each other: each text is computed alone"
    return replace(base, padding=found, notes=(*base.notes, note) if found == ALONE else base.notes)


def end_answers(model: Any, encoder: Encoder, train: Dataset) -> None:
    """Let the model stop writing where the training texts end: at its own end token, and at the template's."""
    config: Any = model.generation_config
    known = config.eos_token_id
    ends = set(known if isinstance(known, list) else [known]) | {encoder.tokenizer.eos_token_id}
    last = {int(labels[labels != IGNORED][-1]) for labels in train.labels[:8]}
    special = {*encoder.tokenizer.all_special_ids, *encoder.tokenizer.added_tokens_decoder}
    if len(last) == 1 and last <= special:
        ends |= last
    config.eos_token_id = sorted(ends - {None}) or None


def _rows_of(base: Base) -> int | None:
    """How many tokens the model can embed; None for models that do not say."""
    try:
        embeddings: Any = base.model.get_input_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        return None
    return getattr(embeddings, "num_embeddings", None)


def tokenizer_notes(encoder: Encoder, base: Base) -> list[str]:
    """Signs that a tokenizer is not the model's."""
    tokenizer, rows, notes = encoder.tokenizer, _rows_of(base), []
    if tokenizer is None or rows is None:
        return []
    if len(tokenizer) > rows or len(tokenizer) < _LEAST_TOKENS * rows:
        notes.append(f"the tokenizer has {len(tokenizer)} tokens, the model embeddings of {rows}: are they a pair?")
    config = base.model.config.get_text_config()  # type: ignore[union-attr, operator]
    for name in ("bos_token_id", "eos_token_id"):
        own, known = getattr(tokenizer, name, None), getattr(config, name, None)
        if own is not None and known is not None and own not in (known if isinstance(known, list) else [known]):
            notes.append(f"{name} is {own} for the tokenizer, {known} in the model's configuration")
    return notes


def check_images(found: Found, settings: Settings) -> None:
    """Decode every image once; the result is remembered until the files change."""
    key = hashlib.sha256(repr((settings.data, stamp(settings.data.data_path))).encode()).hexdigest()[:32]
    marker = settings.state_dir / ".cache" / f"images-{key}.checked"
    try:
        several = int(marker.read_text() or 0)
    except (OSError, ValueError):
        several = 0
        for examples in found.splits.values():
            for example in examples:
                for image in example.images:
                    read_image(image, example.place)
                    several += frames_in(image) > 1
        write_durably(marker, str(several).encode())
    if several:
        found.findings.append(f"{several} images have several frames; only the first frame of each is read")


def report(found: Found, notes: Sequence[str]) -> str:
    """A report on the data, for the client's owner only, because it names labels."""
    lines = [f"data: {found.source}", f"task: {found.kind.name}"]
    for name, examples in found.splits.items():
        lines.append(f"{name}: {len(examples)} examples")
        if found.labels:
            counts = examples.counts()
            lines.append("    " + ", ".join(f"{label}: {counts.get(label, 0)}" for label in found.labels))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


def notes_of(found: Found, encoder: Encoder) -> list[str]:
    """Findings in numbers only, because the server reads them. Call this after encoding, to count cut texts."""
    notes, everything = list(found.findings), sum(map(len, found.splits.values()))
    if encoder.truncated:
        notes.append(f"{encoder.truncated} of {everything} texts were cut to {encoder.max_length} tokens")
    told = encoder.findings + encoder.chat.findings if encoder.chat else encoder.findings
    notes += [f"{count} {what}" for what, count in told.items()]
    copies = copies_among(found.splits.values())
    if copies:
        notes.append(f"{copies} of {everything} examples are copies of others")
    for name in ("validation", "test"):
        shared = found.splits[name].shared_with(found.splits["train"]) if name in found.splits else 0
        if shared:
            notes.append(f"{shared} examples of {name} are in train, too")
    if found.labels:
        trained = found.splits["train"].counts()
        missing = sum(not trained.get(label, 0) for label in found.labels)
        if missing:
            notes.append(f"{missing} of {len(found.labels)} labels have no training example")
    return notes


def _split_by_column(table: Table, column: str) -> Table:
    splits = []
    for row in table.rows:
        value = str(row.values.get(column, "")).strip().lower()
        if value not in SPLIT_NAMES:
            raise DataError(f"{row.place}, column {column!r}: {value!r}, expected train, validation or test")
        splits.append(SPLIT_NAMES[value])
    return replace(table, splits=splits)


def _divide(examples: Checked, given: Sequence[str | None], settings: DataSettings) -> dict[str, Checked]:
    """Examples by split, as given; a split that is not given is taken from train, always with the same examples."""
    if len(examples) < MIN_EXAMPLES:
        raise DataError(f"{examples[0].place}: {len(examples)} examples, expected at least {MIN_EXAMPLES}")
    told = np.array([SPLITS.index(split or "train") for split in given])
    splits = {name: np.flatnonzero(told == number) for number, name in enumerate(SPLITS)}
    if not len(splits["train"]):
        raise DataError(f"{examples[0].place}: no example is in split 'train'")
    shares = dict(zip(SPLITS, settings.fractions, strict=True))
    ordered = splits["train"][np.argsort(examples.digests[splits["train"]], kind="stable")]
    total = len(ordered)
    for name in ("test", "validation"):
        if len(splits[name]) or not shares[name]:
            continue
        count = min(max(1, round(total * shares[name])), len(ordered) - 1)
        cut = len(ordered) - count
        while cut > 1 and examples.digests[ordered[cut]] == examples.digests[ordered[cut - 1]]:
            cut -= 1  # copies of one example stay together
        splits[name], ordered = ordered[cut:], ordered[:cut]
    splits["train"] = np.sort(ordered)
    return {name: examples.subset(chosen) for name, chosen in splits.items() if len(chosen)}
