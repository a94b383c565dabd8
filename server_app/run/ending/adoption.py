"""Models for clients that never trained, without training: the best sum of what the run has, by forward passes alone.

A newcomer is sent *sources* once: the run's global models, and adapters of clients whose owners lend them
(``client.lend-adapter``). It looks for the coefficients itself, on a few examples of its own
(:mod:`client_app.plan.search`), in one message with the saving and the scores. No other way sends less: if the server
searched by losses, it would have to send the same sources, and one more message for each generation of coefficients; if
it sent merges, one adapter for each trial. And the losses of tried sums stay at the client, except those of each source
alone and of the best sum.

Lenders' adapters are the models that they were delivered. The server makes them itself if it has all their parts; else
it asks the lenders that are online, once, and keeps what they sent in the run's folder ``lent``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flwr.common.logger import log

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import stack
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.wire.codec import CodecError, decode
from proto.fedalloy.v1 import plan_pb2
from server_app.run.asking import Asking
from server_app.run.clients.client_status import ClientRecord
from server_app.run.clients.held_out import PERSONAL
from strategies.framework import steps
from strategies.framework.exchange import Answer, Brief, Client

if TYPE_CHECKING:
    from server_app.run.loop import Run

INFO, WARNING = 20, 30
LENT, SOURCE, ADOPTED = "lent", "source", "adopted"
"""Slots at the clients: a lender's adapter, a newcomer's sources (with a number), and the sum that it chose."""
PENALTY, BOUND = 0.05, 1.5
"""LoraHub's: the penalty on the coefficients' absolute values, and the bound on each of these."""
_OF_SERVER = {"initialise", "save", "evaluate"}
"""Steps of a delivery that make nothing of data or adapters that only the client has."""


def adopt(run: Run, round_: int, newcomers: Sequence[Client]) -> tuple[dict[str, Answer], dict[str, ClientRecord]]:
    """Answers and records of the newcomers for which there are sources; the others are not asked.

    Args:
        run: the run whose state gives the sources.
        round_: the number of the plans.
        newcomers: clients that are enrolled and online.
    """
    lent = _lent(run, round_, newcomers) if newcomers else {}
    briefs: dict[Client, Brief] = {}
    names: dict[str, list[str]] = {}
    for client in newcomers:
        found = sources_of(run, client, lent)
        if not found:
            log(WARNING, "%s cannot adopt anything: no global model fits it, and nobody lends an adapter", client.id)
            continue
        names[client.id] = list(found)
        briefs[client] = _brief(run, client, list(found.values()))
    if not briefs:
        return {}, {}
    answers: dict[str, Answer] = {}
    asking = Asking(run, "adopt", round_, briefs, 0)
    records = asking.carry_out(lambda _, client, answer: answers.update({client.id: answer}))
    for name, record in records.items():
        record["state"] = round_ - 1
        if name in answers:
            record["adopted"] = _told(names[name], answers[name])
            log(INFO, "%s adopted: %s", name, words_of(record["adopted"]))
    return answers, records


def sources_of(run: Run, client: Client, lent: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """At most ``adopt-sources`` different adapters that fit the client, by a readable name: models first."""
    models = {f"model {name}": adapter for name, adapter in _models(run, client).items()}

    def draw(name: str) -> bytes:
        return hashlib.sha256(f"{run.options.seed} {client.id} {name}".encode()).digest()

    found: dict[str, Adapter] = {}
    seen: set[bytes] = set()
    for name, adapter in {**models, **{f"client {who}": lent[who] for who in sorted(lent, key=draw)}}.items():
        fitting = _fitted(client, adapter)
        if fitting is None or fitting.digest in seen or len(found) >= run.options.adopt_sources:
            continue
        seen.add(fitting.digest)
        found[name] = fitting
    return found


def words_of(adopted: Mapping[str, Any]) -> str:
    """A newcomer's model, in one line."""
    parts = [f"{number:.3g} x {name}" for name, number in adopted["coefficients"].items() if number]
    return (
        f"{' + '.join(parts) or 'the base model alone'}; loss {adopted['loss']:.4g} on {adopted['examples']} examples, "
        f"{adopted['base_loss']:.4g} of the base model ({adopted['evaluations']} sums tried)"
    )


def _brief(run: Run, client: Client, sources: Sequence[Adapter]) -> Brief:
    """The brief: look for the best sum, save it, evaluate it."""
    options, mix = run.options, steps.mixture(ADOPTED)
    slots = {f"{SOURCE}-{index}": adapter for index, adapter in enumerate(sources)}
    parts = [slot for slot, adapter in slots.items() if _is_part(client.layout, adapter.layout)]
    found = steps.search(
        ADOPTED,
        list(slots),
        split="train",
        samples=options.adopt_examples,
        evaluations=max(options.adopt_evaluations, len(slots) + 1),
        penalty=PENALTY,
        bound=BOUND,
    )
    starts = [steps.initialise(slot, run.strategy.seed, keep_existing=False) for slot in parts]
    training = run.strategy.training_of(client)
    return Brief([*starts, found, steps.save(mix), steps.evaluate(training, mix)], slots)


