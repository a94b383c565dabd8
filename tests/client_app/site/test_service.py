"""A site's own service: what it does for a run that its owner has listed, and that a hostile ClientApp gets nothing."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.app import RecordDict

from client_app.site.audit import audit
from client_app.site.service import SiteTrainer, open_socket
from client_app.site.site_file import SiteFileError
from client_app.trainer.calls import NO_LIMIT, JobFailedError, ask, requests_of
from client_app.trainer.relay import SiteError
from client_app.trainer.server import PendingJob, Trainer
from fedalloy_adapters.wire.flower_records import CONFIG_RECORD, pack
from fedalloy_adapters.wire.signing import new_key
from proto.fedalloy.v1 import plan_pb2, report_pb2, trainer_pb2
from proto.fedalloy.v1.trainer_pb2_grpc import TrainerServiceStub
from strategies.framework import steps
from strategies.framework.steps import Training
from tests.client_app.site.conftest import Running, Start

TRAINING = Training(local_steps=2, batch_size=4)


def plan_of(*more: plan_pb2.Step, run: str = "study-1", round_: int = 1) -> plan_pb2.Plan:
    found = [
        steps.initialise("global", 1),
        steps.train(TRAINING, steps.mixture("global"), ["global"]),
        steps.evaluate(TRAINING, steps.mixture("global")),
        steps.send(TRAINING, "global", relative_to_received=False),
    ]
    return plan_pb2.Plan(
        version=1, run_name=run, client_id="ada", round=round_, steps=[*found, *more], run_key=b"the run's key"
    )


def lines(site: Running) -> list[dict[str, Any]]:
    path = site.record.path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_listed_run_is_served_and_every_byte_is_in_the_record(start: Start) -> None:
    site = start()
    registration = site.register("study-1")
    assert (registration.client_id, registration.trainer) == ("ada", report_pb2.TRAINER_MODE_INSTALLED)
    report, uploads = site.plan(plan_of())
    assert set(uploads) == {"global"}
    assert report.results[2].evaluate.metrics["loss"] > 0
    found = audit(site.record.path)
    assert not found.problems
    sums = found.runs["study-1"]
    assert (sums.plans, sums.registrations, sums.refused) == (1, 1, 0)
    assert sums.uploads == len(uploads["global"])
    assert stat.S_IMODE(site.trainer.site.socket.stat().st_mode) == 0o600


def test_an_errors_words_stay_with_the_service(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer of the bundle tells them to its ClientApp, whose code it shares; a site's service does not."""

    def fails(self: Trainer, pending: PendingJob) -> Iterator[trainer_pb2.RunResponse]:
        raise ValueError("melanoma")

    def heard_from(trainer: Trainer) -> trainer_pb2.Failure:
        monkeypatch.setattr(type(trainer), "_outcome", fails)
        pending = PendingJob(trainer_pb2.Job(register=trainer_pb2.RegisterJob()), {})
        trainer._carry_out(pending)
        answer = pending.answers.get()
        assert answer is not None
        return answer.failure

    installed, bundled = heard_from(start().trainer), heard_from(Trainer(b""))
    assert "melanoma" not in str(installed)
    assert bundled.words == "melanoma"
    assert installed.message == bundled.message == "ValueError (see the client's log)"


