"""The owner's commands: what a run would ask, in words; the record's sums; a key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client_app.guard.record import Record
from server_app.tools.cli import app
from tests.toys import tiny_models, toy_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    tiny_models.save_bert(folder / "bert", toy_data.VOCABULARY)
    toy_data.write_jsonl(folder / "data.jsonl", toy_data.opinions(40, 0))
    (folder / "site.toml").write_text(
        'socket = "s"\nruns = ["study-*"]\nservers = ["any"]\n[client]\nclient-id = "ada"\nstate-dir = "state"\n'
        'data-path = "data.jsonl"\nbase-model = "bert"\nlabels = "neg,pos"\n'
        '[policy]\nallow-steps = "initialise,train,evaluate,save,send"\n'
    )
    return folder


def shown(folder: Path, *config: str) -> str:
    ran = CliRunner().invoke(app, ["site", "show", str(folder / "site.toml"), *config])
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_what_fedmerge_would_ask_is_allowed_here(folder: Path) -> None:
    words = shown(folder, "strategy='fedmerge' num-server-rounds=3 local-steps=7 uplink-encoding='fp16'")
    assert "text-classification with 4 test, 32 train, 4 validation examples" in words
    assert "train, 3 times: it trains adapters on your examples" in words
    assert "In all: 21 training steps" in words
    assert " as fp16" in words
    assert "allows all of it" in words
    assert not (folder / "state" / "records").exists()


def test_what_potara_would_ask_is_refused_by_the_kind_of_step(folder: Path) -> None:
    words = shown(folder, "strategy='potara' num-server-rounds=3")
    assert "fisher, 1 times: it reports sums of squared gradients of single examples" in words
    assert "refuses step" in words
    assert "and not distance" in words
    words = shown(folder, "strategy='fedfomo' num-server-rounds=3")
    assert "select, once others have answered: it reports the loss of several adapters" in words
    assert "and not select" in words


def test_what_a_run_would_spend_of_the_privacy_budget_is_told(folder: Path) -> None:
    pytest.importorskip("opacus", reason="opacus (extra privacy) is not installed")
    public = (folder / "site.toml").read_text()
    try:
        private = public.replace("[policy]\nallow-steps", "[dp]\nepsilon = 8.0\ndelta = 1e-3\n[policy]\n# allow-steps")
        (folder / "site.toml").write_text(private)
        words = shown(folder, "strategy='fedmerge' num-server-rounds=3 local-steps=7 batch-size=8")
        assert "no score leaves" in words
        assert re.search(r"epsilon 0\.000 is spent, and [4-7]\.\d{3} would be", words), words
        assert "allows all of it" in words
        words = shown(folder, "strategy='fedmerge' num-server-rounds=300 local-steps=7 batch-size=8")
        assert "the run would spend more than dp.epsilon, which is 8" in words
        words = shown(folder, "strategy='potara' num-server-rounds=3")
        assert "(fisher): differential privacy (dp.epsilon) allows only initialise, train," in words
        assert not (folder / "state" / "privacy").exists()
    finally:
        (folder / "site.toml").write_text(public)


def test_the_records_sums_and_its_damage_are_told(folder: Path, tmp_path: Path) -> None:
    record = Record(tmp_path, "ada")
    record.append("left", run="study-1", steps=["send"], report={"bytes": 7}, slots={"x": {"bytes": 9, "numbers": 5}})
    ran = CliRunner().invoke(app, ["site", "audit", str(record.path)])
    assert ran.exit_code == 0
    assert "study-1" in ran.output
    assert "the chain is whole" in ran.output
    record.append("refused", run="study-1", error="no")
    record.path.write_text(record.path.read_text().replace('"numbers": 5', '"numbers": 6'))
    ran = CliRunner().invoke(app, ["site", "audit", str(record.path)])
    assert ran.exit_code == 1
    missing = CliRunner().invoke(app, ["site", "audit", str(tmp_path / "site.toml")])
    assert missing.exit_code == 1


def test_a_key_is_made_once_and_then_shown(tmp_path: Path) -> None:
    first = CliRunner().invoke(app, ["site", "key", str(tmp_path / "plans")])
    again = CliRunner().invoke(app, ["site", "key", str(tmp_path / "plans")])
    assert first.exit_code == again.exit_code == 0
    assert first.output.splitlines()[-1] == again.output.strip()
    assert again.output.startswith("sha256:")
