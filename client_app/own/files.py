"""A client's own data and base model: read, divided, checked, reported, encoded."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.example import Example
from client_app.data.stored import StoredDataset
from client_app.data.targets import IGNORED
from client_app.guard.privacy import PrivacyError
from client_app.kinds import Kind, kind_of
from client_app.kinds.contract import TaskError
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import BaseModelError, FoundModel, find_model, first_line
from client_app.model.forward.padding import ALONE, find_padding, inputs_taken
from client_app.own.encoding import Encoder, load_encoder
from client_app.own.examples import columns_read, guess_kind, read_example
from client_app.own.reading.images import frames_in, read_image
from client_app.own.reading.readers import SPLIT_NAMES, SPLITS, Table, read_table, stamp
from client_app.own.reading.text_files import DataError
from client_app.own.stored_splits import encode_split
from client_app.settings import DataSettings, ModelSettings, Settings
from fedalloy_adapters.files.atomic_files import write_durably

MIN_EXAMPLES = 3
_LEAST_TOKENS = 0.5
"""A tokenizer with fewer tokens, as a share of the model's embeddings, is probably another model's."""


@dataclass
class Found:
    """What was found in the data: checked examples by split, the kind of task, and its labels in order."""

    kind: Kind
    splits: dict[str, list[Example]]
    labels: tuple[str, ...]
    source: str
    findings: list[str] = field(default_factory=list)


def load_own(settings: Settings) -> tuple[Base, ClientData]:
    """The base model that run-config names, and this client's data for it; writes ``data-<client-id>.txt``.

    Raises:
        DataError: the data are not usable; names file, line and column.
        BaseModelError: the base model is not here, or not for this task.
    """
    cache = settings.state_dir / ".cache"
    found = read_own(settings)
    chat = any(example.prompt is None for split in found.splits.values() for example in split if example.messages)
    model = find_model(settings.model.base_model, cache)
    encoder = load_encoder(
        model, found.kind, settings.model.max_length, chat=chat, prompt_template=settings.data.prompt_template
    )
    if found.kind.has_image:
        check_images(found, settings)
    splits, samples = _encoded(encoder, found, model, settings)
    base = _checked(load_base(model, found.kind, settings.model, found.labels, encoder.padding_id), samples)
    if found.kind.generative:
        _end_answers(base, encoder, samples["train"])
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
    )


def _encoded(
    encoder: Encoder, found: Found, model: FoundModel, settings: Settings
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The splits, and of each enough examples to check it by."""
    splits: dict[str, Dataset] = {}
    for name, examples in found.splits.items():
        if settings.task_arrival == "all":
            folder = settings.state_dir / ".cache" / "encoded"
            splits[name] = encode_split(encoder, examples, found.labels, model, folder)
        else:
            splits[name] = encoder.encode(examples, found.labels)
    samples = {name: split.sample() if isinstance(split, StoredDataset) else split for name, split in splits.items()}
    return splits, samples


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
    trained = [row for row, split in zip(table.rows, table.splits, strict=True) if split in (None, "train")]
    if not trained:
        raise DataError(f"{table.rows[0].place}: no row is in split 'train'")
    kind = kind_of(settings.model.task or guess_kind(trained[0].values, data))
    rows_read = len(table.rows)
    table = _without_unlabelled(table, kind, data)
    examples = [read_example(row, kind, data) for row in table.rows]
    read = columns_read(kind, data, {name for row in table.rows for name in row.values})
    shared = settings.model.label_names
    if kind.has_labels and not shared and settings.privacy.epsilon:
        raise PrivacyError(
            "dp.epsilon with classes that are found in the examples: how many there are, which the head's size tells, "
            "would depend on a single one; name them (labels)"
        )
    labels = _labels(examples, shared, kind) if kind.has_labels else ()
    splits = _divide(examples, table.splits, data)
    found = Found(kind, splits, labels, data.data_path, list(table.findings))
    kept = sum(len(split) for split in splits.values())
    if kept != rows_read:
        found.findings.append(f"{rows_read} rows were read, {kept} are examples")
    unread = sorted({name for row in table.rows for name in row.values} - read)
    if unread:
        found.findings.append(f"columns that are not read: {', '.join(map(repr, unread))}")
    return found


