"""The documentation's table of architectures is what the tests try: no more, and no less."""

from __future__ import annotations

from collections.abc import Iterable

from client_app.kinds import KINDS
from tests.client_app.kinds import test_architectures, test_kinds, test_vision_models
from tests.client_app.model.bases import test_base_models
from tests.client_app.model.forward import test_padding
from tests.test_repository import ROOT


def _plain(names: Iterable[str]) -> set[str]:
    return {"".join(letter for letter in name.casefold() if letter.isalnum()) for name in names}


def _told() -> dict[str, set[str]]:
    """Architectures by task, as the documentation has them."""
    page = (ROOT / "docs" / "data-and-models.md").read_text()
    table = page.split("| task | architectures |")[1].split("\n\n")[0].splitlines()[2:]
    found = {}
    for line in table:
        tasks, architectures = line.split("|")[1:3]
        for task in tasks.split(","):
            found[task.strip(" `")] = _plain(architectures.split(","))
    return found


def _tried() -> dict[str, set[str]]:
    bases: dict[str, set[str]] = {}
    for architecture, kind, *_ in test_base_models.CASES:
        bases.setdefault(kind, set()).add(architecture)
    found = {kind: _plain(architectures) for kind, architectures in bases.items()}
    found["text-classification"] |= _plain(test_padding.CONFIGS)
    found["causal-lm"] |= {"llama"}  # tests/client_app/own/test_files.py
    found["image-text-to-text"] = _plain(test_vision_models.FAMILIES)
    found["image-text-classification"] = {"vilt", "flava"}  # tests/client_app/own/test_kinds.py and test_task_file.py
    for kind in test_kinds.NEW:
        found[kind] = {"llama" if KINDS[kind].auto_model == "AutoModelForCausalLM" else "bert"}
    for kind in test_architectures.KINDS_TRIED:
        found[kind] |= _plain(test_architectures.BODIES)
    return found


def test_the_table_has_what_is_tried() -> None:
    assert _told() == _tried()
    assert set(_told()) == set(KINDS)
