"""Binds slots to their run: knowing the run's name is not enough to reach them."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from client_app.guard.policy import PolicyError
from fedalloy_adapters.files.atomic_files import write_durably
from proto.fedalloy.v1 import plan_pb2

_FILE = "run-key.sha256"


def require_same_run(directory: Path, plan: plan_pb2.Plan) -> None:
    """Require that the plan has the same key as the first plan under its run's name.

    Raises:
        PolicyError: it has another key, or none.
    """
    path = directory / _FILE
    if path.exists() and not hmac.compare_digest(path.read_text(), _digest(plan)):
        raise PolicyError(
            f"client {plan.client_id!r} has slots of an earlier run {plan.run_name!r}, and this plan has another key; "
            "choose another run-name, or continue that run with resume"
        )


def bind_run(directory: Path, plan: plan_pb2.Plan) -> None:
    """Require this plan's key of all later plans that name this run."""
    path = directory / _FILE
    if not path.exists():
        write_durably(path, _digest(plan).encode())


def _digest(plan: plan_pb2.Plan) -> str:
    return hashlib.sha256(b"run key" + plan.run_key).hexdigest()
