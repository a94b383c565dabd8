"""Whole runs in forked children that kill themselves at a chosen moment; started as a module by ``killing.py``.

PyTorch, base model and data are loaded once. Reads one JSON object a line, forks a child for each, prints what became
of it. A child is server and clients in one process, or (``client_kill_at``) a server whose clients are processes of
their own. A *moment* is a touch of the file system (counted by an audit hook), a message that is pushed, or an answer
that is taken: everything before and after which the world looks different.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict

from client_app.session import Executor
from client_app.settings import read_settings
from fedalloy_adapters.wire.flower_records import PLAN_TYPE, pack, unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from tests.in_process import InProcessGrid

TOUCHES = {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove"}
CLIENTS = 2
TORN_BYTES = 700
"""Some files are shorter, most are not."""


class Moments:
    """Counts; at the chosen one the process kills or terminates itself, or the disk is full from then on.

    ``how`` is "kill", "terminate" (SIGTERM, which ends the process), "exit" (SIGTERM with a handler that leaves through
    every ``finally``, as Flower's), "full" (nothing can be created), or "torn" (a write stops after some bytes).
    """

    def __init__(self, kill_at: int = 0, how: str = "kill", after_round: int = 0) -> None:
        self.count, self.kill_at, self.how = 0, kill_at, how
        self.checkpoint = f"round-{after_round:04d}" if after_round else None

    def touch(self) -> None:
        self.count += 1
        if not self.kill_at or self.count < self.kill_at:
            return
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.count > self.kill_at:
            return
        if self.how == "torn":  # the kernel writes up to here, then says that the file is too large
            resource.setrlimit(resource.RLIMIT_FSIZE, (TORN_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        if self.how == "exit":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGTERM)

    def watch_files(self, below: Path) -> None:
        """Only writes, and only of the run: what the interpreter and libraries read is no moment."""
        folder = str(below)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in TOUCHES or not any(str(a).startswith(folder) for a in arguments[:2]):
                return
            reads = event == "open" and (len(arguments) < 3 or not arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if not reads:
                self.touch()
            if event == "os.rename" and self.checkpoint and str(arguments[1]).endswith(self.checkpoint):
                self.kill_at = self.count + 1  # the checkpoint is there, and nothing after it

        sys.addaudithook(hook)


class ResidentGrid(InProcessGrid):
    """Clients keep their models between messages, as those with a resident trainer do."""

    executors: dict[int, Executor]
    moments: Moments
    client_kill_at: int = 0
    runs: Path

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.moments.touch()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        if replies:
            self.moments.touch()
        return replies

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type != PLAN_TYPE:
            return super().answer(message)
        if self.client_kill_at:
            return self._answer_in_child(message)
        return self._carry_out(message)

    def _carry_out(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        plan, blobs = unpack(message.content, "plan", plan_pb2.Plan)
        try:
            report, uploads = self.executors[node_id].carry_out(read_settings(self.context(node_id)), plan, blobs)
        except Exception as error:
            traceback.print_exc()
            return Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        return Message(pack("report", report, uploads), reply_to=message)

    def _answer_in_child(self, message: Message) -> Message:
        """SIGKILL at one moment of all that clients do; Flower then says that the ClientApp stopped responding."""
        counted = self.runs / ".moments"
        answer = counted.with_suffix(".answer")
        before = int(counted.read_text()) if counted.exists() else 0
        pid = os.fork()
        if not pid:
            moments = Moments(max(0, self.client_kill_at - before))
            moments.watch_files(self.runs)
            reply = self._carry_out(message)
            moments.kill_at = 0
            if reply.has_error():
                os._exit(1)
            report, blobs = unpack(reply.content, "report", report_pb2.Report)
            parts = {name: blob.hex() for name, blob in {**blobs, "": report.SerializeToString()}.items()}
            answer.write_text(json.dumps([moments.count, parts]))
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            counted.write_text(str(10**9))  # once is enough
            return Message(Error(code=8, reason="ClientApp stopped responding."), reply_to=message)
        assert status == 0, "the client failed"
        count, parts = json.loads(answer.read_text())
        counted.write_text(str(before + count))
        blobs = {name: bytes.fromhex(part) for name, part in parts.items()}
        report = report_pb2.Report.FromString(blobs.pop(""))
        return Message(pack("report", report, blobs), reply_to=message)


def config_of(runs: Path, task: dict[str, Any]) -> dict[str, Any]:
    small = {
        "num-server-rounds": 3, "local-steps": 2, "batch-size": 4, "min-clients": CLIENTS, "lora-r": 2,
        "keep-checkpoints": 2, "poll-interval": 0.01, "potara.search-points": 3,
        "potara.fisher-samples": 2, "run-name": task["name"], "runs-dir": str(runs),
    }  # fmt: skip
    return small | task["config"]


def run(runs: Path, executors: dict[int, Executor], task: dict[str, Any]) -> int:
    """Start or resume the run of a task; how many moments it had."""
    from server_app.run.loop import run as start

    config = config_of(runs, task)
    if task["resume"]:
        config["resume"] = str(runs / task["name"])
    grid = ResidentGrid(CLIENTS, runs, config)
    grid.executors, grid.runs, grid.client_kill_at = executors, runs / task["name"], task["client_kill_at"]
    grid.moments = Moments(task["kill_at"], task["how"], task["kill_after_round"])
    if not task["client_kill_at"]:
        grid.moments.watch_files(grid.runs)
    if shift := task.get("clock"):
        turn_clock(shift)
    start(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    return grid.moments.count


def turn_clock(seconds: float) -> None:
    """From its 20th look on, the wall clock is off by so many seconds."""
    real, looks = time.time, [0]

    def jumped() -> float:
        looks[0] += 1
        return real() + (seconds if looks[0] > 20 else 0.0)

    time.time = jumped


def child(work: Callable[[], int]) -> tuple[int, int]:
    """Fork; the wait status, and what the child's work returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.write(writer, f"{work()}\n".encode())
            status = 0
        except BaseException as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, 2 * resource.getrlimit(resource.RLIMIT_FSIZE)[1:])  # for the log
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writer)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(reader) as said:
        return status, int(said.read() or 0)


def main() -> None:
    torch.set_num_threads(1)
    runs = Path(sys.argv[1])
    first = config_of(runs, {"name": "none", "config": {}})
    grid = InProcessGrid(CLIENTS, runs, first)
    executors = {node_id: Executor() for node_id in grid.get_node_ids()}
    for node_id, executor in executors.items():
        executor.register(read_settings(grid.context(node_id)))
        assert executor._held is not None
        data = executor._held[1]  # a dozen examples are enough to be different numbers
        few = {name: split.subset(torch.arange(min(len(split), 12))) for name, split in data.splits.items()}
        executor._held = (executor._held[0], dataclasses.replace(data, splits=few))
    import server_app.run.loop  # noqa: F401  everything that a child would import

    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        status, moments = child(lambda task=task: run(runs, executors, task))  # type: ignore[misc]
        print(json.dumps({"status": status, "moments": moments}), flush=True)


if __name__ == "__main__":
    main()
