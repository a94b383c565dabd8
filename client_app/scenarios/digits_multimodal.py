"""Scenario ``digits-multimodal``: images of digits, sentences about numbers, and both, at clients with several tasks.

=============  ==============  =====================================================  ==========================
task           reads           example                                                answers
=============  ==============  =====================================================  ==========================
``digit``      image           an image                                               the site's code for it
``number``     text            "twice two"                                            the site's code for it
``compare``    image and text  an image, "more than four"                             yes or no
``caption``    image           an image                                               "seven , odd and large"
``answer``     text            "twice two"                                            "seven , odd and large"
=============  ==============  =====================================================  ==========================

Images are scikit-learn's, in the pools of ``digits``; sentences are made of twenty patterns. Clients belong to two
sites. One sees images upright and speaks English, the other sees them turned by a quarter and speaks German, and each
numbers five of the ten digits in its own way: both have the same task, but not the same solution. The base model is a
tiny FLAVA, pre-trained in seconds on public images (upright) and public sentences (of both languages) with the usual
numbering; it has no heads. No other client has the images of a client's training shard; its sentences are drawn from a
pool that clients of one language share. No client trains on anything that a client validates or tests on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client_app.data.dataset import Base, ClientData, Dataset
from client_app.data.targets import IGNORED
from client_app.kinds import mean_loss
from client_app.model.bases.multi_task import MultiTaskModel, TaskSpec, multi_task_base
from client_app.scenarios import ScenarioError, digits
from client_app.scenarios.vit import fingerprint_of, load_or_make, one_thread

WORDS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "de": ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
}
_SAYINGS = (
    ("the page says {a}", "auf der seite steht {a}"),
    ("{a} of them", "{a} davon"),
    ("write down {a}", "schreib {a} auf"),
    ("it was {a} again", "es war wieder {a}"),
    ("give me {a}", "gib mir {a}"),
    ("we counted {a}", "wir haben {a} gezählt"),
    ("number {a} please", "nummer {a} bitte"),
    ("the answer is {a}", "die antwort ist {a}"),
    ("{a} and no more", "{a} und nicht mehr"),
    ("only {a} were left", "nur {a} blieben übrig"),
    ("take bus {a}", "nimm den bus {a}"),
    ("room {a} on the left", "zimmer {a} auf der linken seite"),
    ("i said {a}", "ich sagte {a}"),
    ("press {a} now", "drücke jetzt {a}"),
    ("there are {a} here", "hier sind {a}"),
    ("{a} it is", "{a} soll es sein"),
)
PATTERNS: tuple[tuple[str, str, Callable[[int], float]], ...] = (
    *((english, german, lambda a: a) for english, german in _SAYINGS),
    ("the digit after {a}", "die ziffer nach {a}", lambda a: a + 1),
    ("the digit before {a}", "die ziffer vor {a}", lambda a: a - 1),
    ("twice {a}", "das doppelte von {a}", lambda a: 2 * a),
    ("half of {a}", "die hälfte von {a}", lambda a: a / 2),
)
"""Sentences in both languages, and their values: most name their number, four ask for one. Pools share no sentence."""
QUESTIONS = {"en": ("more than {a}", "less than {a}"), "de": ("mehr als {a}", "weniger als {a}")}
KINDS_OF_DIGITS = {"en": ("even", "odd", "and", "small", "large"), "de": ("gerade", "ungerade", "und", "klein", "groß")}
SENTENCE_POOLS = {"public": 0.3, "train": 0.35, "validation": 0.15, "test": 0.2}
GENERATED, MAX_NEW_TOKENS = 50, 7

TASKS = {
    "digit": ("image-classification", ("image",), "classify", 60),
    "number": ("text-classification", ("text",), "classify", 50),
    "compare": ("image-text-classification", ("image", "text"), "classify", 80),
    "caption": ("image-text-to-text", ("image", "text"), "write", 60),
    "answer": ("causal-lm", ("text",), "write", 50),
}
"""Kind, modalities, expert, and training examples of a client."""
TESTED = {"digit": 447, "compare": 300, "caption": 100}
"""The most images of a test split; there are few sentences anyway."""
Clients = Sequence[tuple[tuple[str, ...], int]]
CLIENTS: Clients = (
    (("digit",), 0),
    (("number",), 1),
    (("compare",), 0),
    (("caption",), 1),
    (("digit", "number"), 1),
    (("digit", "answer"), 0),
    (("compare", "caption"), 1),
    (("number", "answer"), 0),
)
"""Tasks and site of clients 0 to 7; later clients repeat them, each time at the other site."""


@dataclass(frozen=True)
class Site:
    """What clients of a site have in common."""

    language: str
    group: digits.Group


SITES = (Site("en", digits.GROUPS[0]), Site("de", digits.GROUPS[1]))
_USUAL = digits.Group("public", 0, False, tuple(range(digits.CLASSES)))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the base model, except the last bits of floating point."""

    name: str = "digits-flava"
    data: str = "pools 'public' of scenario digits and of its sentences"
    width: int = 48
    layers: int = 2
    heads: int = 4
    mlp: int = 96
    steps: int = 600
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0
    version: int = 2

    @property
    def fingerprint(self) -> str:
        """See :func:`fingerprint_of`; the sentences count, too."""
        sayings = [(english, german) for english, german, _ in PATTERNS]
        return fingerprint_of([asdict(self), WORDS, sayings, QUESTIONS, KINDS_OF_DIGITS])