def test_an_unlisted_run_gets_nothing_and_is_on_record(start: Start) -> None:
    site = start()
    for ask_for in (lambda: site.register("other"), lambda: site.plan(plan_of(run="other"))):
        with pytest.raises(SiteError, match=r"run 'other' is not one of this site's \(study-\*\)"):
            ask_for()
    assert [(line["event"], line["run"]) for line in lines(site)] == [("refused", "other")] * 2
    assert not (site.folder / "state" / "other").exists()


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"base_model": "/somewhere/else"}, "base-model '/somewhere/else' is not one of this site's"),
    "another reference": ({"reference_model": "/somewhere/else"}, "reference-model '/somewhere/else' is not one"),
    "more examples than may leave": ({"client__min_examples": 0}, r"1 examples, its client\.min-examples is 2"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_run_config_lifts_no_limit_and_loads_no_other_base(case: str, start: Start) -> None:
    config, words = HOSTILE[case]
    site = start()
    one = steps.train(Training(local_steps=1, batch_size=1), steps.mixture("global"), ["global"])
    with pytest.raises(SiteError, match=words):
        site.plan(plan_of(one), **config)
    assert not any(line["event"] == "left" for line in lines(site))
    assert words.split()[0].strip("r\\") in json.dumps(lines(site))


def test_what_a_hostile_run_tried_to_decide_is_ignored_and_on_record(start: Start) -> None:
    site = start(policy='allow-steps = "initialise,train,evaluate,send"')
    tried = {
        "data_path": "/etc/passwd",
        "label_column": "ssn",
        "client__allow_steps": "gram",
        "client__min_examples": 0,
    }
    report, _ = site.plan(plan_of(), **tried)
    assert report.examples == 32  # of its own data
    (ignored,) = [line for line in lines(site) if line["event"] == "ignored"]
    assert ignored["values"] == {
        "client.allow-steps": "gram",
        "client.min-examples": "0",
        "data-path": "/etc/passwd",
        "label-column": "ssn",
    }
    with pytest.raises(SiteError, match=r"refuses step 4 \(gram\)"):
        site.plan(plan_of(steps.gram(TRAINING, "gram", steps.mixture("global")), round_=2), **tried)


def test_a_hostile_client_app_speaks_to_the_socket_itself(start: Start) -> None:
    """It leaves the relay out: jobs of today's mode with a node-config of its own, and an order to leave."""
    site = start()
    node = {"data-path": "/etc/passwd", "client.min-examples": 0}
    with grpc.insecure_channel(f"unix:{site.trainer.site.socket}", options=NO_LIMIT) as channel:
        stub = TrainerServiceStub(channel)  # type: ignore[no-untyped-call]

        def tell(job: trainer_pb2.Job, blobs: dict[str, bytes]) -> object:
            for key, value in node.items():
                if isinstance(value, int):
                    job.node_config[key].integer = value
                else:
                    job.node_config[key].text = str(value)
            return ask(stub, requests_of(job, blobs), 60.0, "it", lambda name, progress: None)

        for job in (trainer_pb2.Job(register=trainer_pb2.RegisterJob()), trainer_pb2.Job(plan=plan_of())):
            with pytest.raises(JobFailedError, match="speaks version 1, but the request has version 0"):
                tell(job, {})
        words = plan_pb2.RegisterRequest(version=1, run_name="study-1").SerializeToString()
        job = trainer_pb2.Job(site=trainer_pb2.SiteJob(version=1, register=words))
        job.run_config["base-model"].text = str(site.base)
        tell(job, {})
        with pytest.raises(grpc.RpcError, match="ends when its owner ends it"):
            stub.Retire(trainer_pb2.RetireRequest())
        extra = trainer_pb2.Job(site=trainer_pb2.SiteJob(version=1, plan=plan_of().SerializeToString()))
        extra.run_config["base-model"].text = str(site.base)
        with pytest.raises(JobFailedError, match="CodecError"):
            tell(extra, {"extra": b"extra tensors"})
    (ignored,) = [line for line in lines(site) if line["event"] == "ignored" and "extra" not in str(line)]
    assert ignored["values"] == {"node-config client.min-examples": "0", "node-config data-path": "/etc/passwd"}
    assert not any(line["event"] == "left" for line in lines(site))
    assert not audit(site.record.path).problems


def signature_of_another_run(content: RecordDict) -> None:
    other = pack("plan", plan_of(run="study-2")).config_records[CONFIG_RECORD]["plan"]
    content.config_records[CONFIG_RECORD]["plan"] = other


def extra_blob(content: RecordDict) -> None:
    blobs = pack("plan", plan_pb2.Plan(), {"extra": b"tensors"})
    content["adapters"] = blobs.array_records["adapters"]


TAMPER: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "another plan": (signature_of_another_run, "signed another message"),
    "another tensor": (extra_blob, "signed another message"),
    "no signature": (lambda c: c.config_records[CONFIG_RECORD].pop("signature") and None, "has no signature"),
    "no signature at all": (
        lambda c: c.config_records[CONFIG_RECORD].update({"signature": b"\xff\xff"}),
        "cannot be read",
    ),
}


