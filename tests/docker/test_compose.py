"""The compose files for real: build, demo, ledger against interface counters, and everything that can fail does."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client_app.site.audit import audit_lines
from examples import three_clients
from server_app.ledger.connections import OTHER
from server_app.ledger.reconciliation import Accounts
from server_app.ledger.store import Ledger
from tests.docker.engine import CAP, ENGINE
from tests.docker.site import CLIENT as SITE_CLIENT
from tests.docker.site import OWNER, ClientSite
from tests.docker.stack import CLIENTS, Stack

MAX_IMAGE = 2_000_000_000
LEFT_FOR_THE_REST = 520.0
"""Seconds of the cap that the tests after own data may need, and own data themselves."""
LEFT_FOR_SUBPROCESSES = 150.0
Counts = dict[str, dict[str, int]]  # bytes by client and direction

pytestmark = [pytest.mark.docker, pytest.mark.timeout(CAP + 180)]


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A project with its image built; nothing runs yet."""
    found = request.config.stash[ENGINE]
    with found.cleanup:
        stack = Stack(tmp_path_factory.mktemp("checkout"), found.environment, found.deadline)
        try:
            stack.build()
            yield stack
        finally:
            stack.close()


def summary(stack: Stack, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stack.folder / "runs" / name / "summary.json").read_text())
    return found


def demo(stack: Stack, rounds: int) -> str:
    """The documented command, with less to do."""
    less = ["--strategies", "fedmerge", "--clients", "3", "--rounds", str(rounds), "--set"]
    less += ["local-steps=20 lora-r=32 uplink-encoding='fp32' downlink-encoding='fp32'"]  # as in e2e/test_cluster.py
    return stack.compose("run", "--rm", "-T", "cli", "demo", *less)


def check_ledger(stack: Stack, name: str) -> None:
    """The run's ledger against both of its ends, and against the interfaces of the pods."""
    accounts, counted, other_end = read_ledger(stack, name)
    fraction = accounts.unexplained_fraction()
    assert fraction is not None
    assert fraction < 0.01, accounts.reconciliation()
    crossed = on_the_interfaces(stack, name)
    print(f"{name}: ledger {counted}, interfaces {crossed}")
    for direction in ("up", "down"):
        for client in CLIENTS:
            assert counted[client][direction] == pytest.approx(crossed[client][direction], rel=0.02), client
            # A segment that arrived twice crossed twice, but its receiver's kernel counts its data once.
            arrived = counted[client][direction] - retransmitted(accounts, client, direction)
            assert other_end[client][direction] == pytest.approx(arrived, rel=0.01), client
        total = sum(counted[client][direction] for client in CLIENTS)
        assert total == pytest.approx(crossed["server"][direction], rel=0.02)


def on_the_interfaces(stack: Stack, name: str) -> Counts:
    """Bytes on the pods' interfaces, from the ledger's first to its last reading; ``server`` sees all clients."""
    with sqlite3.connect(f"file:{ledger_of(stack, name)}?mode=ro", uri=True) as db:
        ((start, end),) = db.execute("SELECT min(time), max(time) FROM reading WHERE event IN ('start', 'final')")
    looked = {who: meter.between(start, end) for who, meter in stack.meters.items()}
    return {
        who: {"up": received, "down": sent} if who == "server" else {"up": sent, "down": received}
        for who, (received, sent) in looked.items()
    }


def read_ledger(stack: Stack, name: str) -> tuple[Accounts, Counts, Counts]:
    """The run's accounts, and its wire bytes per client and direction at each direction's sender and receiver."""
    with Ledger(ledger_of(stack, name), read_only=True) as ledger:
        accounts = ledger.accounts()
    assert not accounts.not_measured()
    assert not accounts.unjoined()
    assert {row.client for row in accounts.rows()} - {OTHER} == set(CLIENTS)
    counted: Counts = {client: {"up": 0, "down": 0} for client in CLIENTS}
    other_end: Counts = {client: {"up": 0, "down": 0} for client in CLIENTS}
    for row in accounts.rows():
        if row.client == OTHER:
            continue
        counted[row.client][row.direction] += row.wire or 0  # None: a message to a client that was not there
        other_end[row.client][row.direction] += row.other_end or 0
    return accounts, counted, other_end


def retransmitted(accounts: Accounts, client: str, direction: str) -> int:
    """Payload bytes that their sender sent again."""
    links = [link for link in accounts.links if link.client == client]
    return sum(piece.retransmitted for link in links for _, piece, _ in getattr(link, direction)())


