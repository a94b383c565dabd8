"""Runs are copied out of a cluster's own storage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from server_app.ledger.store import Ledger
from server_app.tools.copy_runs import CollectError, collect, collect_all


def make_run(folder: Path, name: str, seed: int = 0) -> Path:
    run = folder / name
    (run / "clients" / "berlin").mkdir(parents=True)
    (run / "config.toml").write_text(f"seed = {seed}\n")
    (run / "clients" / "berlin" / "slot").write_bytes(b"slot")
    return run


def test_a_run_is_copied_and_copied_again_when_it_has_gone_on(tmp_path: Path) -> None:
    runs, mine = tmp_path / "volume", tmp_path / "mine"
    mine.mkdir()
    run = make_run(runs, "a")
    make_run(runs, "b")
    make_run(runs, ".c-0badcafe")
    assert collect_all(runs, mine) == [mine / "a", mine / "b"]
    assert (mine / "a" / "clients" / "berlin" / "slot").read_bytes() == b"slot"
    (run / "summary.json").write_text("{}")
    collect(run, mine)
    assert (mine / "a" / "summary.json").exists()
    assert sorted(path.name for path in mine.iterdir()) == ["a", "b"]


def test_a_ledger_that_was_copied_while_it_was_written_is_whole_when_copied_again(tmp_path: Path) -> None:
    """The first copy has SQLite's log. At its end the run removes the source's log; the copy's must not be replayed."""
    runs, mine = tmp_path / "volume", tmp_path / "mine"
    mine.mkdir()
    run = make_run(runs, "a")
    with Ledger(run / "ledger.sqlite", "a") as ledger:
        for number in range(50):
            ledger.tensor(number, "berlin", "up", "train", 1)
        collect(run, mine)
        assert list((mine / "a").glob("*.sqlite-wal"))
        for number in range(50, 3000):
            ledger.tensor(number, "berlin", "up", "train", 1)
    collect(run, mine)
    with Ledger(mine / "a" / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.totals()["up"]["tensor"] == 3000


def test_a_checkpoint_that_is_removed_meanwhile_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, mine = tmp_path / "volume", tmp_path / "mine"
    mine.mkdir()
    run = make_run(runs, "a")
    (run / "checkpoint").write_bytes(b"old")
    copy = shutil.copy2

    def pruned(source: str, target: str, **options: bool) -> object:
        if source.endswith("checkpoint"):
            Path(source).unlink()
        return copy(source, target, **options)

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, pruned, False, False))
    assert (collect(run, mine) / "clients" / "berlin" / "slot").exists()


def test_another_run_of_that_name_is_not_touched(tmp_path: Path) -> None:
    runs, mine = tmp_path / "volume", tmp_path / "mine"
    make_run(mine, "a", seed=1)
    make_run(runs, "a")
    make_run(runs, "b")
    with pytest.raises(CollectError, match="a is another run; move it away"):
        collect_all(runs, mine)
    assert (mine / "a" / "config.toml").read_text() == "seed = 1\n"
    assert (mine / "b").exists(), "the others are copied"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_copies_belong_to_who_owns_the_folder(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, 12345, 23456)
    copy = collect(make_run(tmp_path / "volume", "a"), mine)
    for path in [copy, *copy.rglob("*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path
