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

(w in C from the new W). With one frozen LoRA A for all (``fedmerge.variant = "frozen-a"``, the default), merging the
B's is merging the deltas: exact, rank r, and half the traffic. ``"trained-a"`` also trains A and averages it as FedAvg
does; ``"factors"`` merges A and B separately, whose product has cross terms.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Factor, Layout
from strategies.framework import steps
from strategies.framework.contract import About, AlloyStrategy, Answer, Brief, Client, State, StrategyError
from strategies.framework.options import require_choice, require_range

SLOT = "merged"
GUARD = 1e-12
"""Below this fraction of the largest possible inner product a logit step would amplify rounding: W stays."""
_CHUNK = 2**20
_NOT_A = (Factor.B, Factor.WEIGHT, Factor.BIAS)


@dataclass(frozen=True)
class FedMergeOptions:
    """Defaults are for a handful of rounds (chosen on validation data of ``digits``); the rest is as in the paper."""

    models: int = 3
    """d, the number of global models: fewer than clients, else every client gets one of its own."""
    variant: str = "frozen-a"
    """``"frozen-a"``: one A for all, never trained; ``"trained-a"``: A is averaged as FedAvg does; ``"factors"``: A and
    B are merged separately."""
    lr_w: float = 0.5
    """Step of the logits. With hundreds of rounds take 0.01 to 0.05; with five, that does not separate the models."""
    lr_theta: float = 1.0
    """Step of the global models."""
    mu: float = 0.02
    """Strength of the clients' pull to the model that they received."""
    w_layers: str = "*.B"
    """Comma-separated patterns of the tensor names that W learns from."""
    w_step: str = "maxnorm"
    """``"maxnorm"``: the largest logit change of the round is ``lr-w``; ``"maxnorm-per-row"``: that of every client;
    ``"adam"``."""
    w_client_weight: bool = True
    """Weigh a client's logit gradient by its share of the examples."""
    theta_norm: str = "column"
    """``"column"``: each model moves by a weighted mean of the displacements; ``"none"``: by their weighted sum."""
    min_mass: float = 1e-3
    """A model that carries less weight than this is left alone."""
    init: str = "cluster"
    """``"cluster"`` runs round 1 as FedAvg and takes the k-means centres of the uploads as models; ``"jitter"`` starts
    from tiny random models."""
    jitter: float = 1e-3
    """Scale of the noise in the random start: jitter / sqrt(d_out) in B."""
    cluster_temperature: float = 0.25
    """Temperature of the first weights: a softmax over squared distances to the centres, in units of their mean."""

    def __post_init__(self) -> None:
        require_choice("fedmerge.variant", self.variant, ("frozen-a", "trained-a", "factors"))
        require_choice("fedmerge.w-step", self.w_step, ("maxnorm", "maxnorm-per-row", "adam"))
        require_choice("fedmerge.theta-norm", self.theta_norm, ("column", "none"))
        require_choice("fedmerge.init", self.init, ("jitter", "cluster"))
        require_range("fedmerge.models", self.models, 1)
        for name in ("lr_w", "lr_theta", "mu", "min_mass", "jitter"):
            require_range(f"fedmerge.{name.replace('_', '-')}", getattr(self, name), 0)
        require_range("fedmerge.cluster-temperature", self.cluster_temperature, 1e-6)


def merge_models(theta: Tensor, logits: Tensor) -> Tensor:
    """Merged models ``softmax(logits) [K, d] @ theta [d, P]`` as ``[K, P]``; the weights are taken in float64."""
    return torch.softmax(logits.double(), dim=1).to(theta.dtype) @ theta