def ledger_of(stack: Stack, name: str) -> Path:
    return stack.folder / "runs" / name / "ledger.sqlite"


def test_the_image_is_small_and_runs_as_a_user(stack: Stack, record_property: Any) -> None:
    size, user = json.loads(
        stack.docker("image", "inspect", stack.image, "--format", '[{{.Size}}, "{{.Config.User}}"]')
    )
    record_property("image_bytes", size)
    print(f"image: {size / 1e6:.0f} MB")
    assert size < MAX_IMAGE
    assert user == "app"
    assert stack.docker("run", "--rm", stack.image, "id", "-u").strip() == "49999"
    inside = stack.docker("run", "--rm", stack.image, "sh", "-c", "ls -A /app/data /app/runs /app/keys /app/state")
    assert re.findall(r"^[^/\n].*$", inside, re.MULTILINE) == [], "data, runs and keys stay out of the image"


FILES = [
    ["compose.yaml", "subprocess.yaml"],
    ["compose.yaml", "with-data.yaml"],
    ["compose.yaml", "with-gpu.yaml"],
    ["compose.yaml", "with-data.yaml", "with-gpu.yaml"],
    ["distributed/server.yaml"],
    ["distributed/client.yaml"],
    ["distributed/client.yaml", "distributed/client-gpu.yaml"],
    ["distributed/client-site.yaml"],
]


@pytest.mark.parametrize("files", FILES, ids="+".join)
def test_every_combination_of_files_is_valid(stack: Stack, files: list[str]) -> None:
    """Those that are not run here (other machines, GPUs) at least parse, with the variables that the README sets."""
    given = {
        "FEDALLOY_DATA": "/srv",
        "SERVER": "superlink",
        "CLIENTS": "berlin",
        "CLIENT_ID": "berlin",
        "KEYS": "/keys",
        "SITE": "/srv/site",
        "DATA": "/srv/berlin",
        "MODELS": "/srv/models",
    }
    arguments = [argument for name in files for argument in ("-f", str(stack.folder / "docker" / name))]
    stack.docker("compose", *arguments, "config", "--quiet", environment=given)


def test_the_demo_prints_its_table_and_leaves_runs_to_their_owner(stack: Stack) -> None:
    """Process isolation, the default."""
    stack.compose("up", "--detach", "server-pod", *(f"{client}-pod" for client in CLIENTS))
    stack.start_meters()
    said = demo(stack, 2)
    assert re.search(r"fedmerge\s+│\s+0\.\d{3}\s+│\s+0\.\d{3}\s+│\s+\d+\.\d\d\s+│\s+\d+\.\d\d", said), said
    found = summary(stack, "demo-fedmerge")
    assert set(found["clients"]) == set(CLIENTS)
    assert found["mean_accuracy"] > 0.3, "chance is 0.1"
    run = stack.folder / "runs" / "demo-fedmerge"
    mine = os.stat(stack.folder / "pyproject.toml")
    for path in [run.parent, run, *run.rglob("*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == (mine.st_uid, mine.st_gid), path
    for client in CLIENTS:
        assert (run / "clients" / client / "adapter" / "adapter_model.safetensors").exists()
    check_ledger(stack, "demo-fedmerge")
    # The README's command, on a volume that it may only read.
    said = stack.cli("fedalloy", "traffic", "/app/runs/demo-fedmerge")
    assert "client-2" in said
    assert "unexplained" in said
    # The container that trains never sees a private key.
    assert stack.compose("exec", "-T", "superexec-clientapp-0", "sh", "-c", "ls -A /app/keys").strip() == ""


def test_a_key_is_renewed_and_the_others_stay(stack: Stack) -> None:
    def digests() -> dict[str, str]:
        look = "cd /app/keys/public && sha256sum *"
        said = stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "certificates", "-c", look)
        return {name: digest for digest, name in (line.split() for line in said.splitlines())}

    before = digests()
    said = stack.compose("run", "--rm", "-T", "certificates", "--renew", "client-3")
    assert "client-3: key pair made" in said
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"client-3.pub"}


def test_an_unregistered_key_is_refused(stack: Stack) -> None:
    command = (
        "fedalloy certificates /tmp/k --clients stranger && exec flower-supernode --superlink=superlink:9092 "
        "--root-certificates=/app/keys/public/ca.crt --port=9095 "
        "--auth-supernode-private-key=/tmp/k/clients/stranger/stranger"
    )
    said = stack.compose(
        "run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "supernode-0", "-c", command, check=False
    )
    assert "Failed to activate SuperNode" in said, said


