"""The resident trainer as a real process: started, raced for, killed, replaced, left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, RecordDict

from client_app.plan.progress import Cancelled, listening
from client_app.session import Executor
from client_app.settings import read_settings
from client_app.trainer.address import Owner, Residence, TrainerError
from client_app.trainer.client import JobFailedError, TrainerClient
from client_app.trainer.server import PendingJob, Trainer, turn
from proto.fedalloy.v1 import plan_pb2, report_pb2, trainer_pb2
from strategies.framework.steps import Training, evaluate, initialise, mixture, send, train
from tests.client_app.trainer.conftest import PATIENCE, owners, pid_of, trainers_of, wait_until
from tests.in_process import FIRST_NODE, InProcessGrid, run_in_process

ROOT = Path(__file__).parents[3]


def context(home: Path, partition: int = 0, **run_config: Any) -> Context:
    node = {"partition-id": partition, "num-partitions": 2, "state-dir": str(home / "state"), "client-id": "berlin"}
    return Context(1, 7, node, RecordDict(), {"lora-r": 4, **run_config})


def plan(run_name: str, round_: int = 1, steps: int = 3, split: str = "train") -> plan_pb2.Plan:
    training = Training(local_steps=steps, batch_size=8)
    made = [initialise("a", seed=5), train(training, mixture("a"), ["a"])]
    made[1].train.split = split
    made += [evaluate(training, mixture("a"), split="validation")]
    made += [send(training, "a", relative_to_received=False)]
    return plan_pb2.Plan(version=1, run_name=run_name, client_id="berlin", round=round_, seed=0, steps=made)


def answer(report: report_pb2.Report, uploads: Any) -> tuple[list[Any], list[str]]:
    """What must be the same wherever a plan runs: everything but the time it took, and the blobs' nonces."""
    results = []
    for result in report.results:
        same = report_pb2.StepResult.FromString(result.SerializeToString())
        same.seconds = 0
        body = getattr(same, same.WhichOneof("kind") or "")
        if hasattr(body, "seconds"):
            body.seconds = 0
        results.append(same.SerializeToString(deterministic=True))
    return results, sorted(uploads)


def alone(where: Context, *plans: plan_pb2.Plan) -> list[Any]:
    """The answers of a fresh executor per plan, as in a fresh process, in a run of their own."""
    found = []
    for request in plans:
        request.run_name += "-alone"
        found.append(answer(*Executor().carry_out(read_settings(where), request, {})))
    return found


# ----------------------------------------------------------------------------------------------------- start and end


def test_of_many_that_race_to_start_it_all_get_the_same_one(new_owner: Callable[[], Owner]) -> None:
    owner = new_owner()
    gate = threading.Barrier(6)

    def race() -> int:
        gate.wait()
        return pid_of(owner)

    with ThreadPoolExecutor(6) as pool:
        pids = {future.result() for future in [pool.submit(race) for _ in range(6)]}
    assert len(pids) == 1
    assert trainers_of(owner) == list(pids)


def test_a_socket_that_nobody_serves_is_replaced(new_owner: Callable[[], Owner]) -> None:
    owner = new_owner()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(Residence.of(owner).socket))
    first = pid_of(owner)
    os.kill(first, signal.SIGKILL)  # leaves its socket behind
    wait_until(lambda: not trainers_of(owner))
    assert Residence.of(owner).socket.exists()
    second = pid_of(owner)
    assert second != first
    assert trainers_of(owner) == [second]


def test_it_leaves_with_its_owner_and_nothing_stays(home: Path) -> None:
    with owners() as make:
        owner = make()
        pid = pid_of(owner)
        assert os.getsid(pid) == pid  # in a session of its own
        residence = Residence.of(owner)
        assert residence.lock.exists()
        make.__self__.end(owner)  # type: ignore[attr-defined]
        wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
        assert not residence.socket.exists()
        assert not residence.lock.exists()


def test_it_leaves_when_idle_and_the_next_job_starts_another(home: Path, new_owner: Callable[[], Owner]) -> None:
    owner = new_owner()
    where = context(home)
    first = TrainerClient(owner, PATIENCE).register(where, 0.05)
    wait_until(lambda: not trainers_of(owner))
    assert not Residence.of(owner).socket.exists()
    assert TrainerClient(owner, PATIENCE).register(where, 60.0) == first
    assert len(trainers_of(owner)) == 1


