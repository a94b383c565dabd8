"""Sites as docs/site.md has them: one user's service without a network, and another user's code of the run.

The federation is real: ``fedalloy cluster`` and ``fedalloy run`` of the second user, whose SuperNodes have relays. What
else a ClientApp of that user could do is tried by a program of its own: files of the owner, the service's process, its
socket from a third user. It is what the two containers of docker/distributed/client-site.yaml have, without their
images.
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
from typing import Any

import pytest

from client_app.site.audit import audit
from server_app.ledger.store import Ledger
from tests.toys import tiny_models, toy_data

ROOT = Path(__file__).parents[2]
OWNER, RUN, STRANGER = 49998, 49999, 49997
SECONDS = 900.0
"""A machine that is busy with other tests takes minutes to import torch for several processes."""
FEDALLOY = (sys.executable, "-c", "from server_app.tools.cli import app; app()")
CAN_RUN = """
import subprocess, sys
from proto.fedalloy.v1 import plan_pb2
subprocess.run([sys.executable, "-c", ""], check=True)
"""
"""Python starts Python: ``setpriv`` can still start one in a folder of root's, but that one can start no other."""
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
    context = Context(1, 7, node, RecordDict(), {"base-model": base, "data-path": "/etc/passwd"})
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
    """A command that another user runs, without any privilege, and if asked for without a network."""
    away = [] if network else ["unshare", "--net"]
    group = STRANGER if user == STRANGER else RUN
    return [*away, "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all", *command]


@dataclass
class Site:
    """A client's service, and where its things are."""

    folder: Path
    socket: Path
    process: subprocess.Popen[bytes]

    @property
    def record(self) -> Path:
        return self.folder / "state" / "records" / f"{self.folder.name}.jsonl"


@dataclass
class Sites:
    """The sites of clients ada and ben, a base model that everybody may read, and the second user's folder."""

    of: dict[str, Site]
    base: Path
    home: Path


def environment_of(folder: Path) -> dict[str, str]:
    """The environment of another user's process: a home of its own, this checkout, one thread."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "HF_HUB_OFFLINE")}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {**kept, **quiet, "HOME": str(folder), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def start(folder: Path, name: str, base: Path) -> Site:
    """A client's own folder, its file, and the service."""
    own, at = folder / name, folder / f"{name}-socket"
    own.mkdir()
    toy_data.write_jsonl(own / "data.jsonl", toy_data.opinions(40, 0))
    (own / "site.toml").write_text(
        f'socket = "{at}/socket"\nsocket-group = "{RUN}"\nruns = ["study-*"]\nservers = ["any"]\n'
        f'base-models = ["{base}"]\n'
        f'[client]\nclient-id = "{name}"\nstate-dir = "state"\ndata-path = "data.jsonl"\nlabels = "neg,pos"\n'
    )
    for path in (own / "data.jsonl", own / "site.toml", own):
        os.chown(path, OWNER, OWNER)
        path.chmod(0o700 if path.is_dir() else 0o600)
    at.mkdir()
    os.chown(at, OWNER, RUN)
    at.chmod(0o750)
    command = as_user(OWNER, *FEDALLOY, "site", "serve", str(own / "site.toml"), network=False)
    return Site(own, at / "socket", subprocess.Popen(command, env=environment_of(own), cwd=own))