def test_a_site_takes_plans_of_servers_that_it_knows(start: Start, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        private, public = new_key()
        (tmp_path / name).write_bytes(private)
        (tmp_path / f"{name}.pub").write_bytes(public)
    site = start(servers=f'["{tmp_path / "ours.pub"}"]')
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    site.register("study-1", ours)
    for key, words in (("", "has no signature"), (theirs, "which is no server of this site's")):
        with pytest.raises(SiteError, match=words):
            site.plan(plan_of(), key)
    for tamper, words in TAMPER.values():
        with pytest.raises(SiteError, match=words):
            site.plan(plan_of(), ours, tamper)
    report, _ = site.plan(plan_of(), ours)
    assert len(report.results) == 4
    events = [line["event"] for line in lines(site)]
    assert events == ["registered", *["refused"] * 6, "layout", "left"]


def test_budgets_of_a_run_hold_over_a_restart_of_the_service(start: Start) -> None:
    site = start(policy="max-run-steps = 5\nmax-run-upload-mb = 10.0")
    site.plan(plan_of())
    site.plan(plan_of(round_=2))
    site.trainer.retire()
    site.trainer.site.socket.unlink()
    again = start(policy="max-run-steps = 5\nmax-run-upload-mb = 10.0", folder=site.folder)
    with pytest.raises(SiteError, match=r"6 for this run with this plan, its client\.max-run-steps is 5"):
        again.plan(plan_of(round_=3))
    again.plan(plan_of(run="study-2"))


def test_the_relay_imports_nothing_of_ours_but_itself(start: Start, tmp_path: Path) -> None:
    site = start()
    program = (
        "import sys, json\n"
        "from flwr.app import Context, Message, RecordDict\n"
        "from flwr.supercore.task_identity import TaskIdentity\n"
        "TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1\n"
        "from client_app.app import app\n"
        "node = {'client-id': 'ada', 'site-socket': sys.argv[1]}\n"
        "context = Context(1, 7, node, RecordDict(), {'base-model': sys.argv[2]})\n"
        "from fedalloy_adapters.wire.flower_records import REGISTER_TYPE, pack\n"
        "from proto.fedalloy.v1 import plan_pb2\n"
        "content = pack('request', plan_pb2.RegisterRequest(version=1, run_name='study-1'))\n"
        "app(Message(content, 7, REGISTER_TYPE, ttl=60.0), context)\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program, str(site.trainer.site.socket), str(site.base)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    modules = json.loads(ran.stdout.splitlines()[-1])
    ours = {name for name in modules if name.split(".")[0] in ("client_app", "strategies", "server_app")}
    assert ours == {
        "client_app",
        "client_app.app",
        "client_app.guard",
        "client_app.guard.disclosure",  # which words of an error may leave
        "client_app.sock_diag",
        "client_app.sockets",
        "client_app.trainer",
        "client_app.trainer.calls",
        "client_app.trainer.relay",
    }
    assert "torch" not in modules


def test_without_a_service_the_run_is_told_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    site = start()
    monkeypatch.setattr("client_app.trainer.relay.RETURN_SECONDS", 0.1)
    monkeypatch.setattr("client_app.trainer.relay.VERSION", 2)
    with pytest.raises(SiteError, match="speaks version 1, the run's app 2"):
        site.register("study-1")
    with pytest.raises(SiteFileError, match="something else is there"):
        open_socket(SiteTrainer(site.trainer.site), site.trainer.site)
    site.trainer.site.socket.unlink()
    with pytest.raises(SiteError, match=r"nobody listens at .* \(site-socket\); expected `fedalloy site serve`"):
        site.register("study-1")
