"""``fedalloy options`` and ``fedalloy validate``: all errors at once, one line each, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples import three_clients
from server_app.tools.cli import app
from server_app.tools.cluster.validate import check_clients, check_run_config

runner = CliRunner()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora-r": 0}, "lora-r = 0, expected at least 1"),
        ({"lora-r": "8"}, "lora-r = '8' is str, expected int"),
        ({"model-dtype": "bf16"}, "model-dtype = 'bf16', expected one of"),
        ({"split-fractions": "1,1,1"}, "split-fractions = '1,1,1', expected shares"),
    ],
)
def test_the_clients_part_of_run_config_is_checked_too(config: dict[str, object], said: str) -> None:
    (line,) = check_run_config(config)
    assert said in line


def test_all_errors_are_said_at_once() -> None:
    text = "lora-r=0 model-dtype='bf16' local-steps='x' strateg='fedavg' fedmerge.models=0 strategy='fedmerge'"
    result = runner.invoke(app, ["options", text], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 5
    for part in ("lora-r = 0", "model-dtype", "local-steps = 'x'", "did you mean 'strategy'", "fedmerge.models"):
        assert sum(part in line for line in lines) == 1, part


def test_a_wrong_value_hides_no_missing_file_and_an_unknown_key_no_wrong_value(tmp_path: Path) -> None:
    three_clients.write(tmp_path / "own")
    (tmp_path / "own" / "mixed.toml").write_text(
        "[berlin]\ndata-path = 'nowhere.jsonl'\n[paris]\ndata-pth = 'paris.jsonl'\n"
    )
    asked = f"base-model='{tmp_path}/own/base' target-modules='all-linear' lora-r=0"
    result = runner.invoke(app, ["validate", str(tmp_path / "own" / "mixed.toml"), asked])
    assert result.exit_code == 1
    value, key, file = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert value == "error: run-config: lora-r = 0, expected at least 1"
    assert "client 'paris' has an unknown key: 'data-pth' (did you mean 'data-path'?)" in key
    assert file.startswith("error: client 'berlin': data-path ")
    assert "no such file" in file


def test_a_base_model_that_is_not_here_is_told() -> None:
    result = runner.invoke(app, ["options", "base-model='/nope' lora-r=4"])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "run-config is valid",
        "base-model = '/nope' is not on this machine; each client needs it (fedalloy validate tries a client)",
    ]


def test_each_clients_files_model_and_batch_are_tried(tmp_path: Path) -> None:
    three_clients.write(tmp_path / "own")
    clients = {name: {"data-path": str(tmp_path / "own" / f"{name}.jsonl")} for name in three_clients.GREETINGS}
    first, *others = clients
    (tmp_path / "own" / f"{first}.jsonl").write_text("[]\n")
    config = {"base-model": str(tmp_path / "own" / "base"), "target-modules": "all-linear"}
    found = {client: (line, sound) for client, line, sound in check_clients(clients, config)}
    assert not found[first][1]
    assert "line 1" in found[first][0]
    assert all(sound and line.startswith("causal-lm; train ") for line, sound in (found[name] for name in others))
    for said in (
        " trainable parameters\nbytes of an adapter: fp32 ",
        "int8 ",
        " tokens\n",
        "a step of 8 examples takes ",
    ):
        assert all(said in found[name][0] for name in others), found
    nowhere = [line for _, line, _ in check_clients({first: clients[others[0]]}, config | {"base-model": "/nope"})]
    assert "/nope" in nowhere[0]
    path = tmp_path / "own" / "clients.toml"
    result = runner.invoke(app, ["validate", str(path), f"base-model='{tmp_path}/own/base' lora-r=0"])
    assert result.exit_code == 1
    assert "lora-r = 0" in result.output
    assert f"client '{first}'" in result.output
    (tmp_path / "own" / "others.toml").write_text("".join(f"[{name}]\ndata-path = '{name}.jsonl'\n" for name in others))
    asked = f"base-model='{tmp_path}/own/base' target-modules='all-linear'"
    result = runner.invoke(app, ["validate", str(tmp_path / "own" / "others.toml"), asked], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert f'flwr run . <connection> --stream --run-config "{asked}"' in result.output
