"""The main job on real SuperLink and SuperNode processes over gRPC, TLS and SuperNode authentication on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from server_app.run.run_directory import RunDirectory
from server_app.tools.cluster.certificates import make_client_key
from server_app.tools.cluster.local import ClusterError, LocalCluster, Process, app_directory, stop
from server_app.tools.handover.export import export_adapter
from tests.in_process import EXACT, run_config_of

BIN = Path(sys.executable).parent
# Rank 32 in fp32: with adapters of 16 kB a run of seconds is little more than bundles and polls, and a few kB by which
# the ledger misjudges pings and polls come to one per cent.
SMALL = EXACT | {"num-server-rounds": 2, "local-steps": 5, "min-clients": 3, "lora-r": 32}


def start(cluster: LocalCluster, name: str, **config: Any) -> dict[str, Any]:
    """Run to the end, and return the summary. Keys as in :func:`tests.in_process.run_config_of`."""
    given = SMALL | {"run-name": name, "runs-dir": str(cluster.settings.runs_dir)}
    outcome = cluster.run(given | run_config_of(**config))
    assert outcome.completed, outcome.log.read_text()
    found: dict[str, Any] = json.loads((cluster.settings.runs_dir / name / "summary.json").read_text())
    return found


def trainers_of(supernode: Process) -> list[psutil.Process]:
    """The resident trainers that belong to a SuperNode."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "client_app.trainer.server" in command and any(part.startswith(f"{supernode.pid}-") for part in command):
            found.append(process)
    return found


