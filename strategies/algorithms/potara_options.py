"""Potara's options, and properties derived from them; see :mod:`strategies.algorithms.potara`."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.algorithms import potara_weights as weighting
from strategies.framework.options import OptionError, require_choice, require_range

SEARCH_POINTS = 21
"""Points of a line search, if the option does not say how many."""
MAX_DAMPINGS = 16
_NEEDS_B = ("random-effects", "plugin")
_NEEDS_FISHER = ("client-fisher", "client-fisher-clipped", "server-scalar")


@dataclass(frozen=True)
class PotaraOptions:
    """How the two branches are trained, weighed and merged."""

    federated_rounds: int = 0
    """Rounds of the federated branch; the rounds after them train the local one. 0 means two thirds of the run's
    rounds, like the paper's 400 of 600 steps; or 1 if Flower's own loop runs the strategy and the number of rounds is
    not known."""
    local_steps: int = 0
    """Steps of the local branch in each of its rounds. 0: in total half of the run's rounds times ``local-steps``, like
    the paper's 300 of 600 steps."""
    weight: str = "client-fisher"
    """How the weight is found; see :mod:`strategies.algorithms.potara_weights`. ``"client-fisher"`` is the paper's
    closed form, ``"client-fisher-clipped"`` the same with the gradients' correlation. ``"line-search"`` is the paper's
    comparison, not Potara itself: it tries mixtures on validation labels."""
    granularity: str = "scalar"
    """One weight per client, per ``"module"``, or per ``"parameter"`` (Fisher merging, factor space)."""
    space: str = "delta"
    """``"delta"`` (exact, rank 2r), ``"delta-truncated"`` (the best approximation of that at the client's own rank) or
    ``"factor"``."""
    merge_at: str = "client"
    """``"client"``, or ``"server"``: then the local adapter is uploaded once and the merge sent down."""
    calibration: str = "validation"
    """The split on whose examples the Fisher information is computed: ``"validation"`` (extra examples, as in the
    paper) or ``"train"``. A client without validation examples takes training examples."""
    fisher_samples: int = 30
    """Largest number of examples for the Fisher information; 30 in the paper."""
    damping: float = 1.0
    """Factor of both adapters' mean information, which is added to the information of every number. The paper's value
    is not known (tests/benchmarks/accuracy/potara_digits.py sweeps it)."""
    dampings: str = ""
    """More values of ``damping``, comma-separated. Their weights and models are measured for the record."""
    trace_space: str = "factor"
    """Take variances of the numbers of each ``"factor"``, or of the ``"delta"``."""
    fed_scale: str = "client"
    """Whether the federated adapter's information stands for the ``"client"``'s data or for the ``"total"`` data."""
    variance: str = "split-half"
    """How ``plugin`` and ``random-effects`` find b: ``"split-half"`` trains two more adapters on half the data
    each, ``"curvature"`` takes the effective dimension over the number of examples."""
    search_points: int = 0
    """Number of mixtures, from local to federated, that the line search tries on the validation split; 3 fit a
    parabola. 0 means 21 if the search decides, otherwise none. Above 0, other weight modes search for the record,
    too."""

    def __post_init__(self) -> None:
        require_range("potara.federated-rounds", self.federated_rounds, 0, 10**6)
        require_range("potara.local-steps", self.local_steps, 0, 2**31 - 1)
        require_range("potara.fisher-samples", self.fisher_samples, 1, 10**6)
        require_range("potara.damping", self.damping, 0)
        for damping in self.more_dampings:
            require_range("potara.dampings", damping, 0)
        require_choice("potara.weight", self.weight, weighting.MODES)
        require_choice("potara.granularity", self.granularity, ("scalar", "module", "parameter"))
        require_choice("potara.space", self.space, ("delta", "delta-truncated", "factor"))
        require_choice("potara.merge-at", self.merge_at, ("client", "server"))
        require_choice("potara.calibration", self.calibration, ("train", "validation"))
        require_choice("potara.trace-space", self.trace_space, ("factor", "delta"))
        require_choice("potara.fed-scale", self.fed_scale, ("client", "total"))
        require_choice("potara.variance", self.variance, ("split-half", "curvature"))
        if self.search_points != 0:
            require_range("potara.search-points", self.search_points, 3, 1001)
        if self.weight == "line-search" and self.granularity != "scalar":
            raise OptionError(f"potara.weight = 'line-search' with granularity {self.granularity!r}, expected 'scalar'")
        if self.granularity == "parameter" and (
            self.weight != "client-fisher" or self.space != "factor" or self.merge_at != "client"
        ):
            raise OptionError(
                f"potara.granularity = 'parameter' with weight {self.weight!r}, space {self.space!r}, merge-at "
                f"{self.merge_at!r}, expected 'client-fisher', 'factor' and 'client': weights of single numbers exist "
                "only at the client"
            )
        if self.more_dampings and (self.weight not in _NEEDS_FISHER or self.granularity != "scalar"):
            raise OptionError(
                f"potara.dampings = {self.dampings!r} with weight {self.weight!r} and granularity "
                f"{self.granularity!r}, expected one of {', '.join(_NEEDS_FISHER)} and 'scalar'"
            )

    @property
    def more_dampings(self) -> tuple[float, ...]:
        """The numbers of ``dampings``.

        Raises:
            OptionError: one is no number, or there are too many.
        """
        try:
            found = tuple(float(item) for item in self.dampings.split(",") if item.strip())
        except ValueError:
            raise OptionError(f"potara.dampings = {self.dampings!r}, expected numbers with commas") from None
        if len(found) > MAX_DAMPINGS or len(set(found)) < len(found):
            raise OptionError(f"potara.dampings = {self.dampings!r}, expected at most {MAX_DAMPINGS}, all different")
        return found

    @property
    def needs_fisher(self) -> bool:
        """Whether the weight depends on Fisher information."""
        return self.weight in _NEEDS_FISHER or (self.needs_b and self.variance == "curvature")

    @property
    def needs_b(self) -> bool:
        """Whether the weight depends on the local adapter's calibrated error."""
        return self.weight in _NEEDS_B

    @property
    def points(self) -> int:
        """Number of mixtures that the line search tries."""
        return self.search_points or (SEARCH_POINTS if self.weight == "line-search" else 0)

    @property
    def reads_validation(self) -> bool:
        """Whether a client's model depends on its validation examples."""
        return self.weight == "line-search" or (self.needs_fisher and self.calibration == "validation")
