r"""FedMosaic: every client gets its own "global" adapter, an average of relevant peers' adapters.

"Not All Clients Are Equal: Collaborative Model Personalization on Heterogeneous Multi-Modal Clients" (arXiv 2506.11024;
ICLR 2026 as Co-LoRA). Three parts:

* RELA (:mod:`strategies.algorithms.fedmosaic_relevance`). Each client sends a sketch of its data's gradient on a common
  frozen reference model; the server turns similarities into weights and sends client i the sum
  :math:`G_i = \sum_j w_{ij} L_j` of its peers' adapters.
* Gates. The client keeps :math:`G_i` frozen and trains its own :math:`L_i` beside it: every module adds
  :math:`\sigma(g) \Delta_G + (1 - \sigma(g)) \Delta_L` with a learned g that never leaves the client.
* Co-LoRA (``lora-blocks`` above 0). At block ends, aligned by relative depth, adapters are
  :math:`x \to s (x A^T P + Q) B^T` with A and B aligned once and frozen, so P ``[r, r]`` and Q ``[r]`` mean the same in
  models of any width, depth and family (:mod:`fedalloy_adapters.co_lora_names`). Other layers have ordinary LoRA,
  exchanged only among clients of one architecture, and only with ``share_conventional_lora``.

Where the paper and the authors' code differ, both are options; the first is the default:

==========================  =======================================================================================
``gate``                    "scalar" per module (paper); "input", a projection of the module's input (code)
``similarity``              "cosine" of whole sketches (paper); "column-mean" of the columns' cosines (code)
``include_self``            false (code); true (the paper's figure)
``sketch_row_choice``       "random" (paper); "first" (code)
``sketch_noise_at``         "upload" only (paper); "gradients", and so in the moving average, too (code)
``sketch_gradient``         "exact" (paper); "diagonal", of the last RMS norm's Jacobian (code)
``share_conventional_lora`` true (code); false: P and Q alone (paper)
==========================  =======================================================================================

A and B of other layers are averaged separately, as in the paper: their product is not the average of the products. The
sketch is the mean gradient of ``sketch-batches`` batches at the end of a round; the code takes as many single examples,
spread over it. The reference model is frozen, so only the choice of examples differs. In vision-language models, vision
towers and projectors are not part of blocks and sketches (``target-modules = "language-model"`` keeps adapters out of
them, as in the code).

One reference model reads the data of all clients, as the authors' small image-text model does: where some clients have
images and others texts, it must read both. All clients adapt modules of the same roles (``target-modules``): weights of
peers are then the same in every module.

The code's noise on gates is left out, because nothing trains its scale. An "input" gate sees the text
before the first answer, also in training, where the code's sees the answers, too. Gates have their own learning rate
(:mod:`strategies.families.gates`): with the adapters' rate they would stay near one half. Optimisers start fresh in
every round, unless ``optimizer-state = "keep"``.

Clients with several tasks and modalities may own different parameter groups (:mod:`fedalloy_adapters.groups`), which
the paper has not. Each group of a client's global adapter is then a sum over the peers that own it, weighted by
relevance. Their sketches are gradients on the examples of all of a client's tasks, with the base model's heads. These
are drawn from the tasks' names, so the sketches of clients without a common task have little to do with each other.

Under partial participation a client is represented by its last known upload and sketch. A client without known peers
gets a copy of its own adapter as the global one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import combine_factors
from fedalloy_adapters.bank.store import Bank, Made
from fedalloy_adapters.co_lora_names import shared_layout, to_shared, with_shared
from fedalloy_adapters.groups import SEPARATOR, group_difference, groups_of, layout_of_groups
from fedalloy_adapters.layout import Factor, Layout
from fedalloy_adapters.parts import layout_of_part, layout_of_sketch
from fedalloy_adapters.wire.codec import Encoding
from strategies.algorithms.fedmosaic_relevance import cosines, entropy, relevance, similarity
from strategies.families.gates import gate_scale, require_gate_rate
from strategies.families.peer_average import PeerWeights
from strategies.framework import (
    About,
    AlloyStrategy,
    Answer,
    Brief,
    Client,
    State,
    StrategyError,
    log,
    round_record,
    steps,
)
from strategies.framework.exchange import MAX_NUMBER
from strategies.framework.options import OptionError, require_choice, require_range

LOCAL, GLOBAL, GATES, SKETCH = "local", "global", "gates", "sketch"
NEAR_UNIFORM = 0.98
"""Above this mean relative entropy of the weights, RELA is hardly more than the average of all others."""
_INFO, _WARNING = 20, 30
_SHARED = (Factor.P, Factor.Q)


@dataclass(frozen=True)
class FedMosaicOptions:
    """See the module's docstring for what the choices mean."""

    temperature: float = 0.5
    """Temperature of the softmax over peers; the default is the authors'. Version 0.1.0 had 0.2, which was better on
    validation data of ``digits`` with 4 and with 8 clients; with few clients, try that."""
    max_relevance: float = 1.0
    """Largest weight of one peer in a client's global adapter, if the client has enough peers: a liar can make its
    sketch look like anybody's. 1 is no bound, as in the paper: two similar clients may be each other's only peers."""
    similarity: str = "cosine"
    """Similarity of two sketches: ``"cosine"`` of all their numbers, or ``"column-mean"``, the mean of the cosines of
    their columns."""
    include_self: bool = False
    """Whether a client's own adapter is part of its global one."""
    gate: str = "scalar"
    """How the two adapters are mixed: ``"scalar"``, one gate for each module; ``"input"``, by the module's input."""
    gate_rate: float = 0.0
    """Learning rate of gates; 0 means 0.1 for ``"scalar"`` and ``learning-rate`` for ``"input"``."""
    shared_rate: float = 2.5
    """Multiplies the learning rate of P and Q."""
    share_conventional_lora: bool = True
    """Whether clients of one architecture also share A and B; ``false``: P and Q only."""
    sketch_batches: int = 10
    """Number of batch gradients whose mean is a round's sketch. The authors take 10 to 20, each of one example. A batch
    costs one forward pass of the reference model and a backward pass through what lies after its last layer: 10 are
    about a tenth of a round of 30 steps, and two fifths of one of 8."""
    sketch_rows: float = 0.4
    """Share of the gradient's rows that is sent."""
    sketch_row_choice: str = "random"
    """Which rows: ``"random"`` or ``"first"``."""
    sketch_noise: float = 1e-4
    """Standard deviation of the noise that is added to each number."""
    sketch_noise_at: str = "upload"
    """Where noise is added: to the ``"upload"``, or to each batch's ``"gradients"``."""
    sketch_gradient: str = "exact"
    """The ``"exact"`` gradient, or its ``"diagonal"`` approximation."""
    sketch_new_weight: float = 0.5
    """Weight of a round's gradient in the moving average."""
    sketch_encoding: str = "bf16"
    """How sketches travel: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``int4`` or ``int2``."""

    def __post_init__(self) -> None:
        require_choice("similarity", self.similarity, ("cosine", "column-mean"))
        require_choice("gate", self.gate, ("scalar", "input"))
        require_choice("sketch-row-choice", self.sketch_row_choice, ("random", "first"))
        require_choice("sketch-noise-at", self.sketch_noise_at, ("upload", "gradients"))
        require_choice("sketch-gradient", self.sketch_gradient, ("exact", "diagonal"))
        require_choice("sketch-encoding", self.sketch_encoding, list(Encoding))
        require_range("temperature", self.temperature, 1e-3)
        if not 0 < self.max_relevance <= 1:
            raise OptionError(f"max-relevance = {self.max_relevance}, expected above 0 and at most 1")
        require_gate_rate(self.gate_rate)
        require_range("shared-rate", self.shared_rate, 0)
        require_range("sketch-batches", self.sketch_batches, 1, 2**31 - 1)
        require_range("sketch-noise", self.sketch_noise, 0)
        for name in ("sketch_rows", "sketch_new_weight"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{name.replace('_', '-')} = {getattr(self, name)}, expected above 0 and at most 1")


def mosaic(
    own: Adapter, peers: Mapping[str, Adapter], shared: Mapping[str, float], alike: Mapping[str, Mapping[str, float]]
) -> Adapter:
    """One client's global adapter, in the layout of its uploads.

    Args:
        own: the client's last upload; tensors to which no peer contributes stay as they are.
        peers: last uploads by client, of any architecture.
        shared: weights of all peers, for P and Q.
        alike: for all other tensors, by parameter group: weights of the peers that have the same group over the same
            base. An adapter without groups is one group, ``""``.
    """
    result = own
    bank = Bank.of(peers)
    for group, of_peers in alike.items():
        weights = torch.tensor([list(of_peers.values())], dtype=torch.float64)
        if group:
            owners = bank.parts(layout_of_groups(own.layout, [group]))
            result = result.with_part(owners.combine(list(of_peers), weights)[0])
        else:
            (result,) = bank.combine(list(of_peers), weights)
    if shared and shared_layout(own.layout) is not None:
        parts = [to_shared(bank[name]) for name in shared]
        weights = torch.tensor([list(shared.values())], dtype=torch.float64)
        result = with_shared(result, Adapter(parts[0].layout, combine_factors(parts, weights)[0]))
    # Weights are shares, so only rounding can exceed the bound on numbers from clients.
    return Adapter(result.layout, result.vector.clamp(-MAX_NUMBER, MAX_NUMBER))


class FedMosaic(AlloyStrategy[FedMosaicOptions]):
    """A local and a global adapter per client, gated; global adapters by relevance."""

    name = "fedmosaic"
    about = About(
        'a "global" adapter of its own, averaged by relevance, frozen beside its local one and mixed by learned gates; '
        "with lora-blocks P and Q cross architectures",
        trains="A, B, head, gates (P, Q)",
        travels="P and a sketch up, P down",
        group="main",
        when="tasks differ or change over time, and the server may see a noisy sketch of gradients",
    )
    options: FedMosaicOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.uploads, self.sketches = Bank(self.storage), Bank(self.storage)
        self._known: Bank | None = None  # uploads as they were when the round began
        self.arrived = 0
        self.shared = PeerWeights([], torch.zeros(0, 0))
        self.alike: dict[str, PeerWeights] = {}

    def enrol(self, client: Client) -> None:
        """Any architecture and any parameter groups, with the same shared tensors and the same reference model."""
        if client.reference is None:
            raise StrategyError(f"client {client.id!r} has no reference model whose gradient it could sketch")
        if not self.options.share_conventional_lora and shared_layout(client.layout) is None:
            raise StrategyError(
                f"client {client.id!r} has no P and Q to share: set lora-blocks, or fedmosaic.share-conventional-lora"
            )
        if self.options.gate == "input" and any(SEPARATOR in module for module in client.layout.modules):
            raise StrategyError(
                f"client {client.id!r} has several tasks, whose modules see different tokens: fedmosaic.gate = "
                "'input', expected 'scalar'"
            )
        super().enrol(client)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """P and Q of the same names, ranks and scalings in models that may differ; without these, equal groups."""
        ours, theirs = shared_layout(first), shared_layout(second)
        if ours is None or theirs is None:
            return group_difference(first, second) is None
        return ours.digest == theirs.digest

    def difference(self, first: Layout, second: Layout) -> str:
        """The first difference in a group that both have."""
        return group_difference(first, second) or first.describe_difference(second)

    def conflict(self, first: Client, second: Client) -> str | None:
        """How their reference models or layouts differ, if they do."""
        if first.reference is None or second.reference is None:
            return "no reference model, expected one"
        if first.reference.digest != second.reference.digest:
            return f"as reference {first.reference.describe_difference(second.reference)}"
        return super().conflict(first, second)

    def brief(self, round_: int, client: Client) -> Brief:
        """Install the global adapter, evaluate, train the local one and the gates, sketch, send the local one."""
        mix = steps.gated(GLOBAL, LOCAL, GATES)
        rates = gate_scale(self.training, self.options.gate, self.options.gate_rate)
        rates |= dict.fromkeys(_SHARED, self.options.shared_rate)
        plan = [
            *self._slots(),
            steps.copy(GLOBAL, LOCAL),  # tensors without a contributing peer
            steps.evaluate(self.training, mix),
            steps.train(self.training, mix, [LOCAL, GATES], without_basis=True, rate_scales=rates),
            self._sketch(client),
            self._send(),
        ]
        if client.id not in self.shared:
            return Brief(plan)
        known = self._known = self._known or self.uploads.snapshot()
        shared, alike, name = self.shared, self.alike, client.id  # of this round; rows are read when it is sent
        return Brief(plan, Made({GLOBAL: lambda: mosaic(known[name], known, shared.used(name), _peers(alike, name))}))

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep the local adapter and the sketch until the next ones come."""
        self.uploads[client.id], self.sketches[client.id] = answer.adapters[LOCAL], answer.adapters[SKETCH]
        self.arrived += 1

    def settle(self, round_: int) -> dict[str, Any]:
        """Compute the relevance of clients with known sketches; the record gets its entropy and a small matrix."""
        record: dict[str, Any] = {round_record.MERGED: self.arrived}
        self.arrived, self._known = 0, None
        names = list(self.sketches)
        if len(names) < 2:
            return record
        weights = self._weigh(names)
        relative = entropy(weights).tolist()
        mean = sum(relative) / len(relative)
        rows = self.shared.recorded(4)
        record |= {round_record.RELEVANCE: rows} if rows else {}
        if math.isfinite(mean):
            record[round_record.ENTROPY] = round(mean, 4)
        for name, row in rows.items():
            log(_INFO, "relevance for %s: %s", name, " ".join(f"{w:.2f}" for w in row))
        if mean > NEAR_UNIFORM:
            record[round_record.WARNING] = (
                f"relevance is near uniform (relative entropy {mean:.3f}): clients get nearly the average of all "
                "others; lower fedmosaic.temperature or fedmosaic.sketch-noise"
            )
            log(_WARNING, "%s", record[round_record.WARNING])
        elif math.isfinite(mean):
            log(_INFO, "relative entropy of the relevance: %.3f", mean)
        return record

    def deliver(self, client: Client) -> Brief:
        """The gated mixture as the client has trained it. The last round's uploads are not used, as in the paper."""
        mix = steps.gated(GLOBAL, LOCAL, GATES)
        start = [*self._slots(), steps.initialise(GLOBAL, self.seed)]
        return Brief([*start, steps.save(mix), steps.evaluate(self.training, mix)])

    def state(self) -> State:
        """Last known uploads and sketches."""
        state = State({}, {"clients": list(self.uploads)})
        state.keep("upload", self.uploads)
        state.keep("sketch", self.sketches)
        return state

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before, and what is known of others is dropped."""
        for name in state.values["clients"]:
            if name in self.clients:
                client = self.clients[name]
                upload = layout_of_part(client.layout, self._send().send.part)
                self.uploads.put_row(name, upload, state.row(f"upload/{name}"))
                self.sketches.put_row(name, self._sketch_layout(client), state.row(f"sketch/{name}"))
        self._known = None
        names = list(self.sketches)
        if len(names) > 1:
            self._weigh(names)

    def _weigh(self, names: list[str]) -> Tensor:
        """Weights over all peers, which are returned, and for each parameter group over the peers that have it."""
        self.shared, self.alike = PeerWeights([], torch.empty(0, 0)), {}  # frees N x N numbers
        if self.options.similarity == "cosine":
            found = cosines(self.sketches.rows(names))
        else:
            shape = self.sketches.layout_of(names[0]).entries[0].shape
            sketches = torch.stack([self.sketches[name].vector.view(shape) for name in names])
            found = similarity(sketches, self.options.similarity)

        weights = self._relevance(names, found, torch.ones(len(names), len(names), dtype=torch.bool))
        self.shared = PeerWeights(names, weights)
        owned = [_groups(self.uploads.layout_of(name)) for name in names]
        for group in dict.fromkeys(group for groups in owned for group in groups):
            owners = [number for number, groups in enumerate(owned) if group in groups]
            if len(owners) < 2:
                continue
            digests = [owned[number][group] for number in owners]
            if len(owners) == len(names) and len(set(digests)) == 1:
                self.alike[group] = self.shared  # everybody has it
                continue
            same = torch.tensor([[one == other for other in digests] for one in digests])
            who = [names[number] for number in owners]
            self.alike[group] = PeerWeights(who, self._relevance(who, found[owners][:, owners], same))
        return weights

    def _relevance(self, names: list[str], similarities: Tensor, peers: Tensor) -> Tensor:
        """Rows of weights of clients ``names`` over those of them that ``peers`` allows, all ``[n, n]``."""
        chosen = self.options
        return relevance(
            similarities, chosen.temperature, peers, include_self=chosen.include_self, most=chosen.max_relevance
        )

    def _slots(self) -> list[steps.Step]:
        return [steps.initialise(LOCAL, self.seed), steps.initialise_gates(GATES, self.options.gate)]

    def _send(self) -> steps.Step:
        factors = () if self.options.share_conventional_lora else _SHARED
        return steps.send(self.training, LOCAL, factors=factors, relative_to_received=False, without_basis=True)

    def _sketch(self, client: Client) -> steps.Step:
        return steps.sketch(
            self.training,
            SKETCH,
            batches=self.options.sketch_batches,
            rows=self._sketch_layout(client).entries[0].shape[0],
            row_choice=self.options.sketch_row_choice,
            gradient=self.options.sketch_gradient,
            noise=self.options.sketch_noise,
            noise_on_gradients=self.options.sketch_noise_at == "gradients",
            new_weight=self.options.sketch_new_weight,
            encoding=self.options.sketch_encoding,
        )

    def _sketch_layout(self, client: Client) -> Layout:
        assert client.reference is not None
        rows = client.reference.entries[0].shape[0]
        return layout_of_sketch(client.reference, max(1, int(self.options.sketch_rows * rows)))


def _groups(layout: Layout) -> dict[str, bytes]:
    """The digest of each parameter group of a layout; two clients with equal ones can average the group."""
    groups = groups_of(layout)
    if groups == ("",):
        return {"": layout.digest}
    return {group: layout_of_groups(layout, [group]).digest for group in groups}


def _peers(alike: Mapping[str, PeerWeights], name: str) -> dict[str, dict[str, float]]:
    """A client's weights over the peers that have a parameter group of its own, by group."""
    found = {group: weights.used(name) for group, weights in alike.items()}
    return {group: peers for group, peers in found.items() if peers}