def test_own_data_reach_the_container_that_trains_and_no_other(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The worked example's model and data, mounted as docs/containers.md says, and in a site as docs/site.md has it.

    One run of three clients of compose.yaml and one of client-site.yaml.
    """
    if stack.remaining() < LEFT_FOR_THE_REST:
        pytest.skip("own data: this machine is slow, and the faults come first within the cap of 25 minutes")
    folder = tmp_path_factory.mktemp("own-data")
    site = ClientSite(stack, folder / SITE_CLIENT)
    write_own_data(folder, site)
    services = [f"{kind}-{number}" for kind in ("supernode", "superexec-clientapp") for number in range(3)]
    stack.environment["FEDALLOY_DATA"] = str(folder)
    stack.overlays = ["with-data.yaml"]
    stack.compose("up", "--detach", "superexec-serverapp", *services)
    try:
        site.up()
        config: dict[str, Any] = {
            "run-name": "own",
            "runs-dir": "/app/runs",
            "strategy": "fedavg",
            "base-model": "/app/models/base",
        }
        config |= {"target-modules": "all-linear", "num-server-rounds": 1, "local-steps": 5, "min-clients": 4}
        config |= {"startup-timeout": 600.0, "round-timeout": 600.0}
        text = " ".join(f"{key}={value!r}" for key, value in config.items())
        stack.cli("flwr", "run", ".", "fedalloy", "--stream", "--run-config", text)
        assert set(summary(stack, "own")["clients"]) == {*CLIENTS, SITE_CLIENT}
        seen = stack.compose("exec", "-T", "superexec-clientapp-1", "sh", "-c", "cat /app/data/*.jsonl")
        assert three_clients.GREETINGS["paris"] in seen
        assert three_clients.GREETINGS["berlin"] not in seen
        assert stack.compose("exec", "-T", "supernode-1", "sh", "-c", "ls -A /app/data").strip() == ""
        check_site(stack, site)
    finally:
        site.close()
        stack.overlays = []
    stack.compose("up", "--detach", *services)


def write_own_data(folder: Path, site: ClientSite) -> None:
    """A folder for each client of compose.yaml, one of models, and the site's own data and models."""
    three_clients.write(folder / "example")
    (folder / "example" / "base").rename(_made(folder / "models") / "base")
    shutil.copytree(folder / "models", _made(site.folder) / "models")
    places = [*(folder / client for client in CLIENTS), site.folder / "data"]
    for own, name in zip(places, [*three_clients.GREETINGS, "rome"], strict=True):
        lines = (folder / "example" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        _made(own)
        for split, chosen in {"train": lines[:40], "validation": lines[40:50], "test": lines[50:]}.items():
            (own / f"{split}.jsonl").write_text("".join(chosen))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def check_site(stack: Stack, site: ClientSite) -> None:
    """Its data are in a container without a network, the run's code has only the socket, and its record adds up."""
    assert site.mounts("site") == {"/run/fedalloy", "/site", "/data", "/models"}
    assert site.mounts("superexec-clientapp") == {"/run/fedalloy"}
    assert site.inside("site", "ls /sys/class/net").split() == ["lo"]
    assert site.inside("site", "id -u").strip() == OWNER
    assert "Permission denied" in site.inside("superexec-clientapp", "rm /run/fedalloy/socket")
    rounds = (stack.folder / "runs" / "own" / "rounds.jsonl").read_text().splitlines()
    (registered,) = [record["clients"] for record in map(json.loads, rounds) if record["phase"] == "register"]
    modes = {client: said["trainer"] for client, said in registered.items()}
    assert modes == dict.fromkeys(CLIENTS, "bundled") | {SITE_CLIENT: "installed"}
    said = site.inside("site", "fedalloy site audit /site/site.toml")
    assert "the chain is whole" in said, said
    found = audit_lines(site.inside("site", f"cat /site/state/records/{SITE_CLIENT}.jsonl").encode().splitlines(True))
    with Ledger(ledger_of(stack, "own"), read_only=True) as ledger:
        up = [row for row in ledger.accounts().rows() if row.client == SITE_CLIENT and row.direction == "up"]
    assert found.runs["own"].numbers == sum(row.tensor for row in up) > 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_run_survives_what_happens_to_its_machines(stack: Stack) -> None:
    """SuperLink killed and restarted, a client killed mid-round and back later, another's network cut and healed."""
    name, rounds = "faults", 12  # a round takes seconds, and there must be some left when everybody is back
    stack.submit(name, num_server_rounds=rounds, min_clients=2, round_timeout=75.0, local_steps=20)
    stack.wait_for_round(name, "register")

    stack.compose("kill", "--signal", "KILL", "superlink")
    stack.compose("start", "superlink")
    stack.wait_for_round(name, "train", 1)

    slots = "cat /app/runs/faults/clients/client-2/slots/*/adapter_model.safetensors | sha256sum"
    stack.compose("kill", "--signal", "KILL", "supernode-2", "superexec-clientapp-2")
    killed = time.monotonic()
    before = stack.compose("exec", "-T", "superexec-serverapp", "sh", "-c", slots)
    # Until it counts as offline, a killed client is refused.
    stack.wait_for("a minute to pass", lambda: time.monotonic() > killed + 50)
    stack.compose("start", "supernode-2", "superexec-clientapp-2")
    assert stack.compose("exec", "-T", "superexec-clientapp-2", "sh", "-c", slots) == before

    stack.wait_for("client-2 to be back", lambda: trained_again(stack, name, "client-2"))
    network, pod = f"{stack.project}_fleet", stack.container("client-1-pod")
    stack.docker("network", "disconnect", network, pod)
    time.sleep(8)
    stack.docker("network", "connect", network, pod)
    stack.wait_for_round(name, "counters")
    stack.cli("true")

    records = stack.rounds(name)
    trained = {record["round"]: record["clients"] for record in records if record["phase"] == "train"}
    assert sorted(trained) == list(range(1, rounds + 1))
    assert all(record["status"] == "ok" for record in trained[1].values()), "the SuperLink's restart cost an answer"
    assert trained[2]["client-2"]["status"] == "left"
    for client in ("client-1", "client-2"):
        assert trained[rounds][client]["status"] == "ok", f"{client}: {trained}\n{stack.logs()}"
    assert all(clients["client-0"]["status"] == "ok" for clients in trained.values())
    found = summary(stack, name)
    assert set(found["clients"]) == set(CLIENTS)
    assert found["mean_accuracy"] > 0.3
    # Killed processes take their last counters with them, and attempts to connect that failed belong to no client; but
    # nothing is counted that did not cross, and a client that nothing happened to is counted in full.
    _, counted, _ = read_ledger(stack, name)
    crossed = on_the_interfaces(stack, name)
    print(f"{name}: ledger {counted}, interfaces {crossed}")
    for direction in ("up", "down"):
        for client in CLIENTS:
            assert 0 < counted[client][direction] <= 1.02 * crossed[client][direction], client
        assert counted["client-0"][direction] == pytest.approx(crossed["client-0"][direction], rel=0.05)


def trained_again(stack: Stack, name: str, client: str) -> bool:
    """Whether the client has answered in the last round so far, after one in which it did not."""
    statuses = [record["clients"][client]["status"] for record in stack.rounds(name) if record["phase"] == "train"]
    return len(set(statuses)) > 1 and statuses[-1] == "ok"


def test_subprocess_isolation_counts_the_same_way(stack: Stack) -> None:
    """The lighter overlay, on the same keys and the same database."""
    if stack.remaining() < LEFT_FOR_SUBPROCESSES:
        pytest.skip("subprocess isolation: this machine is slow, and the cap of 25 minutes is near")
    stack.stop_meters()
    supernodes = [f"supernode-{number}" for number in range(3)]
    stack.compose("stop", *supernodes)  # while they can still say goodbye to their SuperLink
    stack.overlays = ["subprocess.yaml"]
    stack.compose("up", "--detach", "--remove-orphans", *supernodes)
    for service in ("superexec-serverapp", *(f"superexec-clientapp-{number}" for number in range(3))):
        stack.docker("rm", "--force", f"{stack.project}-{service}-1", check=False)
    stack.start_meters()
    before = {path.name for path in (stack.folder / "runs").glob("*")}
    demo(stack, 3)  # the ledger learns the cost of a call from lone ones; a run of one round may have had none
    (name,) = {path.name for path in (stack.folder / "runs").glob("*")} - before
    check_ledger(stack, name)


def test_nothing_is_left_behind(stack: Stack) -> None:
    stack.close()
    for kind in ("container", "network", "volume"):
        left = stack.docker(
            kind, "ls", "--quiet", "--filter", f"name={stack.project}", *(["-a"] if kind == "container" else [])
        )
        assert left.strip() == "", kind
