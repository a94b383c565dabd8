"""What of a client's errors reaches the server: never a value, a name of a file, or words that were made of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from client_app.guard.disclosure import ClientError, private_errors, told
from client_app.own.reading.text_files import DataError
from client_app.plan.interpreter import Interpreter
from client_app.plan.names import PlanError
from client_app.settings import SettingsError
from client_app.trainer.calls import JobFailedError
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.wire.codec import CodecError, CodecErrorCode
from proto.fedalloy.v1 import plan_pb2, trainer_pb2
from strategies.framework.dispatch import register_message
from tests.fuzz.targets import EXAMPLES, Memory, NoModel
from tests.in_process import FIRST_NODE, InProcessGrid, run_config_of
from tests.strategies.hostile import LAYOUT, NAME
from tests.toys import toy_data

SECRETS = ("hunter2", "melanoma", "123-45-6789", "secret")


def answer_of(tmp_path: Path, node: dict[str, Any], **run: Any) -> str:
    """What the server hears when it asks this client who it is."""
    grid = InProcessGrid(1, tmp_path / "state", run_config_of(**run), lambda index: {"client.accept-keys": ""} | node)
    message: Message = register_message(FIRST_NODE)
    grid.push_messages([message])
    (reply,) = grid.pull_messages([message.metadata.message_id])
    assert reply.has_error()
    return str(reply.error.reason)


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patients")
    rows = [
        {"text": "secret", "label": "yes", "ssn": "123-45-6789", "diagnosis": "melanoma"},
        {"text": "secret, too", "label": "no", "ssn": "123-45-6789", "diagnosis": "melanoma"},
    ] * 3
    toy_data.write_jsonl(folder / "secret-name.jsonl", rows)
    (folder / "passwords.csv").write_text("password,text\nhunter2,a\nhunter2,b\nhunter2,c\n")
    return folder


def own(patients: Path, **more: Any) -> dict[str, Any]:
    return {"data-path": str(patients / "secret-name.jsonl"), "client-id": "ada", **more}


HERE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "labels that the data have not": ({}, {"labels": "q,r"}, "DataError: line 1"),
    "the owner's own typo": ({"label-column": "diagnosis"}, {"labels": "q,r"}, "DataError: line 1"),
    "a column that is not there": ({"label-column": "labell"}, {"task": "text-classification"}, "DataError: line 1"),
    "splits in the owner's column": ({"split-column": "diagnosis"}, {}, "DataError: line 1, column 'diagnosis'"),
    "the owner's file is not there": ({"data-path": "/secret/x.jsonl"}, {}, "DataError (see the client's log)"),
    "a base model is not there": ({}, {"base_model": "/secret"}, "BaseModelError (see the client's log)"),
    "a value of node-config": ({"max-length": "secret"}, {}, "SettingsError: max-length"),
    "a number of node-config": ({"lora-r": "secret"}, {}, "SettingsError: lora-r"),
    "a number that is none": ({"lora-alpha": float("nan")}, {}, "SettingsError: lora-alpha"),
    "a scaling below zero": ({"lora-alpha": -1.0}, {}, "SettingsError: lora-alpha"),
}


@pytest.mark.parametrize("case", HERE)
def test_an_error_is_told_by_class_column_and_line(case: str, patients: Path, tmp_path: Path) -> None:
    node, run, expected = HERE[case]
    heard = answer_of(tmp_path, own(patients, **node), **run)
    assert expected in heard
    assert not [secret for secret in SECRETS if secret in heard]
    assert "/" not in heard


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "another label": ("label-column", {"label_column": "ssn", "labels": "q,r"}),
    "another split": ("split-column", {"split_column": "diagnosis"}),
    "another text": ("text-column", {"text_column": "ssn"}),
    "a column to divide by": ("partition-by", {"partition_by": "ssn"}),
}


@pytest.mark.parametrize("case", ASKED)
def test_the_server_chooses_no_column(case: str, patients: Path, tmp_path: Path) -> None:
    key, run = ASKED[case]
    assert f"SettingsError: {key}" in answer_of(tmp_path, own(patients), **run)
    agreed = own(patients, **{"client.accept-keys": f"data-root, {key}"})
    assert f"SettingsError: {key}" not in answer_of(tmp_path, agreed, base_model="/nowhere", **run)


@pytest.mark.parametrize("name", ["passwords.csv", "not-there.csv"])
def test_the_server_chooses_no_file(name: str, patients: Path, tmp_path: Path) -> None:
    """Whether the file is there or not: the answers are the same."""
    heard = answer_of(tmp_path, {}, data_path=str(patients / name), label_column="password", text_column="text")
    assert "SettingsError: data-path" in heard
    assert not [secret for secret in SECRETS if secret in heard]


def test_run_config_cannot_say_that_run_config_may(patients: Path, tmp_path: Path) -> None:
    run = {"client.accept-keys": "all", "label-column": "ssn"}
    grid = InProcessGrid(1, tmp_path, run, lambda index: own(patients) | {"client.accept-keys": ""})
    message = register_message(FIRST_NODE)
    grid.push_messages([message])
    (reply,) = grid.pull_messages([message.metadata.message_id])
    assert "SettingsError: label-column" in reply.error.reason


def test_what_was_asked_for_is_told_in_words_and_what_others_added_is_not() -> None:
    assert told(PlanError("no split 'x'")) == "PlanError: no split 'x'"
    assert told(PlanError("step 1: the label melanoma", told="step 1")) == "PlanError: step 1"
    assert "PAYLOAD" in told(CodecError(next(iter(CodecErrorCode)), "PAYLOAD"))
    assert told(ValueError("melanoma")) == told(ValueError("x")) == "ValueError (see the client's log)"
    assert told(SettingsError("node-config data-path = 'secret' is str")) == "SettingsError: data-path"
    hostile = DataError("/a/b.jsonl, line 3: 'x, line 9, column 'melanoma': y'")
    assert told(hostile) == "DataError: line 3"
    assert told(DataError("/a/b.jsonl, line 3, column 7: not valid JSON")) == "DataError: line 3, column 7"
    assert told(DataError("no lines")) == "DataError (see the client's log)"


def test_the_clients_own_log_has_the_words_of_its_trainers_error_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    error = DataError("/a/b.jsonl: messages-column = 'mesages': there is no such column")
    failure = trainer_pb2.Failure(error="DataError", message=told(error), words=str(error))

    def handler(message: Message, context: Context) -> Message:
        raise JobFailedError(failure, "/home/trainer.log")

    flwr, message = logging.getLogger("flwr"), register_message(FIRST_NODE)
    before = list(flwr.filters)
    flwr.addHandler(caplog.handler)
    try:
        with pytest.raises(ClientError) as raised:
            private_errors(handler)(message, Context(0, 0, {}, message.content, {}))
    finally:
        flwr.removeHandler(caplog.handler)
        flwr.filters[:] = before
    assert str(raised.value) == "DataError (see the client's log)"
    assert {record.getMessage() for record in caplog.records} == {f"DataError: {error} (log: /home/trainer.log)"}
    assert not any(record.exc_info for record in caplog.records)


def test_a_step_that_fails_for_the_data_says_only_which_one() -> None:
    model: Any = NoModel()
    slots: Any = Memory({"global": Adapter.zeros(LAYOUT)})
    step = plan_pb2.Step(evaluate={"split": "test", "mixture": {"terms": [{"slot": "global", "scalar": 1.0}]}})
    plan = plan_pb2.Plan(version=1, client_id=NAME, round=1, run_name="run", steps=[step])
    with pytest.raises(PlanError, match="there is no model here") as caught:
        Interpreter(NAME, model, EXAMPLES, slots).run(plan, {})
    assert told(caught.value) == (f"PlanError: client {NAME!r}, step 0 (evaluate): ValueError (see the client's log)")
