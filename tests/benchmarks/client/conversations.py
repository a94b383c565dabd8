"""Ids and labels of conversations beside those of TRL's SFTTrainer, by families of chat templates and of tokenizers.

    python -m tests.benchmarks.client.conversations [--families bytes,sentencepiece,unigram] [--only chatml]

Needs TRL (``make benchmarks``). The forms are those of :mod:`tests.toys.known_templates`, written after known families,
and the templates that come with TRL itself, but for those that take images. Each conversation goes through both sides
twice: as ``messages`` through a template with ``{% generation %}`` markers (TRL: ``assistant_only_loss``), and as lists
``prompt`` and ``completion`` through the template as it is (TRL: ``completion_only_loss``). TRL also learns what a
template writes after the end of an answer, mostly a line break, and a prompt's last tokens where these are others
before an answer; a client does not. Where that is all the difference, the table shows what it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from client_app.data.targets import IGNORED
from client_app.kinds import kind_of
from client_app.model.bases.model_folders import find_model
from client_app.own.encoding import load_encoder
from client_app.own.examples import read_example
from client_app.own.reading.text_files import DataError, Row
from client_app.settings import DataSettings
from examples.tiny_models import llama_config
from tests.toys.chat_templates import FAMILIES
from tests.toys.known_templates import FORMS, MARKS

Turns = list[dict[str, str]]
Ids = tuple[list[int], list[int]]
"""Ids and labels of one conversation."""

ASKED = {"role": "user", "content": "What is two plus two?"}
SHORT: Turns = [ASKED, {"role": "assistant", "content": "The answer is four."}]
LONG: Turns = [*SHORT, {"role": "user", "content": "Why?\n\n* a\n* b"}, {"role": "assistant", "content": "Because."}]
BLANK: Turns = [
    {"role": "user", "content": " why ?"},
    {"role": "assistant", "content": "\u00e9t\u00e9 \u4f60\u597d {x}"},
]
SYSTEM: Turns = [{"role": "system", "content": "Be brief."}, *LONG]


def of_trl(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, marked: bool) -> list[Ids]:
    """What TRL trains on."""
    import datasets
    import trl

    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            folder, assistant_only_loss=marked, max_length=None, use_cpu=True, report_to="none", disable_tqdm=True
        )
        data = datasets.Dataset.from_list(list(rows))
        found = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train_dataset
        return [(list(row["input_ids"]), list(row["labels"])) for row in found]


def of_client(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Ids]:
    """What a client trains on, with the model in a folder."""
    kind, found = kind_of("causal-lm"), []
    encoder = load_encoder(find_model(str(folder), folder), kind, 10**6, chat=True)
    for number, row in enumerate(rows):
        example = read_example(Row(dict(row), f"row {number}", Path()), kind, DataSettings())
        split = encoder.encode([example], ())
        found.append((split.inputs["input_ids"][0].tolist(), split.labels[0].tolist()))
    return found


def compared(ours: Sequence[Ids], theirs: Sequence[Ids], tokenizer: Any) -> str:
    """One cell: ids and labels equal, or what TRL learns behind the end of an answer, or what is wrong."""
    more = set()
    for (ids, labels), (other_ids, other) in zip(ours, theirs, strict=True):
        if ids != other_ids:
            return "**other ids**"
        differ = [place for place, (one, two) in enumerate(zip(labels, other, strict=True)) if one != two]
        told = tokenizer.decode([ids[place] for place in differ]).replace("|", "\\|")
        if any(labels[place] != IGNORED for place in differ):
            return f"**other labels**: `{told!r}`"
        last = max(place for place, label in enumerate(labels) if label != IGNORED)
        where = "after the answer" if all(place > last for place in differ) else "of the prompt"
        more |= {f"`{told!r}` {where}"} if differ else set()
    return "equal" if not more else f"equal, and TRL learns {', '.join(sorted(more))}"


def marks_of(template: str) -> list[str]:
    """The special tokens that a template writes: those of the known forms, and whatever looks like them."""
    return list(dict.fromkeys([*MARKS, *re.findall(r"<[|\uff5c]?[\w\u2581]+[|\uff5c]?>", template)]))


def templates() -> Iterator[tuple[str, str, str]]:
    """Name, the template with markers, and the template without."""
    for name, form in FORMS.items():
        yield name, form.template(marked=True), form.template()
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.glob("chat_templates/*_training.jinja")):
        name = path.name.removesuffix("_training.jinja")
        yield f"TRL: {name}", path.read_text(), path.with_name(f"{name}.jinja").read_text()


def fitting(tokenizer: Any, candidates: Sequence[Turns]) -> list[Turns]:
    """The conversations that a template takes."""
    found = []
    for turns in candidates:
        try:
            tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template may raise anything
            continue
        found.append(turns)
    return found


def row_of(name: str, marked: str, plain: str, family: str, model: Any) -> list[str]:
    """The cells of a template and a kind of tokenizer: conversations, and both ways."""
    tokenizer, cells = FAMILIES[family](marks_of(plain)), []
    turns: list[Turns] = []
    for with_marks, template in ((True, marked), (False, plain)):
        tokenizer.chat_template = template
        turns = fitting(tokenizer, (SHORT, LONG, BLANK, SYSTEM))
        if not turns:  # it wants lists of texts and images
            return []
        rows: list[dict[str, Any]] = [{"messages": found} for found in turns]
        if not with_marks:
            rows = [{"prompt": found[:-1], "completion": found[-1:]} for found in turns]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            try:
                ours = of_client(Path(folder), rows)
                cells.append(compared(ours, of_trl(model, tokenizer, rows, marked=with_marks), tokenizer))
            except (DataError, RuntimeError, ValueError) as error:
                cells.append(f"**{type(error).__name__}**: {str(error).splitlines()[0]}")
    return [name, str(len(turns)), *cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="bytes,sentencepiece,unigram", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--only", default="", help="names of forms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = llama_config(FAMILIES["bytes"](MARKS))
    config.max_position_embeddings = 8192
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(640)
    print("| form | conversations | `messages`, marked | `prompt` and `completion` |\n|---|---|---|---|")
    for name, marked, plain in templates():
        if options.only and name not in options.only.split(","):
            continue
        found = [row_of(name, marked, plain, family, model) for family in options.families.split(",")]
        if all(found):
            cells = [" / ".join(dict.fromkeys(row[column] for row in found)) for column in range(1, 4)]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