@pytest.fixture(scope="module")
def sites() -> Iterator[Sites]:
    if os.geteuid() or not all(map(shutil.which, ("setpriv", "unshare"))):
        pytest.skip("needs root, to be other users, and the commands setpriv and unshare")
    folder = Path(tempfile.mkdtemp(prefix="fa", dir="/tmp"))
    folder.chmod(0o755)
    tried = subprocess.run(
        as_user(OWNER, sys.executable, "-c", CAN_RUN, network=False),
        env=environment_of(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"another user cannot run this environment: {tried.stderr.strip().splitlines()[-1][:200]}")
    base, home = tiny_models.save_bert(folder / "models" / "bert", toy_data.VOCABULARY), folder / "home"
    for path in (base.parent, base, *base.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a base model is no secret
    home.mkdir()
    os.chown(home, RUN, RUN)
    found = Sites({}, base, home)
    try:
        found.of |= {name: start(folder, name, base) for name in ("ada", "ben")}
        until = time.monotonic() + SECONDS
        while not all(site.socket.exists() for site in found.of.values()):
            assert all(site.process.poll() is None for site in found.of.values()), "a service has ended"
            assert time.monotonic() < until, "the services do not listen"
            time.sleep(0.2)
        yield found
    finally:
        for site in found.of.values():
            site.process.terminate()
            site.process.wait(60)
        shutil.rmtree(folder)


def attempts(sites: Sites, user: int) -> dict[str, Any]:
    """What a program of this user gets done at ada's."""
    ada = sites.of["ada"]
    words = (str(ada.folder), str(ada.socket), str(ada.process.pid), str(sites.base))
    ran = subprocess.run(
        as_user(user, sys.executable, "-c", HOSTILE, *words),
        env=environment_of(sites.home),
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def events(site: Site) -> list[dict[str, Any]]:
    """Lines of a site's record."""
    return [json.loads(line) for line in site.record.read_text().splitlines()]


@pytest.mark.timeout(3 * SECONDS)
def test_what_a_run_brings_gets_at_nothing_but_the_socket(sites: Sites) -> None:
    kept_out = ("read the data", "list the site", "change the policy", "end the service", "take the socket away")
    found = attempts(sites, RUN)
    assert {name: found[name] for name in kept_out} == dict.fromkeys(kept_out, "PermissionError")
    assert (found["register for study-1"], found["examples"]) == ("done", 32)
    assert found["register for another"] == "SiteError"
    assert found["torch"] is False
    stranger = attempts(sites, STRANGER)
    assert set(stranger.values()) == {"PermissionError"}
    record = sites.of["ada"].record
    assert not audit(record).problems
    noted = events(sites.of["ada"])
    ignored = [event["values"] for event in noted if event["event"] == "ignored"]
    assert {"data-path": "/etc/passwd"} in ignored
    said = {event["run"]: event["event"] for event in noted if event.get("run") in ("study-1", "another")}
    assert said == {"study-1": "registered", "another": "refused"}
    assert (record.stat().st_uid, record.stat().st_mode & 0o777) == (OWNER, 0o600)


def types(sites: Sites, *words: str) -> str:
    """A ``fedalloy`` command of the second user, in its folder; what it said."""
    done = subprocess.run(
        as_user(RUN, *FEDALLOY, *words),
        env=environment_of(sites.home),
        cwd=sites.home,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@pytest.mark.timeout(5 * SECONDS)
def test_a_run_of_two_sites_finishes_and_the_records_have_the_ledgers_bytes(sites: Sites) -> None:
    tables = [f'[{name}]\nsite-socket = "{site.socket}"\n' for name, site in sites.of.items()]
    (sites.home / "clients.toml").write_text("".join(tables))
    config = (
        f"run-name='study-7' strategy='fedmerge' num-server-rounds=1 local-steps=2 site-mode='required' min-clients=2 "
        f"base-model='{sites.base}' startup-timeout={SECONDS} round-timeout={SECONDS}"
    )
    try:
        types(sites, "cluster", "up", "--clients-file", "clients.toml")
        said = types(sites, "run", config, "--no-check")
    finally:
        types(sites, "cluster", "down")
    assert "finished: " in said
    run = sites.home / "runs" / "study-7"
    assert sorted(json.loads((run / "summary.json").read_text())["clients"]) == ["ada", "ben"]
    with Ledger(run / "ledger.sqlite", read_only=True) as ledger:
        rows = [row for row in ledger.accounts().rows() if row.direction == "up"]
    for name, site in sites.of.items():
        found = audit(site.record)
        assert not found.problems
        booked = sum(row.tensor for row in rows if row.client == name)
        assert found.runs["study-7"].numbers == booked > 0
        slots = site.folder / "state" / "study-7" / "clients" / name / "slots"
        assert slots.stat().st_uid == OWNER
        assert not (run / "clients" / name).exists()  # the second user has nothing of the client's
