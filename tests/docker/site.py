"""A client whose trainer is its owner's: docker/distributed/client-site.yaml, beside a :class:`Stack`'s cluster."""

from __future__ import annotations

from pathlib import Path

from tests.docker.stack import Stack

CLIENT = "client-3"
"""Its key is registered with the others; compose.yaml's own containers for it are left out."""
OWNER = "49998"
FILES = ("ca.crt", CLIENT)
# The client's machine is on the cluster's network; elsewhere it would reach the server over its own.
NEAR = """
services:
  client-pod: {{ networks: [fleet] }}
networks:
  fleet: {{ external: true, name: {network} }}
"""
SITE = f"""
socket = "/run/fedalloy/socket"
socket-group = "49999"
servers = ["any"]
runs = ["own"]
[client]
client-id = "{CLIENT}"
state-dir = "state"
data-path = "/data"
base-model = "/models/base"
[policy]
allow-steps = "initialise,train,merge,evaluate,save,send"
"""


class ClientSite:
    """One compose project of its own; ``folder`` has ``data`` and ``models``, and gets the site's files and keys."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.project = f"{stack.project}-site"
        self.environment = {
            "COMPOSE_PROJECT_NAME": self.project, "SERVER": "superlink", "CLIENT_ID": CLIENT,
            "KEYS": str(folder / "keys"), "SITE": str(folder / "site"), "DATA": str(folder / "data"),
            "MODELS": str(folder / "models"),
        }  # fmt: skip

    def up(self) -> None:
        """Hand the key over, as an administrator does, and start the four containers."""
        (self.folder / "keys").mkdir()
        look = f"cat /app/keys/public/ca.crt; echo; cat /app/keys/clients/{CLIENT}/{CLIENT}"
        said = self.stack.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "sh", "certificates", "-c", look)
        for name, text in zip(FILES, said.split("\n\n", 1), strict=True):
            (self.folder / "keys" / name).write_text(text + "\n")
        (self.folder / "site").mkdir()
        (self.folder / "site" / "site.toml").write_text(SITE)
        (self.folder / "near.yaml").write_text(NEAR.format(network=f"{self.stack.project}_fleet"))
        self._own(OWNER, "site")
        self._own("49999", "keys")
        self.compose("up", "--detach")

    def compose(self, *arguments: str, check: bool = True) -> str:
        near, file = self.folder / "near.yaml", self.stack.folder / "docker" / "distributed" / "client-site.yaml"
        words = ("compose", "--ansi", "never", "-f", str(file), "-f", str(near), *arguments)
        return self.stack.docker(*words, check=check, environment=self.environment)

    def inside(self, service: str, command: str) -> str:
        """What a shell command says in a service's container, whether it succeeds or not."""
        return self.compose("exec", "-T", service, "sh", "-c", command, check=False)

    def mounts(self, service: str) -> set[str]:
        """Where something of the machine's or a volume is in a service's container."""
        container = self.compose("ps", "-aq", service).strip()
        form = "{{range .Mounts}}{{.Destination}} {{end}}"
        return set(self.stack.docker("inspect", "--format", form, container).split())

    def close(self) -> None:
        """Remove everything but the folder, and give that back to whoever runs the test."""
        self.compose("down", "--volumes", "--timeout", "2", check=False)
        self._own("", "site", "keys")

    def _own(self, user: str, *names: str) -> None:
        command = f"chown -R {user or '$(stat -c %u:%g /it)'} {' '.join(f'/it/{name}' for name in names)}"
        image = ("--entrypoint", "sh", self.stack.image, "-c", command)
        self.stack.docker("run", "--rm", "--user", "0", "--volume", f"{self.folder}:/it", *image)