def is_client_app(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("flwr-clientapp" in part for part in process.cmdline())
    return False


def processes_with_home_below(folder: Path) -> list[psutil.Process]:
    """Processes of a cluster in ``folder``, its resident trainers included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME", "").startswith(str(folder)):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def fedmerge(cluster: LocalCluster) -> dict[str, Any]:
    return start(cluster, "fedmerge", strategy="fedmerge")


def test_every_client_gets_its_own_merge_and_every_byte_is_counted(
    cluster: LocalCluster, fedmerge: dict[str, Any]
) -> None:
    assert set(fedmerge["clients"]) == {"berlin", "paris", "rome"}
    for direction in ("up", "down"):
        counted = fedmerge["bytes"][direction]
        assert 0 < counted["tensor"] < counted["message"] < counted["wire"]
    assert fedmerge["unexplained_wire_fraction"] < 0.01
    runs = cluster.settings.runs_dir
    weights = {
        client: (runs / "fedmerge" / "clients" / client / "adapter" / "adapter_model.safetensors").read_bytes()
        for client in fedmerge["clients"]
    }
    assert len(set(weights.values())) == 3


def test_the_exported_adapter_gives_the_logits_that_the_client_evaluated(
    cluster: LocalCluster, fedmerge: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT alone, without FedAlloy's model code, on the client's own test split."""
    from peft import PeftModel

    from client_app.scenarios import load_scenario

    folder = export_adapter(cluster.settings.runs_dir / "fedmerge", "paris", tmp_path / "paris")
    base, data = load_scenario("digits", 1, 3, 0, cluster.settings.runs_dir / ".cache")
    model = PeftModel.from_pretrained(base.model, str(folder)).eval()  # type: ignore[arg-type]
    test = data.splits["test"]
    with torch.no_grad():
        logits = model(**test.inputs).logits
    accuracy = float((logits.argmax(dim=-1) == test.labels).double().mean())
    loss = float(torch.nn.functional.cross_entropy(logits, test.labels))
    assert accuracy == pytest.approx(fedmerge["clients"]["paris"]["accuracy"], abs=1e-9)
    assert loss == pytest.approx(fedmerge["clients"]["paris"]["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def local(cluster: LocalCluster, fedmerge: dict[str, Any]) -> dict[str, Any]:
    """A second run on the same cluster."""
    return start(cluster, "local", strategy="local", num_server_rounds=1)


@pytest.fixture(scope="module")
def plain(cluster: LocalCluster, local: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run without resident trainers, and beside a SuperNode that says it is berlin: its key is tokyo's."""
    for process in cluster.processes:
        assert len(trainers_of(process)) == (process.name != "superlink"), process.name
    folder = tmp_path_factory.mktemp("tokyo")
    private, public = make_client_key(folder, "tokyo")
    cluster.flwr("supernode", "register", str(public), "fedalloy", "--name", "tokyo")
    impostor = cluster.start_supernode(0, private, name="tokyo")
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            listed = json.loads(cluster.flwr("supernode", "list", "fedalloy", "--format", "json"))["nodes"]
            if sum(node["status"] == "online" for node in listed) == 4:
                break
            time.sleep(0.3)
        return start(cluster, "plain", strategy="local", num_server_rounds=1, trainer__resident=False)
    finally:
        stop(folder, [impostor])  # no cluster was started from this folder, so only this process ends
        cluster.processes.remove(impostor)


def test_without_resident_trainers_the_numbers_are_the_same(
    cluster: LocalCluster, local: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert plain["clients"] == local["clients"]
    runs = cluster.settings.runs_dir
    for client in local["clients"]:
        for path in (runs / "local" / "clients" / client).rglob("adapter_model.safetensors"):
            same = runs / "plain" / path.relative_to(runs / "local")
            assert path.read_bytes() == same.read_bytes()


def test_a_registered_node_cannot_use_another_clients_id(cluster: LocalCluster, plain: dict[str, Any]) -> None:
    record = RunDirectory(cluster.settings.runs_dir / "plain").rounds()[0]
    refused = [client for client in record["clients"].values() if client["status"] == "rejected"]
    assert len(refused) == 1
    assert "claims client-id 'berlin', but its key is registered as 'tokyo'" in refused[0]["reason"]
    assert record["clients"]["berlin"]["status"] == "ok"


def test_two_runs_on_one_cluster_do_not_share_slots_or_bytes(
    cluster: LocalCluster, fedmerge: dict[str, Any], local: dict[str, Any]
) -> None:
    assert local["bytes"]["up"]["tensor"] == local["bytes"]["down"]["tensor"] == 0
    assert 0 < local["bytes"]["up"]["wire"] < fedmerge["bytes"]["up"]["wire"]
    slots = cluster.settings.runs_dir / "local" / "clients" / "rome" / "slots"
    assert sorted(path.name for path in slots.iterdir()) == ["local", "state.json"]


def test_a_client_killed_mid_round_is_named_and_the_run_goes_on(cluster: LocalCluster) -> None:
    """SIGKILL of each ClientApp of one client in a round: Flower reports the first, and the client is asked again."""
    runs = RunDirectory(cluster.settings.runs_dir / "killed")
    victim = next(process for process in cluster.processes if process.name == "supernode-rome").find()
    assert victim is not None
    killed: list[int] = []
    registering: set[int] = set()

    def kill_in_the_round() -> None:
        found = [child for child in victim.children(recursive=True) if is_client_app(child)]
        if not (records := runs.rounds()):
            registering.update(child.pid for child in found)
            return
        if len(records) > 1:
            return
        # Not by its start time, which Linux may give a second too early.
        for child in found:
            if child.pid not in registering | set(killed):
                child.kill()
                killed.append(child.pid)

    # Enough steps to be seen while it trains, in a single round.
    config = SMALL | {
        "num-server-rounds": 1,
        "local-steps": 200,
        "strategy": "fedavg",
        "run-name": "killed",
        "runs-dir": str(cluster.settings.runs_dir),
    }
    outcome = cluster.run(config | {"min-clients": 2, "round-timeout": 30.0}, watch=kill_in_the_round)
    assert outcome.completed, outcome.log.read_text()
    assert killed
    assert len(trainers_of(next(p for p in cluster.processes if p.name == "supernode-rome"))) == 1
    first = next(record for record in runs.rounds() if record["phase"] == "train")
    assert first["clients"]["rome"]["status"] in ("late", "failed")
    assert first["settled"]["merged"] == 2
    assert {"berlin", "paris"} <= set(json.loads((runs.path / "summary.json").read_text())["clients"])


def test_an_unregistered_key_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    private, _ = make_client_key(tmp_path, "stranger")
    refused = cluster.start_supernode(0, private, name="stranger")
    log = cluster.directory / "logs" / "stranger.log"
    deadline = time.monotonic() + 60
    while refused.find() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert refused.find() is None
    assert "Failed to activate SuperNode" in log.read_text()


def test_a_second_cluster_in_the_same_folder_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="a cluster is running from"):
        LocalCluster(cluster.directory, cluster.settings).up()


def test_an_unknown_key_never_starts(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="Invalid run configuration"):
        cluster.run({"fedmerge.model": 3})


def test_ctrl_c_in_the_demo_stops_everything_and_leaves_a_valid_run(tmp_path: Path, base_cache: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / ".cache").symlink_to(base_cache)
    command = [BIN / "fedalloy", "demo", "--clients", "2", "--strategies", "fedavg", "--runs-dir", str(runs)]

    def heed_sigint() -> None:
        """A job in the background of a shell starts with SIGINT ignored, and so would its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # where the demo's cluster keeps its files
        preexec_fn=heed_sigint,
    ) as demo:
        directory = RunDirectory(runs / "demo-fedavg")
        deadline = time.monotonic() + 180
        while not directory.rounds():
            assert demo.poll() is None, demo.stdout and demo.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        family = psutil.Process(demo.pid).children(recursive=True)
        ports = {c.laddr.port for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        assert processes_with_home_below(tmp_path)
        assert len(ports) >= 4  # Fleet, control, and one for each SuperNode
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert "interrupted" in output
    deadline = time.monotonic() + 60
    while left := processes_with_home_below(tmp_path):  # a trainer leaves when it sees that its SuperNode has gone
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert directory.rounds()[0]["phase"] == "register"
    assert "strategy" in (directory.path / "config.toml").read_text()


def test_flowers_simulation_engine_runs_the_same_app_with_more_clients_than_cores(
    tmp_path: Path, base_cache: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the simulation extra)")
    (tmp_path / ".cache").symlink_to(base_cache)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n')
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    config = f"min-clients=8 num-server-rounds=1 strategy='fedmerge' local-steps=3 run-name='sim' runs-dir='{tmp_path}'"
    config += " deliver-choice='validation' patience=1 schedule='cosine' schedule-over='run'"
    federation = "num-supernodes=8 client-resources-num-cpus=1"
    command = ["flwr", "run", str(app_directory()), "local", "--stream"]
    command += ["--federation-config", federation, "--run-config", config]
    try:
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(home) in " ".join(process.info["cmdline"] or ()):
                process.terminate()  # Flower leaves its simulation SuperLink running
    found = json.loads((tmp_path / "sim" / "summary.json").read_text())
    assert len(found["clients"]) == len(found["given"]) == 8, shown.stdout
    assert found["bytes"]["up"]["wire"] is None
    assert found["bytes"]["up"]["tensor"] > 0