def test_one_with_other_code_retires(home: Path, new_owner: Callable[[], Owner]) -> None:
    """The app was updated while a trainer of the version before was alive."""
    owner = new_owner()
    old = home / "old-app"
    for package in ("proto", "fedalloy_adapters", "client_app"):
        shutil.copytree(ROOT / package, old / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (old / "client_app" / "slots.py").open("a") as file:
        file.write("# the version before\n")
    start = (
        "import sys\nfrom client_app.trainer.address import Owner\n"
        "from client_app.trainer.client import TrainerClient\n"
        "with TrainerClient(Owner.parse(sys.argv[1]), 100).connect() as (_, pid): print(pid)"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-c", start, str(owner)],
        env=os.environ | {"PYTHONPATH": str(old)},
        capture_output=True,
        text=True,
        check=True,
    )
    before = int(shown.stdout)
    assert trainers_of(owner) == [before]
    after = pid_of(owner)
    assert after != before
    assert trainers_of(owner) == [after]


# -------------------------------------------------------------------------------------------------------------- plans


def test_the_clientapp_imports_neither_torch_nor_transformers_nor_peft(home: Path, shared: Owner) -> None:
    """A registration and a plan through the real handlers, in a process as thin as Flower's."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.client_app.thin_worker", str(shared), str(home / "state")],
        cwd=ROOT,
        input=plan("thin").SerializeToString(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert said["client"] == "berlin"
    assert said["steps"] == 4
    assert said["uploads"] == ["a"]
    assert said["heavy"] == []


def test_answers_are_those_of_a_fresh_process_and_models_are_evicted(home: Path, shared: Owner) -> None:
    """Plan after plan on one model, and another client's settings in between."""
    here, other = context(home), context(home, 1, **{"lora-r": 2, "lora-dropout": 0.2})
    plans = [plan("here", round_) for round_ in (1, 2, 3)]
    found = [answer(*TrainerClient(shared, PATIENCE).carry_out(here, 60.0, request, {})) for request in plans[:2]]
    aside = answer(*TrainerClient(shared, PATIENCE).carry_out(other, 60.0, plan("other"), {}))
    found.append(answer(*TrainerClient(shared, PATIENCE).carry_out(here, 60.0, plans[2], {})))
    assert found == alone(here, *plans)
    assert [aside] == alone(other, plan("other"))
    assert len({repr(each) for each in found}) == 3


def test_large_blobs_cross_in_pieces(home: Path, shared: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter goes there and comes back, in pieces of 1000 bytes on the way there."""
    where = context(home)
    _, uploads = TrainerClient(shared, PATIENCE).carry_out(where, 60.0, plan("pieces"), {})
    monkeypatch.setattr("client_app.trainer.calls.CHUNK_BYTES", 1000)
    assert len(uploads["a"]) > 10_000
    back = plan_pb2.Plan(version=1, run_name="pieces", client_id="berlin", round=2, steps=[send(Training(), "a")])
    report, again = TrainerClient(shared, PATIENCE).carry_out(where, 60.0, back, {"a": uploads["a"]})
    assert len(again["a"]) == len(uploads["a"])
    assert report.results[0].send.content_digest in uploads["a"]


@pytest.mark.parametrize(
    ("error", "stays"), [(ValueError("no slot"), True), (RuntimeError("CUDA error"), False), (MemoryError(), False)]
)
def test_after_an_error_that_may_have_broken_the_process_it_leaves(home: Path, error: Exception, stays: bool) -> None:
    class Broken:
        def register(self, settings: Any) -> Any:
            raise error

    trainer = Trainer(b"digest")
    trainer._executor = Broken()  # type: ignore[assignment]
    job = trainer_pb2.Job(register=trainer_pb2.RegisterJob(), idle_seconds=0.01)
    job.node_config["partition-id"].integer = 0
    job.node_config["num-partitions"].integer = 1
    jobs = [PendingJob(job, {}), PendingJob(job, {})]
    for job_ in jobs:
        trainer._pending.put(job_)
    trainer.work()
    assert jobs[0].answers.get_nowait().failure.error == type(error).__name__  # type: ignore[union-attr]
    assert jobs[1].answers.empty() is not stays


def test_trainers_that_share_a_device_take_turns(tmp_path: Path) -> None:
    heard: list[str] = []
    first, released = threading.Event(), threading.Event()

    def hold() -> None:
        with turn(tmp_path, "gpu"):
            first.set()
            released.wait(PATIENCE)

    def listen(activity: str, done: int, total: int) -> None:
        heard.append(activity)
        if len(heard) == 3:
            raise Cancelled("enough")

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert first.wait(PATIENCE)
        with turn(tmp_path, "other"), turn(tmp_path, ""), turn(None, "gpu"):
            pass
        with listening(listen), pytest.raises(Cancelled), turn(tmp_path, "gpu"):
            pytest.fail("two at a time")
        assert heard == ["waiting for the device"] * 3
        released.set()
        held.result(PATIENCE)
        with turn(tmp_path, "gpu"):
            pass


def test_an_error_is_named_and_the_next_plan_runs(home: Path, shared: Owner) -> None:
    where = context(home)
    pid = pid_of(shared)
    with pytest.raises(JobFailedError, match=r"PlanError: client 'berlin', step 1 \(train\): no split 'nowhere'"):
        TrainerClient(shared, PATIENCE).carry_out(where, 60.0, plan("error", split="nowhere"), {})
    TrainerClient(shared, PATIENCE).carry_out(where, 60.0, plan("error"), {})
    assert pid_of(shared) == pid


def test_a_plan_that_nobody_waits_for_is_given_up_and_changes_nothing(home: Path, shared: Owner) -> None:
    """Its ClientApp was killed, which ends the call; or its deadline has passed."""
    where = context(home)
    TrainerClient(shared, PATIENCE).carry_out(where, 60.0, plan("late"), {})
    pid = pid_of(shared)

    def leave(job: str, progress: trainer_pb2.Progress) -> None:
        if progress.activity == "train":
            raise KeyboardInterrupt

    endless = plan("late", 2, steps=10**5)
    with pytest.raises(KeyboardInterrupt):
        TrainerClient(shared, PATIENCE, leave).carry_out(where, 60.0, endless, {})
    with pytest.raises(TrainerError, match=r"the plan of client 'berlin' for round 2 of run 'late' took longer"):
        TrainerClient(shared, 1.5).carry_out(where, 60.0, endless, {})
    after = answer(*TrainerClient(shared, PATIENCE).carry_out(where, 60.0, plan("late", 2), {}))
    assert [after] == alone(where, plan("late"), plan("late", 2))[1:]
    assert pid_of(shared) == pid


def test_killed_while_it_trains_it_is_replaced_and_the_plan_done_again(
    home: Path, new_owner: Callable[[], Owner]
) -> None:
    owner, where = new_owner(), context(home)
    slots = read_settings(where).run_directory("killed") / "slots"
    killed: list[int] = []
    kills, when = 1, "train"

    def kill(job: str, progress: trainer_pb2.Progress) -> None:
        if progress.activity == when and len(killed) < kills:
            killed.extend(trainers_of(owner))
            os.kill(killed[-1], signal.SIGKILL)

    first = answer(*TrainerClient(owner, PATIENCE, kill).carry_out(where, 60.0, plan("killed", steps=150), {}))
    assert len(killed) == 1
    assert [first] == alone(where, plan("killed", steps=150))
    kills, when = 3, "accepted"
    before = {path: path.read_bytes() for path in sorted(slots.rglob("*")) if path.is_file()}
    assert before
    with pytest.raises(TrainerError, match=r"ended while it carried out the plan .* and so did the one before it"):
        TrainerClient(owner, PATIENCE, kill).carry_out(where, 60.0, plan("killed", 2, steps=10**5), {})
    assert len(set(killed)) == 3
    assert {path: path.read_bytes() for path in sorted(slots.rglob("*")) if path.is_file()} == before


def test_a_run_with_resident_trainers_has_the_numbers_of_one_without(
    home: Path, base_cache: Path, shared: Owner, new_owner: Callable[[], Owner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy whose plans have most kinds of steps; dropout, and int8 with what it left behind."""
    options: dict[str, Any] = {"strategy": "potara", "num_server_rounds": 2, "local_steps": 4, "lora_dropout": 0.1}
    options |= {"uplink_encoding": "int8", "run_name": "same", "potara__local_steps": 4, "potara__search_points": 3}
    for way in ("off", "on"):
        (home / "runs" / way).mkdir(parents=True)
        (home / "runs" / way / ".cache").symlink_to(base_cache)
    run_in_process(home / "runs" / "off", 2, **options)
    by_node: dict[int, Owner] = {FIRST_NODE: shared, FIRST_NODE + 1: new_owner()}
    asked: list[int] = []
    answer_of = InProcessGrid.answer

    def answer(self: InProcessGrid, message: Any) -> Any:
        asked.append(message.metadata.dst_node_id)
        return answer_of(self, message)

    monkeypatch.setattr(InProcessGrid, "answer", answer)
    monkeypatch.setattr("client_app.trainer.bundled.find_owner", lambda: by_node[asked[-1]])
    run_in_process(home / "runs" / "on", 2, **options)
    assert all(trainers_of(owner) for owner in by_node.values())
    off, on = (home / "runs" / way / "same" for way in ("off", "on"))
    assert (
        json.loads((on / "summary.json").read_text())["clients"]
        == (json.loads((off / "summary.json").read_text())["clients"])
    )
    weights = sorted(path.relative_to(off) for path in off.rglob("adapter*.safetensors"))
    assert len(weights) >= 4
    assert [(on / path).read_bytes() for path in weights] == [(off / path).read_bytes() for path in weights]
