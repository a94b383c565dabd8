r"""FedMerge: d global models on the server, one merged model per client.

Chen, Zhou, Long, Jiang, Zhang, "FedMerge: Federated Personalization via Model Merging", AAAI 2026 (arXiv 2504.06768).

The server keeps models :math:`\Theta_1 .. \Theta_d` and logits :math:`W [K, d]`; client i is sent only
:math:`\theta_i = \sum_j w_{ij} \Theta_j` with :math:`w_i = softmax(W_i)`, trains it with a proximal pull
:math:`\mu/2 \|\cdot\|^2` to what it received, and returns it, so the traffic is FedAvg's. With the displacement
:math:`D_i = \theta_i - \theta_i'` as pseudo-gradient and :math:`p_i = n_i / \sum n`:

.. math::
    G_{ij} = w_{ij} \langle \Theta_j - \theta_i, D_i \rangle, \qquad
    W \leftarrow W - \eta_W \, p G / \max|p G|, \qquad
    \Theta_j \leftarrow \Theta_j - \eta_\Theta \sum_i C_{ij} D_i, \quad C_{ij} = p_i w_{ij} / \sum_l p_l w_{lj}

(w in C from the new W). From the paper, as its summaries and the authors' code show it: the merge, both steps and their
order, the max-norm step (the code repeats a fixed step until the logits have moved by ``lr-w``; ours is the closed form
of that), the column norm, the pull, and no fine-tuning at the end.

Ours:

* The models are LoRA adapters and heads; the public code merges whole networks. With one frozen LoRA A for all
  (``variant = "frozen-a"``, the default), merging the B's is merging the deltas: exact, rank r, and half the traffic.
  ``"trained-a"`` also trains A and averages it as FedAvg does; ``"factors"`` merges A and B separately, as the code
  would merge any two parameters; their product then has cross terms.
* ``init = "cluster"``. The code draws d random networks; ``"jitter"`` is the closest to it that keeps a pre-trained
  base.
* ``w-layers = "*.B"``. The code lets W see the last layer alone: that is ``"head"``, if clients share one.
* ``w-step = "maxnorm-per-row"`` and ``"adam"``, ``theta-norm = "none"``, ``min-mass``, the guard against steps that are
  only rounding errors, and clients that are absent or late. (The code takes all clients in every round, and divides by
  zero with one model.)
* AdamW in the clients, unless ``optimizer = "sgd"``: then D is a sum of normalised steps, and the max-norm across
  clients compares those. The code has SGD.

All of the authors' settings together are a block of run-config in docs/paper-settings.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.blocks import Part, Row, combine, rows_of, squared_norms
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.layout import Factor, Layout
from strategies.algorithms.fedmerge_weights import (
    GUARD,
    cluster,
    logit_gradient,
    logit_step,
    mean_row,
    merge_models,
    model_coefficients,
)
from strategies.families.part_average import NOT_A
from strategies.framework import About, AlloyStrategy, Answer, Brief, Client, State, StrategyError, round_record, steps
from strategies.framework.options import require_choice, require_range

SLOT = "merged"
HEAD = "head"
"""Value of ``w-layers``: all tensors of shared heads."""


@dataclass(frozen=True)
class FedMergeOptions:
    """Defaults are ours, for a handful of rounds (chosen on validation data of ``digits``).

    The authors' are in docs/paper-settings.md.
    """

    models: int = 3
    """d, the number of global models. Take fewer than there are clients; otherwise every client gets its own model."""
    variant: str = "frozen-a"
    """``"frozen-a"``: one A for all, never trained; ``"trained-a"``: A is averaged as FedAvg does; ``"factors"``: A and
    B are merged separately."""
    lr_w: float = 0.5
    """Step size of the logits. With hundreds of rounds take 0.01 to 0.05; in five rounds that does not separate the
    models."""
    lr_theta: float = 1.0
    """Step size of the global models."""
    mu: float = 0.02
    """Strength of the pull of local training towards the received model."""
    w_layers: str = "*.B"
    """The tensors that W learns from: comma-separated patterns of their names, or ``head`` for the head that clients
    share, whatever its name (the authors' choice)."""
    w_step: str = "maxnorm"
    """``"maxnorm"``: the largest logit change of the round is ``lr-w``; ``"maxnorm-per-row"``: the largest change of
    every client is; or ``"adam"``."""
    w_client_weight: bool = True
    """Weight a client's logit gradient by its share of the examples."""
    theta_norm: str = "column"
    """``"column"``: each model moves by a weighted mean of the displacements; ``"none"``: by their weighted sum."""
    min_mass: float = 1e-3
    """A model with less total weight than this is not changed."""
    init: str = "cluster"
    """``"cluster"`` runs round 1 as FedAvg and takes the k-means centres of the uploads as models; ``"jitter"`` starts
    from tiny random models."""
    jitter: float = 1e-3
    """Scale of the noise in the random start: jitter / sqrt(d_out) in B."""
    cluster_temperature: float = 0.25
    """Temperature of the first weights: they are a softmax of the negative squared distances to the centres, in units
    of the mean distance."""

    def __post_init__(self) -> None:
        require_choice("fedmerge.variant", self.variant, ("frozen-a", "trained-a", "factors"))
        require_choice("fedmerge.w-step", self.w_step, ("maxnorm", "maxnorm-per-row", "adam"))
        require_choice("fedmerge.theta-norm", self.theta_norm, ("column", "none"))
        require_choice("fedmerge.init", self.init, ("jitter", "cluster"))
        require_range("fedmerge.models", self.models, 1)
        for name in ("lr_w", "lr_theta", "mu", "min_mass", "jitter"):
            require_range(f"fedmerge.{name.replace('_', '-')}", getattr(self, name), 0)
        require_range("fedmerge.cluster-temperature", self.cluster_temperature, 1e-6)


class FedMerge(AlloyStrategy[FedMergeOptions]):
    """d models, K clients, one softmax row per client."""

    name = "fedmerge"
    about = About(
        "its own merge of d global models, with learned weights",
        trains="B, head (A frozen, from the seed)",
        travels="P_B up, P_B down",
        group="main",
        when="clients form groups that nobody knows; d models stay at the server, one travels",
    )
    options: FedMergeOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: dict[str, int] = {}
        self.logits = torch.zeros(0, self.options.models, dtype=torch.float64)
        self.theta = torch.zeros(self.options.models, 0)
        self.moments = torch.zeros(2, 0, self.options.models, dtype=torch.float64)  # of "adam"
        self.updates = torch.zeros(0, dtype=torch.int64)  # step count of each row's moments
        self.base: Adapter | None = None  # the part that is not merged: the common A
        self.part: Layout | None = None
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.settled = 0
        self.moved = Bank(self.storage)  # received - returned, of the merged part
        self.returned = Bank(self.storage)  # whole uploads, if a step needs them

    def enrol(self, client: Client) -> None:
        """A new client's weights are the mean of the others'."""
        if self.base is None:
            part = client.layout.select(() if self.options.variant == "factors" else NOT_A)
            mask = _mask(part, self.options.w_layers)
            super().enrol(client)  # only now, so that a refused client leaves nothing behind
            self.base, self.part, self.mask = Adapter.initial(client.layout, self.seed), part, mask
            self.theta = _jittered(self.base.part(part), self.options, self.seed)
        else:
            super().enrol(client)
        self._add_row(client)

    def brief(self, round_: int, client: Client) -> Brief:
        """Send the client its merge; the client evaluates it, trains it with the pull, and returns it."""
        mix = steps.mixture(SLOT)
        factors = NOT_A if self.options.variant == "frozen-a" else ()
        return Brief(
            [
                *self._common_start(),
                steps.evaluate(self.training, mix),
                steps.train(self.training, mix, [SLOT], factors=factors, proximal=(SLOT, self.options.mu)),
                steps.send(self.training, SLOT, factors=factors),
            ],
            self._merge(client),
        )

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the displacement: what the client received minus what it returned."""
        returned = answer.adapters[SLOT]
        started = answer.received[SLOT].part(self._part).vector
        self.moved[client.id] = Adapter(self._part, started - returned.part(self._part).vector)
        if self._clusters or self.options.variant == "trained-a":
            self.returned[client.id] = returned

    def settle(self, round_: int) -> dict[str, Any]:
        """Update the logits, then the models with the new logits (Gauss-Seidel, as in the authors' code)."""
        moved, returned = self.moved.taken(), self.returned.taken()
        names = list(moved)
        record: dict[str, Any] = {round_record.MERGED: len(names)}
        if names:
            counts = torch.tensor([self.clients[name].examples for name in names], dtype=torch.float64)
            shares = counts / counts.sum()
            rows = torch.tensor([self.rows[name] for name in names])
            if self.options.variant == "trained-a":
                self._average_a(returned, names, shares)
            if self._clusters:
                self._start_from_clusters(returned.parts(self._part).rows(names), rows)
            else:
                record["logit_step"] = self._step(moved.rows(names), rows, shares)
            self.settled += 1
        weights = torch.softmax(self.logits, dim=1)
        record[round_record.WEIGHTS] = {
            name: [round(w, 6) for w in weights[row].tolist()] for name, row in self.rows.items()
        }
        return record

    def deliver(self, client: Client) -> Brief:
        """The merged model is the personal model; there is no local fine-tuning."""
        mix = steps.mixture(SLOT)
        plan = [*self._common_start(), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, self._merge(client))

    def global_models(self, client: Client) -> dict[str, Adapter]:
        """The d global models; a common A is not in them."""
        parts = {str(index): Adapter(self._part, theta) for index, theta in enumerate(self.theta)}
        if self.options.variant != "trained-a":
            return parts
        return {name: self._base.with_part(part) for name, part in parts.items()}

    def state(self) -> State:
        """Models, logits, and the numbers that are not merged."""
        tensors = {
            "theta": self.theta,
            "logits": self.logits,
            "moments": self.moments,
            "updates": self.updates,
            "base": self._base.vector,
        }
        copies = {name: tensor.clone() for name, tensor in tensors.items()}  # logits and moments change in place
        return State(copies, {"rows": dict(self.rows), "settled": self.settled})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before, and a client that is not in the state is new."""
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.theta, self.logits, self.moments = tensors["theta"], tensors["logits"], tensors["moments"]
        self.updates = tensors["updates"]
        self.base = Adapter(self._base.layout, tensors["base"])
        self.rows, self.settled = dict(state.values["rows"]), int(state.values["settled"])
        for client in self.clients.values():
            self._add_row(client)

    def _common_start(self) -> list[steps.Step]:
        """Frozen A is drawn from the seed at the client, so it never travels."""
        return [steps.initialise(SLOT, self.seed)] if self.options.variant == "frozen-a" else []

    def _add_row(self, client: Client) -> None:
        if client.id in self.rows:
            return
        self.rows[client.id] = len(self.rows)
        row = mean_row(self.logits) if self.settled else torch.zeros(self.options.models, dtype=torch.float64)
        self.logits = torch.cat([self.logits, row[None]])
        self.moments = torch.cat([self.moments, torch.zeros(2, 1, self.options.models)], dim=1)
        self.updates = torch.cat([self.updates, torch.zeros(1, dtype=torch.int64)])

    @property
    def _clusters(self) -> bool:
        """Whether this round ends with clustering its uploads."""
        return self.settled == 0 and self.options.init == "cluster" and self.options.models > 1

    def _merge(self, client: Client) -> Made:
        """The client's merge as a recipe, with the current models, weights and A."""
        row = self.rows[client.id]
        theta, logits, part, base = self.theta, self.logits[row : row + 1].clone(), self._part, self._base

        def made() -> Adapter:
            merged = Adapter(part, merge_models(theta, logits)[0])
            return merged if self.options.variant == "frozen-a" else base.with_part(merged)

        return Made({SLOT: made})

    def _step(self, displacement: Sequence[Row], rows: Tensor, shares: Tensor) -> float:
        """Make one W step and one Theta step; return the largest logit change."""
        columns_seen = _ranges(self.mask)
        seen, moved = ([Part(row, columns_seen) for row in found] for found in (rows_of(self.theta), displacement))
        gradient = logit_gradient(seen, self.logits[rows], moved)
        pull = shares if self.options.w_client_weight else torch.ones_like(shares)
        bound = float(squared_norms(seen).max().sqrt() * squared_norms(moved).max().sqrt())
        if self.options.w_step == "adam":
            step = self._adam(pull[:, None] * gradient, rows, bound)
        else:
            per_row = self.options.w_step == "maxnorm-per-row"
            step = logit_step(gradient, pull, self.options.lr_w, bound, per_row=per_row)
        self.logits[rows] -= step
        weights = model_coefficients(
            self.logits[rows], shares, norm=self.options.theta_norm, min_mass=self.options.min_mass
        )
        # Equal columns are multiplied once: equal models must stay equal to the bit, and a matrix product may round
        # equal rows differently.
        columns, which = torch.unique(weights, dim=1, return_inverse=True)
        step_of_models = combine(displacement, self.options.lr_theta * columns.T.to(self.theta.dtype))
        self.theta = self.theta - step_of_models[which]
        return float(step.abs().max())

    def _adam(self, gradient: Tensor, rows: Tensor, bound: float) -> Tensor:
        if not gradient.abs().max() > GUARD * bound:
            return torch.zeros_like(gradient)
        self.moments[0, rows] = 0.9 * self.moments[0, rows] + 0.1 * gradient
        self.moments[1, rows] = 0.999 * self.moments[1, rows] + 0.001 * gradient.square()
        self.updates[rows] += 1
        count = self.updates[rows].double()[:, None]  # counted by row: clients join late and miss rounds
        first = self.moments[0, rows] / (1 - 0.9**count)
        second = self.moments[1, rows] / (1 - 0.999**count)
        return self.options.lr_w * first / (second.sqrt() + 1e-30)

    def _start_from_clusters(self, uploads: Sequence[Row], rows: Tensor) -> None:
        self.theta, logits = cluster(uploads, self.options.models, self.options.cluster_temperature, self.seed)
        self.logits[:] = mean_row(logits)  # clients that did not answer
        self.logits[rows] = logits

    def _average_a(self, returned: Bank, names: list[str], shares: Tensor) -> None:
        layout = self._base.layout.select([Factor.A])
        self.base = self._base.with_part(returned.parts(layout).combine(names, shares[None])[0])

    @property
    def _base(self) -> Adapter:
        if self.base is None:
            raise StrategyError("no client is enrolled yet")
        return self.base

    @property
    def _part(self) -> Layout:
        if self.part is None:
            raise StrategyError("no client is enrolled yet")
        return self.part


def _ranges(mask: Tensor) -> list[tuple[int, int]]:
    """Where a mask ``[P]`` is true, as ranges ``(start, stop)``."""
    padded = torch.zeros(len(mask) + 2, dtype=torch.int8)
    padded[1:-1] = mask
    edges = padded.diff()
    starts, stops = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, stops, strict=True))


