"""Bounds on what one client can do to everybody's model: how far an upload may move, how much a client may weigh.

A bounded norm is the usual first defence against boosted updates (Sun et al., "Can You Really Backdoor Federated
Learning?", 2019, section 4); the bound on counts keeps a client that lies about its data from outweighing everybody
else. By default both are relative to the median of the round or of the federation, and so wide that honest clients
rarely reach them; an absolute bound on norms is off, because it depends on the model. The bound on an adapter's size is
always on: the server allocates the adapter at registration, trusting the client's claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from statistics import median

from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Made, largest_of
from strategies.framework.dispatch import Dispatch
from strategies.framework.exchange import MAX_NUMBER, Answer, BadAnswerError, Client, State
from strategies.framework.options import OptionError, require_choice, require_range

MIN_FOR_MEDIAN = 3
"""With fewer numbers, a single liar can move the median as it likes."""


@dataclass(frozen=True)
class Limits:
    """Bounds against clients that lie."""

    max_update_norm: float = 0.0
    """Largest L2 norm of an update: all numbers of an uploaded slot, minus what the client was sent for that slot (if
    it was sent anything). 0: no bound."""
    update_norm_action: str = "clip"
    """What happens to a longer update: ``clip`` scales the difference down to the bound, ``reject`` refuses the answer.
    """
    max_update_ratio: float = 1.5
    """An update is scaled down to at most this many times the median of the round's updates of its slot, compared by
    root mean square, if at least three clients sent that slot; 0: no bound."""
    max_examples_ratio: float = 1.5
    """A client counts for at most this many times the median number of training examples; 0: no bound."""
    max_adapter_mb: float = 1024.0
    """Largest size of an adapter, and of a reference model's gradient, in megabytes (10^6 bytes, float32). A client
    with a larger one is refused at registration, because the server holds several of them for each client."""

    def __post_init__(self) -> None:
        require_range("max-update-norm", self.max_update_norm, 0)
        require_range("max-update-ratio", self.max_update_ratio, 0)
        if 0 < self.max_update_ratio < 1:
            raise OptionError(f"max-update-ratio = {self.max_update_ratio}, expected 0 or at least 1")
        require_choice("update-norm-action", self.update_norm_action, ("clip", "reject"))
        require_range("max-examples-ratio", self.max_examples_ratio, 0)
        require_range("max-adapter-mb", self.max_adapter_mb, 0.001)


@dataclass(frozen=True)
class Bounded:
    """Uploads within the bound; ``clipped`` has the original norm of each clipped one, by slot."""

    adapters: Mapping[str, Adapter]
    clipped: Mapping[str, float] = field(default_factory=dict)


def bounded(limits: Limits, dispatch: Dispatch, adapters: Mapping[str, Adapter]) -> Bounded:
    """Apply ``max-update-norm`` to checked uploads; sketches are directions and stay as they are.

    Raises:
        BadAnswerError: an update is longer, and the action is to reject.
    """
    kept, clipped = dict(adapters), {}
    for slot, adapter in adapters.items():
        if not limits.max_update_norm or slot in dispatch.sketches:
            continue
        update = _update(adapter, dispatch.received.get(slot))
        norm = float(update.norm())
        if norm <= limits.max_update_norm:
            continue
        if limits.update_norm_action == "reject":
            raise BadAnswerError(
                f"client {dispatch.plan.client_id!r} sent slot {slot!r} with an update of norm {norm:.6g}, expected at "
                f"most {limits.max_update_norm:g} (max-update-norm)"
            )
        kept[slot] = _shortened(adapter, update, limits.max_update_norm / norm)
        clipped[slot] = norm
    return Bounded(kept, clipped)


def within_round(limits: Limits, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Apply ``max-update-ratio`` to a round's answers, by client; sketches are directions and stay as they are.

    A client that lies moves the median by one place at most. Updates are compared by root mean square, because
    clients' ranks and groups may differ.
    """
    found = dict(answers)
    if not limits.max_update_ratio:
        return found
    lengths: dict[str, dict[str, float]] = {}
    for name, answer in answers.items():
        sketches = {result.sketch.slot for result in answer.report.results if result.HasField("sketch")}
        for slot, adapter in answer.adapters.items():
            if slot not in sketches and adapter.layout.size:
                length = float(_update(adapter, answer.received.get(slot)).norm()) / math.sqrt(adapter.layout.size)
                lengths.setdefault(slot, {})[name] = length
    for slot, by_client in lengths.items():
        most = limits.max_update_ratio * median(sorted(by_client.values()))
        if len(by_client) < MIN_FOR_MEDIAN or not most:
            continue
        for name, length in by_client.items():
            if length > most:
                answer = found[name]
                norm = float(_update(answer.adapters[slot], answer.received.get(slot)).norm())
                shorter = _with_shorter(answer, slot, most / length)
                found[name] = replace(answer, adapters=shorter, clipped={**answer.clipped, slot: norm})
    return found


def _with_shorter(answer: Answer, slot: str, share: float) -> Mapping[str, Adapter]:
    """The answer's uploads, one of them with only a share of its update; made when they are looked at."""

    def shorter() -> Adapter:
        adapter = answer.adapters[slot]
        return _shortened(adapter, _update(adapter, answer.received.get(slot)), share)

    return Made({name: partial(answer.adapters.__getitem__, name) for name in answer.adapters} | {slot: shorter})


def _update(adapter: Adapter, received: Adapter | None) -> Tensor:
    """How far an upload is from what the client was sent, or from zero."""
    update = adapter.vector.double()
    if received is not None and received.layout.contains(adapter.layout):
        update = update - received.part(adapter.layout).vector.double()
    return update


def _shortened(adapter: Adapter, update: Tensor, share: float) -> Adapter:
    """The upload with only a share of its update."""
    return Adapter(adapter.layout, (adapter.vector.double() - update * (1 - share)).to(adapter.vector.dtype))


def unsound(state: State) -> str | None:
    """The first tensor that the server would refuse in an upload, in words: it must neither be kept nor sent."""
    tensors = ((name, largest_of(tensor)) for name, tensor in state.tensors.items() if tensor.is_floating_point())
    for name, largest in chain(tensors, ((name, row.largest) for name, row in state.rows.items())):
        if not largest <= MAX_NUMBER:  # or it is NaN
            return f"{name} has numbers up to {largest:.3g}, expected at most {MAX_NUMBER:g}"
    return None


def require_affordable(limits: Limits, client: Client) -> None:
    """Apply ``max-adapter-mb`` to what a client registered, before anything of that size is allocated.

    Raises:
        BadAnswerError: its adapter, or a gradient of its reference model, is larger.
    """
    layouts = {"an adapter": client.layout, "a reference gradient": client.reference}
    for name, layout in layouts.items():
        size = 4 * layout.size / 10**6 if layout is not None else 0.0
        if size > limits.max_adapter_mb:
            raise BadAnswerError(
                f"client {client.id!r} registered {name} of {size:.6g} MB, expected at most {limits.max_adapter_mb:g} "
                "(max-adapter-mb)"
            )


def with_bounded_weight(limits: Limits, client: Client, counts: Mapping[str, int]) -> Client:
    """The client, with the number of examples that it counts for.

    Args:
        limits: the bounds.
        client: as registered.
        counts: training examples of the federation's clients by id, as registered.
    """
    if not limits.max_examples_ratio or not counts:
        return client
    most = max(1, math.floor(limits.max_examples_ratio * median(sorted(counts.values()))))
    return replace(client, examples=min(client.examples, most))