def _told(names: Sequence[str], answer: Answer) -> dict[str, Any]:
    (found,) = [result.search for result in answer.report.results if result.HasField("search")]
    return {
        "coefficients": {name: round(c, 6) for name, c in zip(names, found.coefficients, strict=True)},
        "source_losses": {name: round(loss, 6) for name, loss in zip(names, found.slot_losses, strict=True)},
        "loss": round(found.loss, 6),
        "base_loss": round(found.base_loss, 6),
        "examples": int(found.examples),
        "evaluations": int(found.evaluations),
    }


def _models(run: Run, client: Client) -> Mapping[str, Adapter]:
    """The strategy's global models; else its delivery, as one adapter if it is one, or as the adapters sent for it."""
    found = run.strategy.global_models(client)
    if found:
        return found
    brief = run.strategy.deliver(client)
    whole = _made_by_server(brief)
    return {"delivered": whole} if whole is not None else brief.adapters


def _fitted(client: Client, adapter: Adapter) -> Adapter | None:
    """The adapter if it fits: with any rank, as a part that the seed completes, or cut to the client's groups."""
    own, found = client.layout, adapter.layout
    if _is_part(own, found) or own.difference(found, any_rank=True) is None:
        return adapter
    return adapter.part(own) if found.contains(own) else None


def _is_part(whole: Layout, found: Layout) -> bool:
    return found.digest != whole.digest and whole.contains(found)


# ------------------------------------------------------------------------------------------------------------- lenders


def _lent(run: Run, round_: int, newcomers: Sequence[Client]) -> dict[str, Adapter]:
    """The adapters of clients whose owners lend them to clients like these, by client."""
    folder = run.directory.path / LENT / f"state-{round_ - 1:04d}"
    wanted, who = {client.layout.digest for client in newcomers}, {client.id for client in newcomers}
    found: dict[str, Adapter] = {}
    asked: dict[Client, Brief] = {}
    for client in [client for client in run.participants if client.id not in who]:
        kept = folder / f"{client.id}.adapter"
        if not run.enrolment.lends(client):
            kept.unlink(missing_ok=True)  # its owner may have lent it earlier
            continue
        if client.layout.digest not in wanted:
            continue
        brief = run.strategy.deliver(client)
        adapter = _made_by_server(brief) or _kept(kept.read_bytes() if kept.exists() else b"")
        if adapter is not None:
            found[client.id] = adapter
        elif client.node_id and run.federation.is_online(client.id):
            lending = _lending(run, client, brief)
            asked |= {client: lending} if lending is not None else {}
    if asked:
        asking = Asking(run, "lend", round_, asked, 0)
        asking.carry_out(lambda _, client, answer: found.update({client.id: answer.adapters[LENT]}))
        run.directory.save_adapters(folder, {c.id: found[c.id] for c in asked if c.id in found})
    return found


def _kept(blob: bytes) -> Adapter | None:
    """The lender's adapter that the server has kept; None if there is no whole one."""
    try:
        return decode(blob) if blob else None
    except CodecError:
        return None


def _lending(run: Run, client: Client, brief: Brief) -> Brief | None:
    """A brief to fold the client's delivery into one adapter of its own layout and send it; None if impossible."""
    mix, ranks = _delivered(brief.steps), set(client.layout.ranks.values())
    if mix is None or len(ranks) != 1 or client.layout.with_ranks(client.layout.ranks).digest != client.layout.digest:
        return None
    before = [step for step in brief.steps if step.WhichOneof("kind") not in ("save", "evaluate", "send")]
    merged = steps.merge(LENT, mix, truncate_rank=ranks.pop())
    sent = steps.send(run.strategy.training, LENT, relative_to_received=False, for_newcomers=True)
    return Brief([*before, merged, sent], brief.adapters)


def _made_by_server(brief: Brief) -> Adapter | None:
    """The delivered model as one adapter, if all of it is sent and nothing in it comes from the client alone."""
    mix = _delivered(brief.steps)
    if mix is None or any(step.WhichOneof("kind") not in _OF_SERVER for step in brief.steps):
        return None
    if any(term.slot not in brief.adapters or term.WhichOneof("coefficient") != "scalar" for term in mix.terms):
        return None
    parts = [brief.adapters[term.slot] for term in mix.terms]
    numbers = [term.scalar for term in mix.terms]
    if len(parts) == 1 and numbers == [1.0]:
        return parts[0]
    try:
        return stack(parts, numbers)
    except LayoutError:  # parts of adapters, or different ones
        return None


def _delivered(plan: Iterable[plan_pb2.Step]) -> plan_pb2.Mixture | None:
    """The mixture that is the client's own model, if it is a sum with fixed coefficients."""
    for step in plan:
        if step.HasField("evaluate") and step.evaluate.label == PERSONAL:
            mix = step.evaluate.mixture
            fixed = all(term.WhichOneof("coefficient") in ("scalar", "per_module") for term in mix.terms)
            return mix if fixed and not mix.shares else None
    return None
