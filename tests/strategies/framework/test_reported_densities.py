"""What a client reports of the features of its examples: refused if it is incomplete, or would break a merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedalloy_adapters.wire.flower_records import unpack
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework import steps
from strategies.framework.answers import read_answer
from strategies.framework.dispatch import plan_dispatch
from strategies.framework.exchange import BadAnswerError
from tests.strategies.conftest import FakeNode
from tests.strategies.hostile import LAYOUT, NAME, asked, reply_with

DENSITIES: dict[str, tuple[Callable[[report_pb2.DensityResult], object], str]] = {
    "a share too few": (lambda r: r.shares.pop(), r"1 shares, expected 2 of them that sum to 1"),
    "shares of more than all": (lambda r: r.shares.__setitem__(0, 1.5), "2 shares, expected"),
    "a negative share": (lambda r: r.shares.__setitem__(slice(None), [-1.0, 2.0]), "2 shares, expected"),
    "no Gaussians": (lambda r: r.ClearField("gaussians"), "0 gaussians, expected 3"),
    "a weight above one": (lambda r: setattr(r.gaussians[0], "weight", 1.2), "3 gaussians, expected"),
    "a weight that is no number": (lambda r: setattr(r.gaussians[0], "weight", float("nan")), "3 gaussians, expected"),
    "a mean too few": (lambda r: r.gaussians[0].mean.pop(), "a Gaussian's moments are not 4 numbers each"),
    "a variance too many": (lambda r: r.gaussians[2].variance.append(1.0), "not 4 numbers each"),
    "a mean that breaks a merge": (lambda r: r.gaussians[1].mean.__setitem__(0, -1e10), r"a mean beyond 1e\+09"),
    "a mean that is no number": (
        lambda r: r.gaussians[1].mean.__setitem__(0, float("nan")),
        "expected a finite number",
    ),
    "a negative variance": (lambda r: r.gaussians[1].variance.__setitem__(3, -0.1), "not from 0 to 1e"),
    "a density that is no number": (lambda r: setattr(r, "log_density", float("-inf")), "expected a finite number"),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_moments_of_features_are_complete_and_bounded(name: str) -> None:
    spoil, finding = DENSITIES[name]
    gaussians = [plan_pb2.Gaussian(mean=[0.0] * 4, variance=[1.0] * 4)] * 3
    step = steps.density(["global", "local"], "shares", gaussians, dimensions=4, seed=1)
    dispatch = plan_dispatch(
        [step], {}, client_id=NAME, layout=LAYOUT, round_=3, seed=4, run_name="run", encoding="fp32"
    )
    report, uploads = FakeNode(NAME, LAYOUT).run(unpack(asked(dispatch).content, "plan", plan_pb2.Plan)[0], {})
    read_answer(dispatch, reply_with(dispatch, report, uploads))
    spoil(report.results[0].density)
    with pytest.raises(BadAnswerError, match=finding):
        read_answer(dispatch, reply_with(dispatch, report, uploads))
