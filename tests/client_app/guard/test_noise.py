"""Noise from the client's secret: normal, repeatable by the client, and by nobody else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from client_app.guard.noise import SecretError, gaussian, noise_key, secret_of
from proto.fedalloy.v1 import plan_pb2

PLAN = plan_pb2.Plan(version=1, run_name="run", client_id="ada", round=1, seed=7)


def test_it_is_normal() -> None:
    found = gaussian(2.0, b"k" * 32)(torch.Size((200, 500)))
    assert found.shape == (200, 500)
    assert float(found.mean()) == pytest.approx(0, abs=0.03)
    assert float(found.std()) == pytest.approx(2.0, rel=0.01)
    within = [float((found.abs() < 2.0 * n).double().mean()) for n in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)
    assert bool(found.isfinite().all())
    assert float(torch.corrcoef(torch.stack([found[:100].flatten(), found[100:].flatten()]))[0, 1].abs()) < 0.02


def test_the_same_plan_has_the_same_noise_and_any_other_has_other() -> None:
    def first(secret: bytes, plan: plan_pb2.Plan, index: int) -> float:
        return float(gaussian(1.0, noise_key(secret, plan, index))(torch.Size((1,))))

    other = plan_pb2.Plan.FromString(PLAN.SerializeToString())
    other.steps.add().sketch.noise = 1e-9  # asked again with less noise, the difference of the answers would be it
    found = [
        first(b"a" * 32, PLAN, 0),
        first(b"b" * 32, PLAN, 0),
        first(b"a" * 32, PLAN, 1),
        first(b"a" * 32, other, 0),
    ]
    assert len(set(found)) == 4
    assert first(b"a" * 32, PLAN, 0) == found[0]
    draw = gaussian(1.0, b"k")
    assert not torch.equal(draw(torch.Size((3,))), draw(torch.Size((3,))))


def test_every_client_has_a_secret_of_its_own_that_stays(tmp_path: Path) -> None:
    ada, ben = secret_of(tmp_path, "ada"), secret_of(tmp_path, "ben")
    assert ada != ben
    assert len(ada) == 32
    assert secret_of(tmp_path, "ada") == ada
    assert stat.S_IMODE((tmp_path / "secrets" / "ada").stat().st_mode) == 0o600
    (tmp_path / "secrets" / "ada").write_bytes(b"short")
    with pytest.raises(SecretError, match="5 bytes, expected 32"):
        secret_of(tmp_path, "ada")
