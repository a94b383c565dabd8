"""Checks each job against what the site's owner allows, before anything is loaded for it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flwr.app import Context, RecordDict
from google.protobuf.message import DecodeError

from client_app.guard.policy import Policy, PolicyError
from client_app.settings import AdapterSettings, DataSettings, ModelSettings, Settings, TrainerSettings, read_settings
from client_app.site.site_file import Site
from client_app.trainer.calls import read_scalars
from fedalloy_adapters.wire.flower_records import MAX_MESSAGE_BYTES, MAX_VALUES
from fedalloy_adapters.wire.signing import require_signed
from fedalloy_adapters.wire.wire_counts import TooManyError, require_few
from fedalloy_adapters.words import one_line
from proto.fedalloy.v1 import plan_pb2, trainer_pb2

VERSION = 1
_NOT_THE_OWNERS = tuple(
    item.name.replace("_", "-") for kind in (AdapterSettings, ModelSettings) for item in fields(kind)
)
_RUNS = (
    *_NOT_THE_OWNERS,
    *("seed", "scenario", "task-arrival", "num-server-rounds", "keep-checkpoints"),
)
"""Keys that run-config decides, because all clients need the same value; a site's own file wins."""
_DEFAULTS: Mapping[str, Any] = {
    f"{prefix}{item.name.replace('_', '-')}": item.default
    for prefix, kind in (("", DataSettings), ("client.", Policy), ("trainer.", TrainerSettings))
    for item in fields(kind)
}
"""Keys of run-config that other clients read, but a site does not."""


class GateError(PolicyError):
    """The site's owner has not allowed this run, this server, or this base model."""


@dataclass(frozen=True)
class Admitted:
    """A job that may be carried out; without a ``plan`` it is a registration."""

    settings: Settings
    run_name: str
    plan: plan_pb2.Plan | None
    server: str
    ignored: Mapping[str, Any]


def admit(site: Site, job: trainer_pb2.Job, blobs: Mapping[str, bytes]) -> Admitted:
    """Check a job against the site's file.

    Args:
        site: the owner's rules.
        job: the job from a relay, which may be anybody's code.
        blobs: the blobs that came with it.

    Raises:
        GateError: the job is not for this site's service, or not allowed.
        SignatureError: it is not signed by a server that the owner knows.
        SettingsError: something else that the run asks for does not fit.
    """
    asked = job.site
    which = asked.WhichOneof("asked")
    if job.WhichOneof("kind") != "site" or which is None or asked.version != VERSION:
        raise GateError(f"this site's service speaks version {VERSION}, but the request has version {asked.version}")
    run_config = read_scalars(job.run_config)
    words = asked.plan if which == "plan" else asked.register
    server = "anybody"
    if site.servers:
        server = require_signed(asked.signature, words, run_config, blobs, site.servers)
    request = _parsed(words, which)
    name = request.run_name
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in site.runs):
        raise GateError(f"run {one_line(name, 80)!r} is not one of this site's ({', '.join(site.runs)})")
    settings = settings_of(site, run_config)
    return Admitted(
        settings, name, request if isinstance(request, plan_pb2.Plan) else None, server, _ignored(run_config, job)
    )


def settings_of(site: Site, run_config: Mapping[str, Any]) -> Settings:
    """The client's settings: from the site's file, plus the run-config keys that a run decides.

    Raises:
        GateError: the run names a base model that the file does not.
        SettingsError: a value is missing or not valid.
    """
    taken = {key: value for key, value in run_config.items() if key in _RUNS}
    for key in ("base-model", "reference-model"):
        model = str(taken.get(key, ""))
        if key in site.client or not model:
            continue
        if not any(fnmatch.fnmatchcase(model, pattern) for pattern in site.base_models):
            allowed = ", ".join(site.base_models) or "none"
            raise GateError(f"{key} {one_line(model, 80)!r} is not one of this site's base-models ({allowed})")
    return read_settings(Context(0, 0, dict(site.client), RecordDict(), taken))


def _parsed(words: bytes, which: str) -> plan_pb2.Plan | plan_pb2.RegisterRequest:
    kind = plan_pb2.Plan if which == "plan" else plan_pb2.RegisterRequest
    try:
        if len(words) > MAX_MESSAGE_BYTES:
            raise TooManyError(f"has {len(words)} bytes, expected at most {MAX_MESSAGE_BYTES}")
        require_few(words, kind.DESCRIPTOR, MAX_VALUES["plan"])
        return kind.FromString(words)
    except (TooManyError, DecodeError) as error:
        raise GateError(f"the request is not a {kind.__name__}: {error}") from None


def _ignored(run_config: Mapping[str, Any], job: trainer_pb2.Job) -> dict[str, Any]:
    """What a run or a relay tried to decide: values of keys that are not read here, if not the defaults."""
    found = {
        key: one_line(value)
        for key, value in sorted(run_config.items())
        if key not in _RUNS and key in _DEFAULTS and value != _DEFAULTS[key]
    }
    return found | {f"node-config {key}": one_line(value) for key, value in read_scalars(job.node_config).items()}