def logit_gradient(theta: Tensor, logits: Tensor, displacement: Tensor) -> Tensor:
    """``G_ij = w_ij <Theta_j - theta_i, D_i>``, ``[S, d]`` float64; rows sum to zero.

    Args:
        theta: models ``[d, P]``.
        logits: ``[S, d]``, one row per client that answered.
        displacement: ``D_i = received - returned``, ``[S, P]``.

    Inner products run in float64 in column chunks: with equal models float32 rounding alone would look like a signal.
    """
    weights = torch.softmax(logits.double(), dim=1)
    inner = torch.zeros_like(weights)
    for start in range(0, theta.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        models, moved = theta[:, columns].double(), displacement[:, columns].double()
        inner += moved @ models.T - (moved * (weights @ models)).sum(dim=1, keepdim=True)
    return weights * inner


def logit_step(gradient: Tensor, shares: Tensor, lr: float, bound: float, *, per_row: bool = False) -> Tensor:
    """The max-norm step ``lr p G / max|p G|`` to subtract from the logits, ``[S, d]``; zero under the guard.

    This is the closed form of the authors' loop that repeats a fixed step until the logits have moved by ``lr``.

    Args:
        gradient: ``G`` ``[S, d]``.
        shares: ``p`` ``[S]`` (ones to leave the example counts out).
        lr: largest logit change.
        bound: largest possible |inner product| in G, ``max_ij |Theta_j| |D_i|``; the guard is relative to it.
        per_row: normalise every client's row by its own maximum.
    """
    weighted = shares.double()[:, None] * gradient
    largest = weighted.abs().amax(dim=1, keepdim=True) if per_row else weighted.abs().max().expand(len(weighted), 1)
    usable = torch.isfinite(largest) & (largest > GUARD * bound)
    return torch.where(usable, lr * (weighted / torch.where(usable, largest, torch.ones_like(largest))), 0.0)


def model_coefficients(logits: Tensor, shares: Tensor, *, norm: str = "column", min_mass: float = 1e-3) -> Tensor:
    """``C_ij = p_i w_ij / m_j`` with column masses ``m_j = sum_i p_i w_ij``, ``[S, d]`` float64.

    ``norm = "none"`` leaves the division out. A column whose mass is below ``min_mass`` is zero: a model that nobody
    uses would otherwise follow noise at the full rate.
    """
    weighted = shares.double()[:, None] * torch.softmax(logits.double(), dim=1)
    mass = weighted.sum(dim=0, keepdim=True)
    scaled = weighted / mass.clamp_min(1e-12) if norm == "column" else weighted
    return torch.where(mass < min_mass, torch.zeros_like(scaled), scaled)


def mean_row(logits: Tensor) -> Tensor:
    """Logits ``[d]`` of the mean weights of the rows of ``logits [K, d]``, centred: the row of a client that is new."""
    row = torch.softmax(logits.double(), dim=1).mean(dim=0).clamp_min(1e-30).log()
    return row - row.mean()


def cluster(uploads: Tensor, models: int, temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of the uploads ``[K, P]``: centres ``[d, P]``, and logits ``[K, d]`` of minus the squared distances.

    Rows of the logits are centred; distances are divided by their mean times ``temperature``. With fewer clients than
    models, the remaining models start at the mean of all uploads.
    """
    from sklearn.cluster import KMeans  # only here: importing scikit-learn costs a second

    count = min(models, len(uploads))
    found = KMeans(count, n_init=10, random_state=seed % 2**32).fit(uploads.double().numpy())
    centres = torch.from_numpy(found.cluster_centers_).to(uploads.dtype)
    if count < models:
        centres = torch.cat([centres, uploads.mean(dim=0, keepdim=True).expand(models - count, -1)])
    distances = torch.cdist(uploads.double(), centres.double()).square()
    logits = -distances / (temperature * distances.mean().clamp_min(1e-30))
    return centres, logits - logits.mean(dim=1, keepdim=True)


class FedMerge(AlloyStrategy[FedMergeOptions]):
    """d models, K clients, one softmax row per client."""

    name = "fedmerge"
    about = About(
        "its own merge of d global models, with learned weights",
        trains="B, head (A frozen, from the seed)",
        travels="P_B up, P_B down",
        group="main",
    )
    options: FedMergeOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: dict[str, int] = {}
        self.logits = torch.zeros(0, self.options.models, dtype=torch.float64)
        self.theta = torch.zeros(self.options.models, 0)
        self.moments = torch.zeros(2, 0, self.options.models, dtype=torch.float64)  # of "adam"
        self.updates = torch.zeros(0, dtype=torch.int64)  # of each row's moments
        self.base: Adapter | None = None  # numbers that are not merged: the common A
        self.part: Layout | None = None
        self.mask = torch.zeros(0, dtype=torch.bool)
        self.settled = 0
        self.arrived: dict[str, tuple[Adapter, Adapter]] = {}

    def enrol(self, client: Client) -> None:
        """A new client's weights are the mean of the others'."""
        if self.base is None:
            part = client.layout.select(() if self.options.variant == "factors" else _NOT_A)
            mask = _mask(part, self.options.w_layers)
            super().enrol(client)  # here, so that a client that is refused leaves nothing behind
            self.base, self.part, self.mask = Adapter.initial(client.layout, self.seed), part, mask
            self.theta = _jittered(self.base.part(part), self.options, self.seed)
        else:
            super().enrol(client)
        self._add_row(client)

    def brief(self, round_: int, client: Client) -> Brief:
        """Send the client its merge; it evaluates, trains with the pull, returns it."""
        mix = steps.mixture(SLOT)
        factors = _NOT_A if self.options.variant == "frozen-a" else ()
        return Brief(
            [
                *self._common_start(),
                steps.evaluate(self.training, mix),
                steps.train(self.training, mix, [SLOT], factors=factors, proximal=(SLOT, self.options.mu)),
                steps.send(self.training, SLOT, factors=factors),
            ],
            {SLOT: self._merged(client)},
        )

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep what the client started from and what it made of it."""
        self.arrived[client.id] = (answer.received[SLOT], answer.adapters[SLOT])

    def settle(self, round_: int) -> dict[str, Any]:
        """First the logits, then the models with the new logits (Gauss-Seidel, as the authors do)."""
        names = sorted(self.arrived)
        arrived, self.arrived = self.arrived, {}
        record: dict[str, Any] = {"merged": len(names)}
        if names:
            counts = torch.tensor([self.clients[name].examples for name in names], dtype=torch.float64)
            shares = counts / counts.sum()
            rows = torch.tensor([self.rows[name] for name in names])
            if self.options.variant == "trained-a":
                self._average_a(arrived, names, shares)
            started = torch.stack([arrived[name][0].part(self._part).vector for name in names])
            returned = torch.stack([arrived[name][1].part(self._part).vector for name in names])
            if self.settled == 0 and self.options.init == "cluster" and self.options.models > 1:
                self._start_from_clusters(returned, rows)
            else:
                record["logit_step"] = self._step(started - returned, rows, shares)
            self.settled += 1
        weights = torch.softmax(self.logits, dim=1)
        record["weights"] = {name: [round(w, 6) for w in weights[row].tolist()] for name, row in self.rows.items()}
        return record

    def deliver(self, client: Client) -> Brief:
        """The merged model itself is the personal model; no local fine-tuning."""
        mix = steps.mixture(SLOT)
        plan = [*self._common_start(), steps.save(mix), steps.evaluate(self.training, mix)]
        return Brief(plan, {SLOT: self._merged(client)})

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
        """Continue from saved numbers; clients are enrolled before, and one that the state does not know is new."""
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

    def _merged(self, client: Client) -> Adapter:
        row = self.rows[client.id]
        merged = Adapter(self._part, merge_models(self.theta, self.logits[row : row + 1])[0])
        return merged if self.options.variant == "frozen-a" else self._base.with_part(merged)

    def _step(self, displacement: Tensor, rows: Tensor, shares: Tensor) -> float:
        """One W step and one Theta step; returns the largest logit change."""
        seen, moved = self.theta[:, self.mask], displacement[:, self.mask]
        gradient = logit_gradient(seen, self.logits[rows], moved)
        pull = shares if self.options.w_client_weight else torch.ones_like(shares)
        bound = float(seen.double().norm(dim=1).max() * moved.double().norm(dim=1).max())
        if self.options.w_step == "adam":
            step = self._adam(pull[:, None] * gradient, rows, bound)
        else:
            per_row = self.options.w_step == "maxnorm-per-row"
            step = logit_step(gradient, pull, self.options.lr_w, bound, per_row=per_row)
        self.logits[rows] -= step
        weights = model_coefficients(
            self.logits[rows], shares, norm=self.options.theta_norm, min_mass=self.options.min_mass
        )
        # Equal columns are multiplied once: models that are equal must stay so to the bit, and a product of matrices
        # may round equal rows differently.
        columns, which = torch.unique(weights, dim=1, return_inverse=True)
        self.theta = self.theta - (self.options.lr_theta * columns.T.to(self.theta.dtype) @ displacement)[which]
        return float(step.abs().max())

    def _adam(self, gradient: Tensor, rows: Tensor, bound: float) -> Tensor:
        if not gradient.abs().max() > GUARD * bound:
            return torch.zeros_like(gradient)
        self.moments[0, rows] = 0.9 * self.moments[0, rows] + 0.1 * gradient
        self.moments[1, rows] = 0.999 * self.moments[1, rows] + 0.001 * gradient.square()
        self.updates[rows] += 1
        count = self.updates[rows].double()[:, None]  # of this row: clients join late and miss rounds
        first = self.moments[0, rows] / (1 - 0.9**count)
        second = self.moments[1, rows] / (1 - 0.999**count)
        return self.options.lr_w * first / (second.sqrt() + 1e-30)

    def _start_from_clusters(self, uploads: Tensor, rows: Tensor) -> None:
        self.theta, logits = cluster(uploads, self.options.models, self.options.cluster_temperature, self.seed)
        self.logits[:] = mean_row(logits)  # clients that did not answer
        self.logits[rows] = logits

    def _average_a(self, arrived: dict[str, tuple[Adapter, Adapter]], names: list[str], shares: Tensor) -> None:
        layout = self._base.layout.select([Factor.A])
        uploads = torch.stack([arrived[name][1].part(layout).vector for name in names])
        self.base = self._base.with_part(Adapter(layout, shares.to(uploads.dtype) @ uploads))

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


def _mask(part: Layout, patterns: str) -> Tensor:
    """Which numbers of the merged part W learns from, ``[P]`` bool."""
    mask = torch.zeros(part.size, dtype=torch.bool)
    for pattern in (item.strip() for item in patterns.split(",")):
        names = [name for name in part.by_name if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise StrategyError(
                f"fedmerge.w-layers: {pattern!r} matches none of the tensors {', '.join(sorted(part.by_name))}"
            )
        for name in names:
            mask[part.slice_of(name)] = True
    return mask


def _jittered(start: Adapter, options: FedMergeOptions, seed: int) -> Tensor:
    """d models ``[d, P]``: the start, plus noise of scale jitter / sqrt(d_out) in B and weights that sums to zero.

    Equal models with equal logits are an exact saddle; a tiny jitter leaves it. One model gets no jitter: it is FedAvg.
    """
    generator = torch.Generator().manual_seed(seed)
    models = start.vector.expand(options.models, -1).clone()
    for entry in start.layout.entries:
        if entry.factor in (Factor.B, Factor.WEIGHT):
            noise = torch.randn(options.models, entry.size, generator=generator) / entry.shape[0] ** 0.5
            models[:, start.layout.slice_of(entry.name)] += options.jitter * (noise - noise.mean(dim=0))
    return models