def label_weights(found: Found, train: Dataset, model: ModelSettings) -> Tensor | None:
    """How much each class counts in training ``[C]``, as the key ``label-weights`` says; None: all the same.

    Raises:
        DataError: the kind of task has no classes, or there is not a number for each.
    """
    if model.label_weights == "none":
        return None
    try:
        return found.kind.weigh(train, model.weights_asked, len(found.labels))
    except TaskError as error:
        raise DataError(f"{found.source}: {error}") from None


def _reference(found: Found, settings: Settings, *, chat: bool) -> tuple[Base, Dataset]:
    """The model that sketches are gradients of, and the training examples as it reads them."""
    model = find_model(settings.model.reference_model, settings.state_dir / ".cache")
    encoder = load_encoder(
        model, found.kind, settings.model.max_length, chat=chat, prompt_template=settings.data.prompt_template
    )
    # Nothing of it is adapted, and a quantised weight has no gradient.
    plain = replace(settings.model, target_modules="all-linear", quantization="none", gradient_checkpointing=False)
    base = load_base(model, found.kind, plain, found.labels, encoder.padding_id)
    examples = encoder.encode(found.splits["train"], found.labels)
    return _checked(base, {"train": examples}), examples


def _checked(base: Base, splits: Mapping[str, Dataset]) -> Base:
    """The base model with the padding that its architecture wants for these texts.

    A tokenizer with more tokens than the model would be an index error, and on a GPU the end of the process.
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
    note = "in this architecture texts of a batch, or their padding, affect each other: each text is computed alone"
    return replace(base, padding=found, notes=(*base.notes, note) if found == ALONE else base.notes)


def _end_answers(base: Base, encoder: Encoder, train: Dataset) -> None:
    """Let the model stop writing where the training texts end: at its own end token, and at the template's."""
    config: Any = base.model.generation_config
    known = config.eos_token_id
    ends = set(known if isinstance(known, list) else [known]) | {encoder.tokenizer.eos_token_id}
    last = {int(labels[labels != IGNORED][-1]) for labels in train.labels[:8]}
    special = {*encoder.tokenizer.all_special_ids, *encoder.tokenizer.added_tokens_decoder}
    if len(last) == 1 and last <= special:
        ends |= last
    config.eos_token_id = sorted(ends - {None}) or None


def _rows_of(base: Base) -> int | None:
    """How many tokens the model has embeddings of; None for models that do not say."""
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
    """Decode every image once; what is found is remembered until the files change."""
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
    """A report on the data for the client's owner only: it names labels."""
    lines = [f"data: {found.source}", f"task: {found.kind.name}"]
    for name, examples in found.splits.items():
        lines.append(f"{name}: {len(examples)} examples")
        if found.labels:
            counts = Counter(name for example in examples for name in found.kind.labels_of(example))
            lines.append("    " + ", ".join(f"{label}: {counts[label]}" for label in found.labels))
    return "\n".join([*lines, *(f"note: {note}" for note in notes)]) + "\n"


def notes_of(found: Found, encoder: Encoder) -> list[str]:
    """Findings in numbers only, because the server reads them. Call this after encoding, to count cut texts."""
    notes = list(found.findings)
    everything = [example for examples in found.splits.values() for example in examples]
    if encoder.truncated:
        notes.append(f"{encoder.truncated} of {len(everything)} texts were cut to {encoder.max_length} tokens")
    told = encoder.findings + encoder.chat.findings if encoder.chat else encoder.findings
    notes += [f"{count} {what}" for what, count in told.items()]
    copies = len(everything) - len({example.content for example in everything})
    if copies:
        notes.append(f"{copies} of {len(everything)} examples are copies of others")
    seen = {example.content for example in found.splits.get("train", [])}
    for name in ("validation", "test"):
        shared = sum(example.content in seen for example in found.splits.get(name, []))
        if shared:
            notes.append(f"{shared} examples of {name} are in train, too")
    if found.labels:
        trained = {name for example in found.splits["train"] for name in found.kind.labels_of(example)}
        missing = sum(label not in trained for label in found.labels)
        if missing:
            notes.append(f"{missing} of {len(found.labels)} labels have no training example")
    return notes


