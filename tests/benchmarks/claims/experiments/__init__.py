"""The four experiments by name."""

from __future__ import annotations

from tests.benchmarks.claims.designs import Experiment
from tests.benchmarks.claims.experiments.fedmerge import FEDMERGE
from tests.benchmarks.claims.experiments.fedmosaic import FEDMOSAIC
from tests.benchmarks.claims.experiments.potara import POTARA
from tests.benchmarks.claims.experiments.tap import TAP

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (POTARA, FEDMERGE, FEDMOSAIC, TAP)}
