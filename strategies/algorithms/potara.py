r"""Potara: a federated adapter and each client's own, merged once per client with a weight in closed form.

Zou, Shisher, Brinton and Tripathi, "Communication-Efficient Personalized Adaptation via Federated-Local Model Merging",
2026 (arXiv 2602.18658). Two branches from one seeded start, which never touch:

* *federated*: rounds 1 to ``federated-rounds`` are FedAvg of the factors (FedIT);
* *local*: in the rounds after, each client trains an adapter that starts from the seed and is never uploaded.

In the last round every client holds both and reports, for each, a few numbers per module (traces of its inverse
Fisher information, distances, losses of mixtures). The server turns them into this client's weight w
(:mod:`strategies.algorithms.potara_weights`) and the client's model is ``w x federated + (1 - w) x local``: in delta
space, exactly, at rank 2r. Merging A and B separately would add ``-w (1-w) (B_f - B_l)(A_f - A_l)``.

The federated branch stops early, so for equal training a client moves fewer bytes than with FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient, stack, truncate, weighted_sum
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms import potara_weights as weighting
from strategies.algorithms.fedavg import FedAvg
from strategies.algorithms.potara_weights import Evidence, Weight
from strategies.families.fedavg import SLOT as FEDERATED
from strategies.framework import steps
from strategies.framework.contract import About, AlloyStrategy, Answer, Brief, Client, State
from strategies.framework.options import OptionError, require_choice, require_range

LOCAL = "local"
MERGED = "merged"
PROBE = "probe"  # mixtures that are only evaluated
_HALVES = ("half-0", "half-1")
_KEPT = {FEDERATED: "precision-global", LOCAL: "precision-local"}
_NEEDS_B = ("random-effects", "plugin")


@dataclass(frozen=True)
class PotaraOptions:
    """How the two branches are trained, weighed and merged."""

    federated_rounds: int = 0
    """Rounds of the federated branch; those after train the local one. 0: half of the run's, rounded down, or 1 where
    Flower runs the strategy and the number of rounds is not known."""
    local_steps: int = 0
    """Steps of the local branch in each of its rounds; 0: ``local-steps``, as in a federated round."""
    weight: str = "line-search"
    """How the weight is found; see :mod:`strategies.algorithms.potara_weights`. The closed forms need no held-out
    examples. Those of Fisher information alone cannot see that clients differ; those that can need b in a metric
    that the loss agrees with. So the default is the line search (tests/benchmarks/potara_digits.py compares them)."""
    granularity: str = "scalar"
    """One weight per client, per ``"module"``, or per ``"parameter"`` (Fisher merging, factor space)."""
    space: str = "delta"
    """``"delta"`` (exact, rank 2r), ``"delta-truncated"`` (the best approximation of that at the client's own rank) or
    ``"factor"``."""
    merge_at: str = "client"
    """``"client"``, or ``"server"``: then the local adapter is uploaded once and the merge sent down."""
    calibration: str = "train"
    """The split whose examples give the Fisher information: ``"train"`` or ``"validation"``."""
    fisher_samples: int = 30
    """How many examples at most."""
    damping: float = 1.0
    """Times the mean information of both adapters together; added to all information."""
    trace_space: str = "factor"
    """Variances of ``"factor"`` numbers, or of the ``"delta"`` they make."""
    fed_scale: str = "client"
    """Whether the federated adapter's information is that of the ``"client"``'s or of the ``"total"`` data."""
    variance: str = "split-half"
    """Where ``plugin`` and ``random-effects`` take b from: ``"split-half"`` trains two more adapters on half the data
    each, ``"curvature"`` takes the effective dimension over the number of examples."""
    search_points: int = 21
    """Mixtures of the line search on the validation split, from local to federated; 3: a parabola; 0: none. Searched in
    every weight mode, for the record."""

    def __post_init__(self) -> None:
        require_range("potara.federated-rounds", self.federated_rounds, 0, 10**6)
        require_range("potara.local-steps", self.local_steps, 0, 2**31 - 1)
        require_range("potara.fisher-samples", self.fisher_samples, 1, 10**6)
        require_range("potara.damping", self.damping, 0)
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
        if self.weight == "line-search" and (self.search_points == 0 or self.granularity != "scalar"):
            raise OptionError(
                f"potara.weight = 'line-search' with search-points = {self.search_points} and granularity "
                f"{self.granularity!r}, expected at least 3 points and 'scalar'"
            )
        if self.granularity == "parameter" and (
            self.weight != "client-fisher" or self.space != "factor" or self.merge_at != "client"
        ):
            raise OptionError(
                f"potara.granularity = 'parameter' with weight {self.weight!r}, space {self.space!r}, merge-at "
                f"{self.merge_at!r}, expected 'client-fisher', 'factor' and 'client': weights of single numbers exist "
                "only at the client"
            )


class Potara(AlloyStrategy[PotaraOptions]):
    """Two branches, one weight per client."""

    name = "potara"
    about = About(
        "its own merge of a federated and a local adapter, weighted in closed form or by line search",
        travels="P up, P down in half of the rounds, then P down once (potara.merge-at = server: also P up, 2 P down)",
        group="main",
    )
    options: PotaraOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.federated_rounds = self.options.federated_rounds or max(1, self.rounds // 2)
        if 0 < self.rounds <= self.federated_rounds:
            raise OptionError(
                f"num-server-rounds = {self.rounds} with potara.federated-rounds = {self.options.federated_rounds}, "
                f"expected at least {self.federated_rounds + 1} rounds: one more for the local branch and the weights"
            )
        self.steps = self.options.local_steps or self.training.local_steps
        require_range("potara.local-steps, in all rounds,", self.steps * max(self.rounds, 1), 1, 2**31 - 1)
        self.federated = FedAvg(training=self.training, seed=self.seed, storage=self.storage)
        self.trained: set[str] = set()  # clients whose data are in the federated adapter
        self.local_rounds: dict[str, int] = {}  # in which the client has trained its own
        self.evidence: dict[str, Evidence] = {}  # what clients reported
        self.local = Bank(self.storage)  # of clients that uploaded theirs (merge-at = "server")
        self.weights: dict[str, dict[str, Weight]] = {}

    def compatible(self, first: Layout, second: Layout) -> bool:
        """As for FedAvg: groups that both have are equal; with weights of modules, all are."""
        same = first.digest == second.digest
        return same or (self.options.granularity != "module" and self.federated.compatible(first, second))

    def difference(self, first: Layout, second: Layout) -> str:
        """As for FedAvg."""
        return self.federated.difference(first, second)

    def enrol(self, client: Client) -> None:
        """Both branches start from the seed."""
        super().enrol(client)
        self.federated.enrol(client)

    def needs_everyone(self, round_: int) -> bool:
        """The local branch costs no bytes, and every client is to have a weight."""
        return round_ > self.federated_rounds

    def brief(self, round_: int, client: Client) -> Brief:
        """A federated round; or local training, and in the last round what the weight is made of."""
        if round_ <= self.federated_rounds:
            return self.federated.brief(round_, client)
        mix = steps.mixture(LOCAL)
        plan = [
            steps.initialise(LOCAL, self.seed, keep_existing=client.id in self.local_rounds),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL], steps=self.steps),
        ]
        if not self._is_last(round_):
            return Brief(plan)
        if self._splits(client):  # with as many steps as the local adapter has had by now
            own = self.steps * (self.local_rounds.get(client.id, 0) + 1)
            for index, half in enumerate(_HALVES):
                mix = steps.mixture(half)
                plan.append(steps.initialise(half, self.seed, keep_existing=False))
                plan.append(steps.train(self.training, mix, [half], steps=own, fold=(index, 2)))
            plan.append(steps.distance(*_HALVES))
        plan += [
            steps.distance(FEDERATED, LOCAL),
            steps.fisher(
                FEDERATED,
                LOCAL,
                split=self.options.calibration if client.held_out else "train",
                samples=self.options.fisher_samples,
                damping=self.options.damping,
                in_delta_space=self.options.trace_space == "delta",
                keep=(_KEPT[FEDERATED], _KEPT[LOCAL]) if self.options.granularity == "parameter" else ("", ""),
            ),
        ]
        for weight in self._grid(client):
            plan += self._evaluated(client, weight, _label(weight), split="validation")
        if self.options.merge_at == "server":
            plan.append(steps.send(self.training, LOCAL, relative_to_received=False))
        return Brief(plan, {FEDERATED: self.federated.part_of(client)})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep a trained federated adapter, or what the weight is made of."""
        if round_ <= self.federated_rounds:
            self.federated.absorb(round_, client, answer)
            self.trained.add(client.id)
            return
        self.local_rounds[client.id] = self.local_rounds.get(client.id, 0) + 1
        if self._is_last(round_):
            self.evidence[client.id] = self._evidence(client, answer)
            if LOCAL in answer.adapters:
                self.local[client.id] = answer.adapters[LOCAL]

    def settle(self, round_: int) -> dict[str, Any]:
        """Average the federated branch, or weigh the two."""
        if round_ <= self.federated_rounds:
            return {"branch": "federated"} | self.federated.settle(round_)
        record: dict[str, Any] = {"branch": "local"}
        if self._is_last(round_):
            self.weights = self._weigh()
            record["weights"] = {name: self._logged(name) for name in sorted(self.clients)}
        return record

    def deliver(self, client: Client) -> Brief:
        """This client's merge; a client without a weight, which missed the last round, has the federated adapter."""
        if client.id not in self.weights:
            return self.federated.deliver(client)
        plan: list[steps.Step] = []
        if self.evidence[client.id].losses:
            searched = weighting.best_of(self.evidence[client.id].losses).value
            named = {"local": 0.0, "half": 0.5, "federated": 1.0, "searched": searched}
            for label, weight in named.items():
                plan += self._evaluated(client, weight, label)
        if self.options.merge_at == "server" and self._is_merge(client):
            mix = steps.mixture(MERGED)
            merged = Made({MERGED: partial(self._merged, client)})
            return Brief([*plan, steps.save(mix), steps.evaluate(self.training, mix)], merged)
        if self.options.granularity == "parameter":
            plan.append(steps.merge(MERGED, steps.precision_mixture(_KEPT), space="factor"))
            mix = steps.mixture(MERGED)
        else:
            before, mix = self._mixture(client, self._coefficients(client))
            plan += before
        return Brief([*plan, steps.save(mix), steps.evaluate(self.training, mix)])

    def state(self) -> State:
        """The federated adapter, what clients reported and uploaded; weights follow from them."""
        evidence = {name: asdict(found) for name, found in self.evidence.items()}
        values = {"trained": sorted(self.trained), "local_rounds": self.local_rounds, "evidence": evidence}
        federated = self.federated.state()
        state = State(federated.tensors, federated.values | values)
        state.keep("local", self.local)
        return state

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.federated.load_state(state)
        self.trained = set(state.values["trained"])
        self.evidence = {name: Evidence(**found) for name, found in state.values["evidence"].items()}
        self.local_rounds = dict(state.values["local_rounds"])
        self.local.clear()
        for key in [key for key in [*state.tensors, *state.rows] if key.startswith("local/")]:
            name, row = key.removeprefix("local/"), state.row(key)
            like = self.clients.get(name) or next((c for c in self.clients.values() if c.layout.size == row.size), None)
            if like is not None:  # of a client that is not back, and has a layout of its own, nothing is known
                self.local.put_row(name, like.layout, row)
        self.weights = self._weigh()

    def _is_last(self, round_: int) -> bool:
        """Whether the weights are made in this round; without a known end, in every round of the local branch."""
        return round_ > self.federated_rounds and round_ >= self.rounds

    def _splits(self, client: Client) -> bool:
        """Whether this client trains on halves of its data; one example has no halves."""
        return self.options.weight in _NEEDS_B and self.options.variance == "split-half" and client.examples > 1

    def _grid(self, client: Client) -> list[float]:
        """Weights of the line search, none for a client without held-out examples."""
        return weighting.grid(self.options.search_points) if self.options.search_points and client.held_out else []

    def _mixture(
        self, client: Client, coefficients: tuple[Coefficient, Coefficient], target: str = MERGED
    ) -> tuple[list[steps.Step], plan_pb2.Mixture]:
        """The merged model, and what must run before it exists. An endpoint is that adapter itself, to the bit."""
        if coefficients in ((1.0, 0.0), (0.0, 1.0)):
            return [], steps.mixture((FEDERATED, LOCAL)[coefficients.index(1.0)])
        mix = steps.mixture(FEDERATED, LOCAL, coefficients=coefficients)
        if self.options.space == "delta":
            return [], mix
        space, rank = self.options.space, 0
        if space == "delta-truncated":
            space, rank = "delta", max(client.layout.ranks.values())
        return [steps.merge(target, mix, space=space, truncate_rank=rank)], steps.mixture(target)

    def _evaluated(self, client: Client, weight: float, label: str, split: str | None = None) -> list[steps.Step]:
        before, mix = self._mixture(client, (weight, 1.0 - weight), PROBE)
        return [*before, steps.evaluate(self.training, mix, label, split)]

    def _evidence(self, client: Client, answer: Answer) -> Evidence:
        distances = [list(result.distance.squared) for result in _results(answer, "distance")]  # halves, if any, first
        found = _results(answer, "fisher")[0].fisher
        b: list[float] = []
        if self.options.variance == "curvature":
            b = [dimension / client.examples for dimension in found.effective_dimension]
        elif self._splits(client):  # each half has twice the variance, hence their difference four times it
            b = [squared / 4 for squared in distances[0]]
        return Evidence(
            examples=client.examples,
            takes_part=client.id in self.trained,
            variance_fed=list(found.variance_first),
            variance_local=list(found.variance_second),
            covariance=list(found.covariance),
            distance=distances[-1],
            b=b,
            q=list(found.information_distance) if self.options.variance == "curvature" else distances[-1],
            losses=[answer.metrics[_label(weight)]["loss"] for weight in self._grid(client)],
            samples=found.samples,
            dropped=found.dropped,
        )

    def _weigh(self) -> dict[str, dict[str, Weight]]:
        """Weights of every client that reported, by module; the key "" stands for all modules together."""
        names = sorted(self.evidence)
        if not names:
            return {}
        evidence = [self.evidence[name] for name in names]
        modules = next(iter(self.clients.values())).layout.modules  # one layout for all
        total = sum(client.examples for client in self.clients.values() if client.id in self.trained)
        by_module = self.options.granularity == "module"
        found = {
            module: weighting.weigh(evidence, self.options.weight, index, self.options.fed_scale, total)
            for module, index in ([(m, i) for i, m in enumerate(modules)] if by_module else [("", None)])
        }
        return {name: {module: column[k] for module, column in found.items()} for k, name in enumerate(names)}

    def _coefficients(self, client: Client) -> tuple[Coefficient, Coefficient]:
        values = {module: weight.value for module, weight in self.weights[client.id].items()}
        if len(set(values.values())) == 1:  # so that an endpoint is one, whatever the granularity
            (value,) = set(values.values())
            return value, 1.0 - value
        return values, {module: 1.0 - value for module, value in values.items()}

    def _is_merge(self, client: Client) -> bool:
        """Whether there is anything to merge; an endpoint the client holds."""
        return client.id in self.local and self._coefficients(client) not in ((1.0, 0.0), (0.0, 1.0))

    def _merged(self, client: Client) -> Adapter:
        """The merge, on the server.

        With fp32 both ways the client would compute the same bits; a lossy encoding is in between otherwise.
        """
        coefficients = self._coefficients(client)
        federated, local = self.federated.part_of(client), Adapter(client.layout, self.local[client.id].vector)
        if self.options.space == "factor":
            return weighted_sum([federated, local], coefficients)
        merged = stack([federated, local], coefficients)
        return truncate(merged, client.layout) if self.options.space == "delta-truncated" else merged

    def _logged(self, name: str) -> dict[str, Any]:
        """What the round's record shows of a client's weight."""
        if name not in self.weights:
            return {"weight": 1.0, "flag": "absent"}
        evidence, weights = self.evidence[name], self.weights[name]
        shown: dict[str, Any] = {"q": sum(evidence.distance), "samples": evidence.samples}
        if evidence.samples < min(3, self.options.fisher_samples):
            shown["few_samples"] = True
        if evidence.dropped:
            shown["dropped"] = evidence.dropped
        if evidence.losses:
            shown |= {"searched": weighting.best_of(evidence.losses).value, "search_losses": list(evidence.losses)}
        if self.options.granularity == "parameter":  # those weights never leave the client
            moments = {key: number for key, number in _shown(weights[""]).items() if key not in ("weight", "raw")}
            return shown | {"granularity": "parameter"} | moments
        if "" in weights:
            return shown | _shown(weights[""])
        return shown | {"modules": {module: _shown(weight) for module, weight in weights.items()}}


def _shown(weight: Weight) -> dict[str, Any]:
    """A weight as JSON; moments that a rule does not have are left out."""
    numbers: Mapping[str, float] = {"a": weight.a, "b": weight.b, "c": weight.c, "D": weight.denominator}
    finite = {name: number for name, number in numbers.items() if abs(number) < float("inf")}
    flag = {"flag": weight.flag} if weight.flag else {}
    return {"weight": weight.value, "raw": weight.raw, **finite, **flag}


def _label(weight: float) -> str:
    return f"search-{weight:.3f}"


def _results(answer: Answer, kind: str) -> list[report_pb2.StepResult]:
    return [result for result in answer.report.results if result.WhichOneof("kind") == kind]