def _mask(part: Layout, patterns: str) -> Tensor:
    """The numbers of the merged part that W learns from, ``[P]`` bool."""
    mask = torch.zeros(part.size, dtype=torch.bool)
    heads = [entry.name for entry in part.entries if entry.factor in (Factor.WEIGHT, Factor.BIAS)]
    for pattern in (item.strip() for item in patterns.split(",")):
        names = heads if pattern == HEAD else [name for name in part.by_name if fnmatch.fnmatchcase(name, pattern)]
        if not names and pattern == HEAD:
            raise StrategyError(
                "fedmerge.w-layers: 'head' is the head that clients share, but they share none; a classifier is shared "
                "where run-config's 'labels' names all labels"
            )
        if not names:
            raise StrategyError(
                f"fedmerge.w-layers: {pattern!r} matches none of the tensors {', '.join(sorted(part.by_name))}"
            )
        for name in names:
            mask[part.slice_of(name)] = True
    return mask


def _jittered(start: Adapter, options: FedMergeOptions, seed: int) -> Tensor:
    """d models ``[d, P]``: the start, plus noise (scale jitter / sqrt(d_out)) in B and weights; the noise sums to zero.

    Equal models with equal logits are an exact saddle point, which a tiny jitter leaves. One model gets no jitter: it
    is FedAvg.
    """
    generator = torch.Generator().manual_seed(seed)
    models = start.vector.expand(options.models, -1).clone()
    for entry in start.layout.entries:
        if entry.factor in (Factor.B, Factor.WEIGHT):
            noise = torch.randn(options.models, entry.size, generator=generator) / entry.shape[0] ** 0.5
            models[:, start.layout.slice_of(entry.name)] += options.jitter * (noise - noise.mean(dim=0))
    return models
