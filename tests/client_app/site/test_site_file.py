"""``site.toml``: what it must say, and that a mistake in it is named before anything is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.site.site_file import SiteFileError, read_site
from fedalloy_adapters.wire.signing import fingerprint_of, new_key

GOOD = """
socket = "run/s.sock"
servers = ["plans.pub", "sha256:{0}"]
runs = ["study-*"]
base-models = ["Qwen/*"]
[client]
client-id = "ada"
state-dir = "state"
data-path = "data.jsonl"
[policy]
min-examples = 20
[dp]
epsilon = 8.0
"""


def write(folder: Path, text: str) -> Path:
    (folder / "plans.pub").write_bytes(new_key()[1])
    (folder / "data.jsonl").touch()
    path = folder / "site.toml"
    path.write_text(text.replace("{0}", "0" * 64))
    return path


def test_paths_are_beside_the_file_and_tables_are_node_config(tmp_path: Path) -> None:
    site = read_site(write(tmp_path, GOOD))
    assert site.socket == tmp_path / "run" / "s.sock"
    assert site.servers == {
        fingerprint_of(tmp_path / "plans.pub"): "plans.pub",
        f"sha256:{'0' * 64}": "sha256:00000000...",
    }
    assert site.client == {
        "client-id": "ada",
        "state-dir": str(tmp_path / "state"),
        "data-path": str(tmp_path / "data.jsonl"),
        "client.min-examples": 20,
        "dp.epsilon": 8.0,
    }


WRONG = {
    "an unknown key": ("runs =", "rus =", r"unknown key 'rus' \(did you mean 'runs'\?\)"),
    "no run": ('["study-*"]', "[]", "runs names none"),
    "no server": ('["plans.pub", "sha256:{0}"]', "[]", "servers names none"),
    "a key that is none": ('"plans.pub"', '"data.jsonl"', "servers: .*data.jsonl has no public key"),
    "no client": ('client-id = "ada"', "", r"\[client\] has no client-id"),
    "no socket": ('socket = "run/s.sock"', "", "has no socket"),
    "no TOML": ("[client]", "[client", "is not TOML"),
    "a list for a text": ('data-path = "data.jsonl"', "data-path = []", r"\[client\], expected a table of texts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named(case: str, tmp_path: Path) -> None:
    old, new, words = WRONG[case]
    assert old in GOOD
    with pytest.raises(SiteFileError, match=words):
        read_site(write(tmp_path, GOOD.replace(old, new)))