RECIPE = Recipe()


class Vocabulary:
    """One token for each word that occurs in any sentence."""

    PAD, BEGIN, END = 0, 1, 2

    def __init__(self) -> None:
        texts = [text for table in (WORDS, QUESTIONS, KINDS_OF_DIGITS) for row in table.values() for text in row]
        texts += [text for english, german, _ in PATTERNS for text in (english, german)]
        words = sorted({word for text in texts for word in text.split() if "{" not in word} | {","})
        self.words = ["[PAD]", "[BEGIN]", "[END]", *words]
        self.ids = {word: number for number, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's words."""
        return [self.ids[word] for word in text.split()]

    def decode(self, tokens: Tensor) -> str:
        """The words up to the end token."""
        return words_until_end(self.words, tokens)


def words_until_end(words: Sequence[str], tokens: Tensor) -> str:
    """The words with these numbers, without padding and beginning."""
    found: list[str] = []
    for token in tokens.tolist():
        if token == Vocabulary.END:
            break
        found += [words[token]] if token > Vocabulary.END else []
    return " ".join(found)


VOCABULARY = Vocabulary()


def load_client(partition_id: int, num_partitions: int, seed: int, clients: Clients = ()) -> ClientData:
    """One client's tasks and their splits.

    Args:
        partition_id: this client, from 0.
        num_partitions: how many clients there are, at most :data:`digits.MAX_CLIENTS`.
        seed: decides which examples each client trains on.
        clients: tasks and sites; without, :data:`CLIENTS`.

    Raises:
        ScenarioError: there is no such client, or there are too many.
    """
    if not 1 <= num_partitions <= digits.MAX_CLIENTS or not 0 <= partition_id < num_partitions:
        raise ScenarioError(
            f"scenario 'digits-multimodal' is for 1 to {digits.MAX_CLIENTS} clients, got partition-id = {partition_id} "
            f"and num-partitions = {num_partitions}"
        )
    tasks, site = client_of(partition_id, clients)
    of_others = [client_of(client, clients)[0] for client in range(num_partitions)]
    return ClientData.of_tasks([_task(task, site, partition_id, of_others, seed) for task in tasks])


def client_of(partition_id: int, clients: Clients = ()) -> tuple[tuple[str, ...], Site]:
    """Tasks and site of a client."""
    table = clients or CLIENTS
    turn, place = divmod(partition_id, len(table))
    tasks, site = table[place]
    return tasks, SITES[(site + turn) % len(SITES)]


def spec_of(task: str) -> TaskSpec:
    """The declaration of a task."""
    kind, modalities, expert, _ = TASKS[task]
    outputs = {"digit": digits.CLASSES, "number": digits.CLASSES, "compare": 2}.get(task, len(VOCABULARY.words))
    return TaskSpec(task, kind, modalities, expert, outputs)


def load_base(partition_id: int, cache_dir: Path, clients: Clients = ()) -> Base:
    """A client's base model: the same FLAVA for all, with the groups of the client's own tasks."""
    backbone = load_or_make(RECIPE, cache_dir, lambda: _build(RECIPE), lambda: _pretrain(RECIPE))
    specs = [spec_of(task) for task in client_of(partition_id, clients)[0]]
    return multi_task_base(RECIPE.name, RECIPE.fingerprint, backbone, specs, (Vocabulary.END, Vocabulary.PAD))


def sentences(language: str, pool: str) -> list[tuple[str, int]]:
    """Sentences of a pool with their values, in an order that is the same for every seed."""
    found = []
    for english, german, result in PATTERNS:
        for a, word in enumerate(WORDS[language]):
            if (value := result(a)) in range(10):
                found.append(({"en": english, "de": german}[language].format(a=word), int(value)))
    order = np.random.default_rng(digits.POOL_SEED).permutation(len(found))
    bounds = np.floor(np.cumsum(list(SENTENCE_POOLS.values()))[:-1] * len(found)).astype(int)
    chosen = dict(zip(SENTENCE_POOLS, np.split(order, bounds), strict=True))[pool]
    return [found[number] for number in chosen]


def describe(value: int, language: str) -> str:
    """A digit's caption, which is also the answer for it."""
    even, odd, and_, small, large = KINDS_OF_DIGITS[language]
    return f"{WORDS[language][value]} , {odd if value % 2 else even} {and_} {large if value > 4 else small}"


def _task(task: str, site: Site, partition_id: int, tasks: Sequence[Sequence[str]], seed: int) -> ClientData:
    kind, modalities, _, count = TASKS[task]
    chance = np.random.default_rng((digits.POOL_SEED, seed, partition_id, list(TASKS).index(task)))
    splits = {}
    for split in ("train", "validation", "test"):
        if "image" in modalities:
            numbers = digits.pools()[split][: TESTED[task]]
            if split == "train":
                numbers = _shard(task, partition_id, tasks, seed)
            splits[split] = _with_images(task, numbers, site, chance if split == "train" else None)
        else:
            pool = sentences(site.language, split)
            if split == "train":
                pool = [pool[number] for number in chance.permutation(len(pool))[:count]]
            splits[split] = _with_sentences(task, pool, site)
    writes = task in ("caption", "answer")
    return ClientData(
        task,
        kind,
        splits,
        decode=VOCABULARY.decode if writes else None,
        generate_examples=GENERATED if writes else 0,
        max_new_tokens=MAX_NEW_TOKENS,
        modalities=modalities,
        groups=spec_of(task).groups,
    )


def _shard(task: str, partition_id: int, tasks: Sequence[Sequence[str]], seed: int) -> NDArray[np.int64]:
    """Image numbers for a client's task. No other client has them, until the pool is used up and starts again."""
    wanted = [
        (client, name, TASKS[name][3])
        for client, names in enumerate(tasks)
        for name in names
        if "image" in TASKS[name][1]
    ]
    pool = np.random.default_rng((digits.POOL_SEED, seed)).permutation(digits.pools()["train"])
    endless = np.resize(pool, sum(count for _, _, count in wanted))
    start = 0
    for client, name, count in wanted:
        if (client, name) == (partition_id, task):
            return endless[start : start + count]
        start += count
    raise ScenarioError(f"client {partition_id} has no task {task!r} with images")


def _with_images(task: str, numbers: NDArray[np.int64], site: Site, chance: np.random.Generator | None) -> Dataset:
    seen, usual = digits.view(numbers, site.group), digits.view(numbers, _USUAL).labels.tolist()
    images = dict(seen.inputs)
    if task == "digit":
        return Dataset(images, seen.labels, "image-classification")
    if task == "caption":
        tokens, labels = _texts([("", describe(value, site.language)) for value in usual])
        return Dataset(images | tokens, labels, "image-text-to-text")
    chance = chance or np.random.default_rng((digits.POOL_SEED, len(numbers)))
    prompts, answers = [], []
    for value in usual:
        which, other = int(chance.integers(2)), int(chance.integers(1, 9))
        prompts.append((QUESTIONS[site.language][which].format(a=WORDS[site.language][other]), ""))
        answers.append(int(value < other if which else value > other))
    tokens, _ = _texts(prompts)
    return Dataset(images | tokens, torch.tensor(answers), "image-text-classification")


def _with_sentences(task: str, pool: Sequence[tuple[str, int]], site: Site) -> Dataset:
    if task == "number":
        tokens, _ = _texts([(text, "") for text, _ in pool])
        return Dataset(tokens, torch.tensor([site.group.codes[value] for _, value in pool]), "text-classification")
    tokens, labels = _texts([(text, describe(value, site.language)) for text, value in pool])
    return Dataset(tokens, labels, "causal-lm")


def _texts(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
    return texts_as_tensors(VOCABULARY.encode, pairs)


def texts_as_tensors(
    encode: Callable[[str], list[int]], pairs: Sequence[tuple[str, str]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts and the words to write after them (maybe none), padded; labels are those words and an end token."""
    rows = []
    for prompt, written in pairs:
        before = [Vocabulary.BEGIN, *encode(prompt)]
        after = [*encode(written), Vocabulary.END] if written else []
        rows.append((before + after, [IGNORED] * len(before) + after))
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [Vocabulary.PAD] * (width - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([found + [IGNORED] * (width - len(found)) for _, found in rows])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows])
    return {"input_ids": ids, "attention_mask": mask}, labels


def _build(recipe: Recipe) -> nn.Module:
    from transformers import FlavaConfig, FlavaModel

    common: dict[str, Any] = {
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "intermediate_size": recipe.mlp,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.12,  # suits so small a width; see scenario digits
    }
    config = FlavaConfig(
        image_config={**common, "image_size": 8, "patch_size": 2, "num_channels": 1},
        text_config={**common, "vocab_size": len(VOCABULARY.words), "max_position_embeddings": 32, "pad_token_id": 0},
        multimodal_config=common,
        hidden_size=recipe.width,
        projection_dim=recipe.width,
        init_codebook=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return FlavaModel(config)


def _pretrain(recipe: Recipe) -> nn.Module:
    public = [(task, _public(task, site)) for task in TASKS for site in SITES]
    return pretrain_together(_build, recipe, [spec_of(task) for task in TASKS], public)


def pretrain_together(
    build: Callable[[Any], nn.Module], recipe: Any, specs: Sequence[TaskSpec], public: Sequence[tuple[str, Dataset]]
) -> nn.Module:
    """Train all tasks in turn on public data, with heads that are thrown away; parts that ``build`` froze stay."""
    backbone = build(recipe)  # the next line changes it in place
    model = MultiTaskModel(backbone, specs).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, max(recipe.steps, 2), pct_start=0.1)
    generator = torch.Generator().manual_seed(recipe.seed)
    with one_thread():
        for step in range(recipe.steps):
            task, data = public[step % len(public)]
            batch = data.batch(torch.randint(len(data), (recipe.batch,), generator=generator))
            loss = mean_loss(batch.kind, model(task=task, **batch.inputs).logits, batch.labels)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
    plain = build(recipe)
    plain.load_state_dict({name.replace(".base.", "."): value for name, value in backbone.state_dict().items()})
    return plain


def _public(task: str, site: Site) -> Dataset:
    usual = Site(site.language, _USUAL)
    if "image" in TASKS[task][1]:
        return _with_images(task, digits.pools()["public"], usual, None)
    return _with_sentences(task, sentences(site.language, "public"), usual)
