"""Kubernetes manifests, systemd units and a site's compose file, offline: what they name exists, and fits together."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_repository import ROOT

yaml: Any = pytest.importorskip("yaml", reason="PyYAML is not installed")
MANIFESTS = sorted((ROOT / "docker" / "kubernetes").glob("*.yaml"))
UNITS = sorted((ROOT / "docker" / "systemd").glob("*.service"))
REQUIRED = {"PersistentVolumeClaim": "v1", "Service": "v1", "Deployment": "apps/v1"}


def objects(path: Path) -> dict[str, dict[str, Any]]:
    found = list(yaml.safe_load_all(path.read_text()))
    assert len({item["kind"] for item in found}) == len(found)
    return {item["kind"]: item for item in found}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_fits_kubernetes_own_schemas(path: Path) -> None:
    schemas: Any = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for item in objects(path).values():
        schemas.validate(item, schemas.latest_version(), strict=True)
    broken = objects(path)["Deployment"]
    broken["spec"]["replicaCount"] = 1
    with pytest.raises(Exception, match="replicaCount"):
        schemas.validate(broken, schemas.latest_version(), strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_holds_together(path: Path) -> None:
    found = objects(path)
    for kind, item in found.items():
        assert item["apiVersion"] == REQUIRED[kind]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", item["metadata"]["name"])
    spec = found["Deployment"]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert spec["strategy"]["type"] == "Recreate"
    assert pod["securityContext"]["runAsUser"] == 49999  # of the image
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    claims = [
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    ]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    ports: set[str] = set()
    for container in pod["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert (Path(sys.executable).parent / container["command"][0]).exists()
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(mounts)) == len(mounts)
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        ports |= {port["name"] for port in container.get("ports", ())}
        for word in container["args"]:  # every file that an option names lies in a mount
            for name in re.findall(r"=(/app/[\w./-]+)|'(/app/[\w./-]+)'", word):
                file = next(filter(None, name))
                others = [mount["mountPath"] for other in pod["containers"] for mount in other["volumeMounts"]]
                assert any(file == mount or file.startswith(f"{mount}/") for mount in others), (word, others)
    if "Service" in found:
        service = found["Service"]["spec"]
        assert service["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["ports"]} <= ports


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kubeconform_accepts_it_where_it_is_installed(path: Path) -> None:
    if shutil.which("kubeconform") is None:
        pytest.skip("kubeconform is not installed")
    done = subprocess.run(["kubeconform", "-strict", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_what_flower_has_with_options_that_it_knows(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read_string(re.sub(r"\\\n\s*", "", path.read_text()))
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "always"
    program, *words = unit["Service"]["ExecStart"].split()
    options = {word for word in words if word.startswith("--")}
    known = subprocess.run(
        [str(Path(sys.executable).parent / Path(program).name), "--help"], capture_output=True, text=True, check=True
    )
    assert options <= set(re.findall(r"--[a-z-]+", known.stdout)), path
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_in_a_sites_containers_data_and_network_never_meet() -> None:
    services = yaml.safe_load((ROOT / "docker" / "distributed" / "client-site.yaml").read_text())["services"]
    site = services.pop("site")
    assert (site["network_mode"], site["user"]) == ("none", "49998:49999")
    assert "secrets" not in site
    mounts = {mount["target"]: mount for mount in site["volumes"] if isinstance(mount, dict)}
    assert set(mounts) == {"/site", "/data", "/models"}
    assert all(mounts[folder]["read_only"] for folder in ("/data", "/models"))
    for name, service in services.items():  # of the relay's side
        assert "user" not in service, name  # the image's, 49999
        assert service.get("volumes", []) in ([], ["socket:/run/fedalloy"]), name
    assert [name for name, service in services.items() if "volumes" in service] == ["superexec-clientapp"]
    program, *words = site["command"]
    shown = subprocess.run(
        [str(Path(sys.executable).parent / program), *words[:2], "--help"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