def _without_unlabelled(table: Table, kind: Kind, data: DataSettings) -> Table:
    """Without test and validation splits of which no row has a label: those of benchmarks, and of competitions.

    What takes their place comes from train, as where nothing is given.
    """
    columns = kind.unlabelled_by(data)
    train = [row for row, split in zip(table.rows, table.splits, strict=True) if split in (None, "train")]
    column = next((name for name in columns if name in train[0].values), "")
    values = {str(row.values.get(column)) for row in train}
    missing = {"None", "", *({"-1"} - values)}
    left_out, findings = set(), list(table.findings)
    for name in ("validation", "test"):
        rows = [row for row, split in zip(table.rows, table.splits, strict=True) if split == name]
        if column and rows and all(str(row.values.get(column)).strip() in missing for row in rows):
            left_out.add(name)
            findings.append(f"{len(rows)} rows of {name} have no {column!r} and are left out")
    kept = [number for number, split in enumerate(table.splits) if split not in left_out]
    return Table([table.rows[n] for n in kept], [table.splits[n] for n in kept], findings)


def _split_by_column(table: Table, column: str) -> Table:
    splits = []
    for row in table.rows:
        value = str(row.values.get(column, "")).strip().lower()
        if value not in SPLIT_NAMES:
            raise DataError(f"{row.place}, column {column!r}: {value!r}, expected train, validation or test")
        splits.append(SPLIT_NAMES[value])
    return replace(table, splits=splits)


def _labels(examples: Sequence[Example], shared: Sequence[str], kind: Kind) -> tuple[str, ...]:
    """Class names in order: those that all clients share, else this client's own (numbers by value, then names)."""
    for example in examples if shared else ():
        for label in kind.labels_of(example):
            if label in shared:
                continue
            close = difflib.get_close_matches(label, shared, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{example.place}: label {label!r} is not one of the labels of this run ({', '.join(shared)}){hint}"
            )
    if shared:
        return tuple(shared)
    names = {name for example in examples for name in kind.labels_of(example)}
    if len(names) < 2:
        only = f"the only label is {names.pop()!r}" if names else "there is no label"
        raise DataError(f"{examples[0].place}: {only}, expected at least two")
    return tuple(sorted(names, key=lambda name: (0, int(name), "") if _is_number(name) else (1, 0, name)))


def _is_number(name: str) -> bool:
    return name.lstrip("-").isdecimal() and name.isascii()


def _divide(
    examples: Sequence[Example], given: Sequence[str | None], settings: DataSettings
) -> dict[str, list[Example]]:
    """Examples by split, as given; what is not given is taken from train, the same examples whenever they are read."""
    if len(examples) < MIN_EXAMPLES:
        raise DataError(f"{examples[0].place}: {len(examples)} examples, expected at least {MIN_EXAMPLES}")
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for example, split in zip(examples, given, strict=True):
        splits[split or "train"].append(example)
    if not splits["train"]:
        raise DataError(f"{examples[0].place}: no example is in split 'train'")
    shares = dict(zip(SPLITS, settings.fractions, strict=True))
    ordered = sorted(splits["train"], key=_order)
    total = len(ordered)
    for name in ("test", "validation"):
        if splits[name] or not shares[name]:
            continue
        count = min(max(1, round(total * shares[name])), len(ordered) - 1)
        cut = len(ordered) - count
        while cut > 1 and ordered[cut].content == ordered[cut - 1].content:
            cut -= 1  # copies of one example stay together
        splits[name], ordered = ordered[cut:], ordered[:cut]
    chosen = {id(example) for example in ordered}
    splits["train"] = [example for example in splits["train"] if id(example) in chosen]
    return {name: found for name, found in splits.items() if found}


def _order(example: Example) -> bytes:
    return hashlib.sha256(example.content.encode()).digest()
