"""A site as docs/site.md has it: the service is one user without a network, and what a run brings is another.

What the ClientApp of a run can do beyond its relay is tried by a program that runs as its user: files of the owner, the
service's process, its socket from a third user. It is what the two containers of docker/distributed/client-site.yaml
have, without their images.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from client_app.site.audit import audit
from tests.toys import tiny_models, toy_data

ROOT = Path(__file__).parents[2]
OWNER, RUN, STRANGER = 49998, 49999, 49997
SECONDS = 600.0
"""A machine that is busy with other tests takes minutes to import torch for three processes."""
HOSTILE = """
import json, os, socket, sys
found = {}
def attempt(name, act):
    try:
        act()
        found[name] = "done"
    except Exception as error:
        found[name] = type(error).__name__
site, path, service, base = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
attempt("read the data", lambda: open(f"{site}/data.jsonl").read())
attempt("list the site", lambda: os.listdir(site))
attempt("change the policy", lambda: open(f"{site}/site.toml", "a").write("x"))
attempt("end the service", lambda: os.kill(service, 9))
attempt("take the socket away", lambda: os.unlink(path))
attempt("open the socket", lambda: socket.socket(socket.AF_UNIX).connect(path))
if found["open the socket"] == "done":
    from flwr.app import Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    from client_app.trainer import relay
    from fedalloy_adapters.wire.flower_records import REGISTER_TYPE, pack, unpack
    from proto.fedalloy.v1 import plan_pb2, report_pb2
    node = {"client-id": "ada", "site-socket": path, "data-path": "/etc/passwd"}
    context = Context(1, 7, node, RecordDict(), {"base-model": base})
    for run in ("study-1", "another"):
        content = pack("request", plan_pb2.RegisterRequest(version=1, run_name=run))
        def ask():
            answer = relay.register(Message(content, 7, REGISTER_TYPE, ttl=600.0), context)
            said = unpack(answer.content, "registration", report_pb2.Registration)[0]
            assert said.trainer == report_pb2.TRAINER_MODE_INSTALLED
            found["examples"] = said.tasks[0].examples["train"]
        attempt(f"register for {run}", ask)
    found["torch"] = "torch" in sys.modules
print(json.dumps(found))
"""


def as_user(user: int, *command: str, network: bool = True) -> list[str]:
    """A command that another user runs, without any privilege, and without a network where that is asked for."""
    away = [] if network else ["unshare", "--net"]
    group = STRANGER if user == STRANGER else RUN
    return [*away, "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all", *command]


@dataclass
class Site:
    """A service, and where its things are."""

    folder: Path
    socket: Path
    base: Path
    process: subprocess.Popen[bytes]


def environment_of(folder: Path) -> dict[str, str]:
    """Of a process of another user: a home of its own, this checkout, one thread."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "HF_HUB_OFFLINE")}
    return {**kept, "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}


@pytest.fixture
def site() -> Iterator[Site]:
    if os.geteuid() or not all(map(shutil.which, ("setpriv", "unshare"))):
        pytest.skip("needs root, to be other users, and the commands setpriv and unshare")
    folder = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    folder.chmod(0o755)
    tried = subprocess.run(
        as_user(OWNER, sys.executable, "-c", "from proto.fedalloy.v1 import plan_pb2", network=False),
        env=environment_of(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"another user cannot run this environment: {tried.stderr.strip()[-200:]}")
    base = tiny_models.save_bert(folder / "models" / "bert", toy_data.VOCABULARY)
    for path in (base.parent, base, *base.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a base model is no secret
    own, at = folder / "site", folder / "run"
    own.mkdir()
    toy_data.write_jsonl(own / "data.jsonl", toy_data.opinions(40, 0))
    (own / "site.toml").write_text(
        f'socket = "{at}/socket"\nsocket-group = "{RUN}"\nruns = ["study-*"]\nservers = ["any"]\n'
        f'base-models = ["{base}"]\n'
        '[client]\nclient-id = "ada"\nstate-dir = "state"\ndata-path = "data.jsonl"\nlabels = "neg,pos"\n'
    )
    for path in (own / "data.jsonl", own / "site.toml", own):
        os.chown(path, OWNER, OWNER)
        path.chmod(0o700 if path.is_dir() else 0o600)
    at.mkdir()
    os.chown(at, OWNER, RUN)
    at.chmod(0o750)
    serve = [sys.executable, "-c", "from server_app.tools.cli import app; app()", "site", "serve"]
    command = as_user(OWNER, *serve, str(own / "site.toml"), network=False)
    process = subprocess.Popen(command, env=environment_of(own), cwd=own)
    try:
        yield Site(own, at / "socket", base, process)
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


def attempts(site: Site, user: int) -> dict[str, object]:
    """What a program of this user gets done."""
    command = as_user(user, sys.executable, "-c", HOSTILE, str(site.folder), str(site.socket), str(site.process.pid))
    ran = subprocess.run(
        [*command, str(site.base)],
        env=environment_of(site.folder.parent),
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(3 * SECONDS)
def test_what_a_run_brings_gets_at_nothing_but_the_socket(site: Site) -> None:
    until = time.monotonic() + SECONDS
    while not site.socket.exists():
        assert site.process.poll() is None, "the service has ended"
        assert time.monotonic() < until, "the service does not listen"
        time.sleep(0.2)
    kept_out = ("read the data", "list the site", "change the policy", "end the service", "take the socket away")
    found = attempts(site, RUN)
    assert {name: found[name] for name in kept_out} == dict.fromkeys(kept_out, "PermissionError")
    assert (found["register for study-1"], found["examples"]) == ("done", 32)
    assert found["register for another"] == "SiteError"
    assert found["torch"] is False
    stranger = attempts(site, STRANGER)
    assert set(stranger.values()) == {"PermissionError"}
    record = site.folder / "state" / "records" / "ada.jsonl"
    assert not audit(record).problems
    events = [json.loads(line) for line in record.read_text().splitlines()]
    assert [event["event"] for event in events] == ["ignored", "registered", "refused"]
    assert events[0]["values"] == {"node-config data-path": "/etc/passwd"}
    assert (record.stat().st_uid, record.stat().st_mode & 0o777) == (OWNER, 0o600)
