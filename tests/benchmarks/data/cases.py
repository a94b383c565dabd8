"""Reruns the small inputs that once failed, as they are, against their right values.

    python -m tests.benchmarks.data.cases [--cases DIR] [--only NN]

``DIR`` (``../shared/cases``) has one script for each public thread. They call functions by the names that these had
when the scripts were written; :func:`stand_ins` gives them today's. Each prints what it finds; :data:`RIGHT` says what
must, and what must not, be in it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.test_repository import ROOT

CASES = ROOT.parent / "shared" / "cases"
ERRORS = r"Error\b|FAILED|Traceback"


@dataclass(frozen=True)
class Right:
    """What a case's output must have (each at least as often as it stands here), and must not have."""

    has: Sequence[str]
    lacks: str = ERRORS
    about: str = ""


RIGHT: Mapping[str, Right] = {
    "01a": Right([r"clip ran", r"convnext ran", r"segformer ran", r"levit ran"], about="vision models train"),
    "03": Right([r"ids as apply_chat_template\(tokenize=True\): True"] * 3, r": False", "ids of the template"),
    "05": Right(
        [
            r"product learns: .*two and two.*4",
            r"weight 0      : \('\[think\]\[/think\]GOOD</s>'",
            r"'tools'.*does not use",
            r"\('[^']*ok",
        ],
        about="keys of messages are used, told or refused",
    ),
    "06": Right([r"answers that change: 0 of"] * 3, r"answers that change: [1-9]", "padding changes no answer"),
    "08": Right(
        [r"said loss ([\d.]+) accuracy ([\d.]+) \| exported \(process seed \d\) loss \1 accuracy \2"] * 16,
        about="the export is the model that was scored",
    ),
    "09": Right(
        [
            r"labels='neg,pos': accuracy before any training (0\.9|1\.0)",
            r"labels='pos,neg': accuracy before any training (0\.9|1\.0)",
            r"head of the other task kept: False",
        ],
        about="rows of a head follow names",
    ),
    "11": Right(
        [r"Привет, мир \| Привет, мир .*'rouge_l': 1\.0", r"это кот 1 .*0\.666"], about="ROUGE-L in all scripts"
    ),
    "12": Right([r"\{'train': \d+, 'validation': 10"], about="test splits without labels"),
    "14": Right([r"clean data: \{", r"with </s> in texts: \{"], about="end tokens in texts"),
    "15": Right(
        [*([r"same logits: True"] * 4), r"pipeline: \[\{"],
        r"same logits: False",
        "ways to load an export",
    ),
    "16": Right([r"per image held 0\.|per image held -|per image held [1-3]\."], about="memory of images"),
    "17": Right(
        [
            r"own labels.*-> \('autre', 'sécurité'\)",
            r"shared labels NFC -> \('sécurité', 'autre'\)",
            r"joiner -> \(",
            r"ZWNJ -> \(",
            r"non-breaking space -> \(",
            r"float ids \(pandas\) -> \('1', '2', '3'\)",
            r"mixed -> .*look like",
            r"bool and text -> .*look like",
        ],
        about="labels are their names",
    ),
    "18": Right(
        [r"same numbers: (\[\]|\(\))", r"test images that are in train: 0 of", r"copies"], about="copies by content"
    ),
    "20b": Right([r"b/c"], r"Traceback", "a slash in a client id"),
    "21": Right([r"text only: \{", r"inputs of a batch: .*'token_type_ids'"], about="Gemma 3's token types"),
    "21b": Right([r"logits: 0\.0"] * 2, about="Qwen-VL's token types"),
    "22": Right(
        [r"fedavg 1,0,0 ->", r"potara 0\.8,0,0\.2 -> \{", r"fedavg 0\.8,0,0\.2 -> \{"], r"Traceback", "missing splits"
    ),
}
SKIPPED = {"01b": "lists architectures of transformers", "01c": "lists architectures of transformers"}


def _module(name: str, **members: Any) -> None:
    found = sys.modules.get(name) or types.ModuleType(name)
    for key, value in members.items():
        setattr(found, key, value)
    sys.modules[name] = found


