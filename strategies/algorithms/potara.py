r"""Potara: a federated adapter and each client's own, merged once per client with a weight in closed form.

Zou, Shisher, Brinton and Tripathi, "Communication-Efficient Personalized Adaptation via Federated-Local Model Merging",
2026 (arXiv 2602.18658). Two separate branches from one seeded start:

* *federated*: rounds 1 to ``federated-rounds`` are FedAvg of the factors (FedIT);
* *local*: in the rounds after that, each client trains an adapter that starts from the seed and is never uploaded.

In the last round every client holds both and reports, for each, a few numbers per module (traces of its inverse
Fisher information, distances, losses of mixtures). The server turns them into this client's weight w
(:mod:`strategies.algorithms.potara_weights`) and the client's model is ``w x federated + (1 - w) x local``: in delta
space, exactly, at rank 2r. Merging A and B separately would add ``-w (1-w) (B_f - B_l)(A_f - A_l)``.

The federated branch stops early, so a client moves fewer bytes than with FedAvg. By default both branches have the
paper's budgets: 2/3 and 1/2 of the steps that FedAvg or local training would have (400 and 300 against 600 with its
ViT; 50 and 300 with its LLM), so a client computes 1/6 more. The paper's text was not available; statements about it
come from its abstract and a third party's notes. Departures: the merge is of deltas (the paper's theory, not its
appendix, which merges A and B apart: ``space = "factor"``), the covariance of the two adapters is left out
(``weight = "client-fisher-clipped"`` has it), and the paper's damping is not known.

If a client's labels are its own, its head is merged like the rest: w times the head that it trained in the federated
branch, plus 1 - w times the local one. With weights by module, w is their mean; with weights by parameter, one half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import Coefficient, stack, truncate, weighted_sum
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.algorithms import potara_weights as weighting
from strategies.algorithms.fedavg import FedAvg
from strategies.algorithms.potara_options import PotaraOptions
from strategies.algorithms.potara_weights import Evidence, Weight
from strategies.families.fedavg import SLOT as FEDERATED
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, round_record, steps
from strategies.framework.exchange import StrategyError
from strategies.framework.options import OptionError, require_range

LOCAL = "local"
MERGED = "merged"
PROBE = "probe"  # mixtures that are only evaluated
_HALVES = ("half-0", "half-1")
_KEPT = {FEDERATED: "precision-global", LOCAL: "precision-local"}


class Potara(AlloyStrategy[PotaraOptions]):
    """Two branches, one weight per client."""

    name = "potara"
    about = About(
        "its own merge of a federated and a local adapter, weighted in closed form",
        travels="P up, P down in 2/3 of the rounds, then P down once (potara.merge-at = server: also P up, 2 P down)",
        group="main",
        when="there are no held-out examples to search weights on; some rounds cost no bytes",
    )
    options: PotaraOptions
    may_end_early = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        two_thirds = max(1, min(round(self.rounds * 2 / 3), self.rounds - 1))
        self.federated_rounds = self.options.federated_rounds or two_thirds
        if 0 < self.rounds <= self.federated_rounds:
            raise OptionError(
                f"num-server-rounds = {self.rounds} with potara.federated-rounds = {self.options.federated_rounds}, "
                f"expected at least {self.federated_rounds + 1} rounds: one more for the local branch and the weights"
            )
        self.steps = self.options.local_steps or self._half_of_all(self.training.local_steps)
        require_range("potara.local-steps, in all rounds,", self.steps * max(self.rounds, 1), 1, 2**31 - 1)
        self.federated = FedAvg(training=self.training, seed=self.seed, storage=self.storage)
        self.trained: set[str] = set()  # clients whose data are in the federated adapter
        self.local_rounds: dict[str, int] = {}  # rounds in which the client has trained its local adapter
        self.evidence: dict[str, Evidence] = {}  # what clients reported
        self.local = Bank(self.storage)  # of clients that uploaded theirs (merge-at = "server")
        self.weights: dict[str, dict[str, Weight]] = {}

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Validation examples, if the weight depends on them."""
        return ("train", "validation") if self.options.reads_validation else ("train",)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """As for FedAvg: groups that both have must be equal. With weights per module, whole layouts must be."""
        same = first.digest == second.digest
        return same or (self.options.granularity != "module" and self.federated.compatible(first, second))

    def difference(self, first: Layout, second: Layout) -> str:
        """As for FedAvg."""
        return self.federated.difference(first, second)

    def enrol(self, client: Client) -> None:
        """Both branches start from the seed."""
        super().enrol(client)
        self.federated.enrol(client)

    def place(self, round_: int) -> tuple[int, int]:
        """Each branch has its own schedule, from its first round on."""
        if not self.rounds or round_ > self.rounds:
            return super().place(round_)
        if round_ <= self.federated_rounds:
            return round_, self.federated_rounds
        return round_ - self.federated_rounds, self.rounds - self.federated_rounds

    def needs_everyone(self, round_: int) -> bool:
        """In the local branch: it costs no bytes, and every client needs a weight."""
        return round_ > self.federated_rounds

    def brief(self, round_: int, client: Client) -> Brief:
        """A federated round; or local training, and in the last round the measurements for the weight."""
        if round_ <= self.federated_rounds:
            return self.federated.brief(round_, client)
        mix = steps.mixture(LOCAL)
        count = self.options.local_steps or self._half_of_all(self.local_steps(client))
        plan = [
            steps.initialise(LOCAL, self.seed, keep_existing=client.id in self.local_rounds),
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL], steps=count),
        ]
        if not self._is_last(round_):
            return Brief(plan)
        if self._splits(client):  # with as many steps as the local adapter has had by now
            own = count * (self.local_rounds.get(client.id, 0) + 1)
            for index, half in enumerate(_HALVES):
                mix = steps.mixture(half)
                plan.append(steps.initialise(half, self.seed, keep_existing=False))
                plan.append(steps.train(self.training, mix, [half], steps=own, fold=(index, 2)))
            plan.append(steps.distance(*_HALVES))
        plan.append(steps.distance(FEDERATED, LOCAL))
        if self.options.needs_fisher:
            plan.append(self._fisher(client))
        for weight in self._grid(client):
            plan += self._evaluated(client, weight, _label(weight), split="validation", loss_only=True)
        if self.options.merge_at == "server":
            plan.append(steps.send(self.training, LOCAL, relative_to_received=False))
        return Brief(plan, {FEDERATED: self.federated.part_of(client)})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep a trained federated adapter, or the measurements for the weight."""
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
        """Average the federated branch, or compute the weights."""
        if round_ <= self.federated_rounds:
            return {"branch": "federated"} | self.federated.settle(round_)
        record: dict[str, Any] = {"branch": "local"}
        if self._is_last(round_):
            self.weights = self._weigh()
            record[round_record.WEIGHTS] = {name: self._logged(name) for name in sorted(self.clients)}
        return record

    def deliver(self, client: Client) -> Brief:
        """This client's merge. A client that missed the last round has no weight and gets the federated adapter."""
        if client.id not in self.weights:
            return self.federated.deliver(client)
        plan: list[steps.Step] = []
        evidence = self.evidence[client.id]
        named = {"local": 0.0, "half": 0.5, "federated": 1.0}
        if evidence.losses:
            named["searched"] = weighting.best_of(evidence.losses).value
        named |= {f"damping-{damping}": weight for damping, weight in self._by_damping(client.id).items()}
        for label, weight in named.items():
            plan += self._evaluated(client, weight, label)
        if self.options.merge_at == "server" and self._is_merge(client):
            mix = steps.mixture(MERGED)
            heads = steps.own_heads(MERGED, steps.mixture(FEDERATED, LOCAL, coefficients=self._coefficients(client)))
            merged = Made({MERGED: partial(self._merged, client)})
            return Brief([*plan, heads, steps.save(mix), steps.evaluate(self.training, mix)], merged)
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
            if like is not None:  # unknown for a client that has not rejoined and has a layout of its own
                self.local.put_row(name, like.layout, row)
        self.weights = self._weigh()

    def _is_last(self, round_: int) -> bool:
        """Whether the weights are made in this round; without a known end, in every round of the local branch."""
        return round_ > self.federated_rounds and round_ >= self.rounds

    def _splits(self, client: Client) -> bool:
        """Whether this client trains on halves of its data; one example has no halves."""
        return self.options.needs_b and self.options.variance == "split-half" and client.examples > 1

    def _grid(self, client: Client) -> list[float]:
        """Weights that the line search tries; none for a client without held-out examples."""
        return weighting.grid(self.options.points) if self.options.points and client.held_out else []

    def _half_of_all(self, in_round: int) -> int:
        """Steps in each round of the local branch, half of the run's steps in total; at least one per round."""
        if not self.rounds:
            return in_round
        return -(-self.rounds * in_round // (2 * (self.rounds - self.federated_rounds)))

    def _fisher(self, client: Client) -> steps.Step:
        return steps.fisher(
            FEDERATED,
            LOCAL,
            split=self.options.calibration if client.held_out else "train",
            samples=self.options.fisher_samples,
            damping=self.options.damping,
            more_dampings=self.options.more_dampings,
            in_delta_space=self.options.trace_space == "delta",
            keep=(_KEPT[FEDERATED], _KEPT[LOCAL]) if self.options.granularity == "parameter" else ("", ""),
        )

    def _mixture(
        self, client: Client, coefficients: tuple[Coefficient, Coefficient], target: str = MERGED
    ) -> tuple[list[steps.Step], plan_pb2.Mixture]:
        """The merged model, and the steps that make it. At an endpoint it is that adapter itself, to the bit."""
        if coefficients in ((1.0, 0.0), (0.0, 1.0)):
            return [], steps.mixture((FEDERATED, LOCAL)[coefficients.index(1.0)])
        mix = steps.mixture(FEDERATED, LOCAL, coefficients=coefficients)
        if self.options.space == "delta":
            return [], mix
        space, rank = self.options.space, 0
        if space == "delta-truncated":
            space, rank = "delta", max(client.layout.ranks.values())
        return [steps.merge(target, mix, space=space, truncate_rank=rank)], steps.mixture(target)

    def _evaluated(
        self, client: Client, weight: float, label: str, split: str | None = None, *, loss_only: bool = False
    ) -> list[steps.Step]:
        before, mix = self._mixture(client, (weight, 1.0 - weight), PROBE)
        return [*before, steps.evaluate(self.training, mix, label, split, loss_only=loss_only)]

    def _evidence(self, client: Client, answer: Answer) -> Evidence:
        distances = [list(result.distance.squared) for result in _results(answer, "distance")]  # halves, if any, first
        found = report_pb2.FisherResult()
        if self.options.needs_fisher:
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
            losses=[_loss(client, answer, weight) for weight in self._grid(client)],
            samples=found.samples,
            dropped=found.dropped,
            more=[[list(m.variance_first), list(m.variance_second), list(m.covariance)] for m in found.more],
        )

    def _weigh(self) -> dict[str, dict[str, Weight]]:
        """Weights of every client that reported, by module; the key "" means all modules together."""
        names = sorted(self.evidence)
        if not names:
            return {}
        evidence = [self.evidence[name] for name in names]
        modules = next(iter(self.clients.values())).layout.modules  # one layout for all
        total = self._total()
        by_module = self.options.granularity == "module"
        found = {
            module: weighting.weigh(evidence, self.options.weight, index, self.options.fed_scale, total)
            for module, index in ([(m, i) for i, m in enumerate(modules)] if by_module else [("", None)])
        }
        return {name: {module: column[k] for module, column in found.items()} for k, name in enumerate(names)}

    def _by_damping(self, name: str) -> dict[str, float]:
        """The client's weight at each of the other dampings, by the damping as written in the option."""
        reported = self.evidence[name]
        if not reported.more:
            return {}
        ids = sorted(self.evidence)
        found = {}
        for index, damping in enumerate(self.options.more_dampings):
            evidence = [self.evidence[other].at(index) for other in ids]
            weights = weighting.weigh(evidence, self.options.weight, None, self.options.fed_scale, self._total())
            found[f"{damping:g}"] = weights[ids.index(name)].value
        return found

    def _total(self) -> int:
        """Examples of all clients that trained the federated adapter."""
        return sum(client.examples for client in self.clients.values() if client.id in self.trained)

    def _coefficients(self, client: Client) -> tuple[Coefficient, Coefficient]:
        values = {module: weight.value for module, weight in self.weights[client.id].items()}
        if len(set(values.values())) == 1:  # so that an endpoint is recognised, whatever the granularity
            (value,) = set(values.values())
            return value, 1.0 - value
        return values, {module: 1.0 - value for module, value in values.items()}

    def _is_merge(self, client: Client) -> bool:
        """Whether a merge must be sent; the client holds an endpoint itself."""
        return client.id in self.local and self._coefficients(client) not in ((1.0, 0.0), (0.0, 1.0))

    def _merged(self, client: Client) -> Adapter:
        """The merge, on the server.

        With fp32 both ways the client would compute the same bits; with another encoding the numbers differ slightly.
        """
        coefficients = self._coefficients(client)
        federated, local = self.federated.part_of(client), Adapter(client.layout, self.local[client.id].vector)
        if self.options.space == "factor":
            return weighted_sum([federated, local], coefficients)
        merged = stack([federated, local], coefficients)
        return truncate(merged, client.layout) if self.options.space == "delta-truncated" else merged

    def _logged(self, name: str) -> dict[str, Any]:
        """A client's weight as the round's record shows it."""
        if name not in self.weights:
            return {"weight": 1.0, "flag": "absent"}
        evidence, weights = self.evidence[name], self.weights[name]
        shown: dict[str, Any] = {"q": sum(evidence.distance)}
        if self.options.needs_fisher:
            shown["samples"] = evidence.samples
        if evidence.more:
            shown["dampings"] = self._by_damping(name)
        if self.options.needs_fisher and evidence.samples < min(3, self.options.fisher_samples):
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


def _loss(client: Client, answer: Answer, weight: float) -> float:
    found = answer.metrics[_label(weight)]
    if "loss" not in found:
        raise StrategyError(f"client {client.id!r} does not tell its losses, which this way of weighting needs")
    return found["loss"]


def _label(weight: float) -> str:
    return f"search-{weight:.3f}"


def _results(answer: Answer, kind: str) -> list[report_pb2.StepResult]:
    return [result for result in answer.report.results if result.WhichOneof("kind") == kind]