def stand_ins() -> None:
    """Today's functions under the names that the scripts import."""
    import client_app
    import server_app
    import tests
    import tests.client_app.own as own
    from client_app.data.example import Example
    from client_app.data.targets import IGNORED
    from client_app.kinds import KINDS
    from client_app.kinds.scores import texts
    from client_app.model.bases import base_models, model_folders
    from client_app.own import files
    from client_app.own.reading import readers
    from client_app.plan import evaluation
    from server_app.tools.handover.export import export_adapter
    from tests.client_app import own_clients
    from tests.toys import tiny_models, toy_data

    tiny_models._save = tiny_models.save_model  # type: ignore[attr-defined]
    Example.image = property(lambda example: example.images[0] if example.images else None)  # type: ignore[attr-defined]
    for name in ("settings_of", "loaded", "personal"):
        setattr(own, name, getattr(own_clients, name))
    _module("tests.tiny_models", **vars(tiny_models))
    _module("tests.toy_data", **vars(toy_data))
    tests.tiny_models, tests.toy_data = tiny_models, toy_data  # type: ignore[attr-defined]
    _module("client_app.own_data", load_own=files.load_own, read_own=files.read_own)
    _module("client_app.tasks", IGNORED=IGNORED, KINDS=KINDS)
    _module("client_app.evaluation", **{**vars(texts), **vars(evaluation)})
    _module("client_app.base_models", find_model=model_folders.find_model, load_base=base_models.load_base)
    _module("client_app.tables", **vars(readers))
    _module("server_app.export", export_adapter=export_adapter)
    _module("server_app.federation")
    _module("server_app.workers", in_process=_in_process)
    client_app.tables = sys.modules["client_app.tables"]  # type: ignore[attr-defined]
    server_app.export = sys.modules["server_app.export"]  # type: ignore[attr-defined]


def _in_process(config: Mapping[str, Any], count: int, runs: Path, _: Any, nodes: Mapping[str, Any]) -> None:
    from tests.in_process import run_in_process

    named = [{"client-id": name, **keys} for name, keys in nodes.items()]
    run_in_process(runs, clients=count, node_config=lambda number: named[number], **config)


def output_of(script: Path) -> str:
    """All that a case prints."""
    if script.suffix == ".sh":
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stdout + done.stderr
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as error:  # a case that ends early has failed
            print(f"Traceback: {type(error).__name__}: {error}")
    return printed.getvalue()


def wrong_in(output: str, right: Right) -> list[str]:
    """What is missing from a case's output, or should not be there."""
    wanted = {pattern: right.has.count(pattern) for pattern in right.has}
    found = [f"lacks {p}" for p, count in wanted.items() if len(re.findall(p, output)) < count]
    return found + [f"has {match.group(0)}" for match in re.finditer(right.lacks, output)]


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--only", default="", help="the beginning of a case's name")
    parser.add_argument("--show", action="store_true", help="what the cases print")
    arguments = parser.parse_args()
    scripts = sorted(p for p in arguments.cases.glob("[0-9]*_*") if p.name.startswith(arguments.only))
    if not scripts:
        print(f"skipped: no cases in {arguments.cases}")
        return 0
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    sys.path.insert(0, str(arguments.cases))
    stand_ins()
    failed = 0
    for script in scripts:
        number, start = script.name.split("_")[0], time.monotonic()
        if number in SKIPPED or (number == "21b" and not _has_torchvision()):
            print(f"{number:4} skipped: {SKIPPED.get(number, 'needs torchvision')}")
            continue
        output = output_of(script)
        wrong = wrong_in(output, RIGHT[number])
        failed += bool(wrong)
        if arguments.show or wrong:
            print(output)
        print(f"{number:4} {'WRONG' if wrong else 'right'}: {RIGHT[number].about} ({time.monotonic() - start:.0f} s)")
        print("".join(f"     {line}\n" for line in wrong), end="", flush=True)
    return failed


def _has_torchvision() -> bool:
    import importlib.util

    return importlib.util.find_spec("torchvision") is not None


if __name__ == "__main__":
    sys.exit(main())
