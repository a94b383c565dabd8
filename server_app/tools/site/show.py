"""``fedalloy site show``: explains what a run would ask of a site, and what the site's file allows.

The strategy is rehearsed on this machine (:mod:`server_app.run.clients.rehearsal`). Requests that depend on answers do
not appear; the site's file decides about them when they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedalloy_adapters.words import one_line
from server_app.run.clients.rehearsal import rehearsed
from server_app.run.options import known_keys, problems
from server_app.tools.errors import ToolError
from strategies import AlloyStrategy, strategy_from_run_config

if TYPE_CHECKING:
    from client_app.settings import Settings
    from client_app.site.site_file import Site
    from proto.fedalloy.v1 import plan_pb2, report_pb2

_WORDS = {
    "initialise": "makes adapters from a seed, or copies of them",
    "train": "trains adapters on your examples",
    "merge": "adds adapters up on your machine",
    "evaluate": "measures a model on your examples and reports the scores",
    "save": "keeps a model on your machine",
    "send": "uploads an adapter",
    "fisher": "reports sums of squared gradients of single examples",
    "distance": "reports how far two adapters are from each other",
    "sketch": "uploads a gradient on your examples, with noise if the strategy asks for it",
    "select": "reports the loss of several adapters on your examples, and takes the better ones",
    "search": "reports losses of sums of adapters on your examples, and takes the best sum",
    "gram": "uploads second moments of the model's inputs on your examples",
    "attribute": "divides your examples among adapters by their losses",
    "density": "divides your examples by losses and by what the base model sees in them; reports moments of the latter",
    "likeness": "keeps how some of your examples look to the model",
    "replace": "copies parts of adapters, depending on losses on your examples",
    "distill": "trains an adapter on your examples and on another adapter's answers to them",
}


class ShowError(ToolError):
    """The run cannot be simulated: its run-config is wrong, or the site's file refuses it outright."""


def words_of(site: Site, run_config: Mapping[str, Any]) -> Iterator[str]:
    """The explanation for the owner, line by line.

    Args:
        site: the owner's file.
        run_config: keys that differ from the defaults.

    Raises:
        ShowError: see the class.
    """
    from client_app.session import Executor
    from client_app.site.gate import settings_of
    from proto.fedalloy.v1 import report_pb2

    config = known_keys() | dict(run_config)
    if wrong := problems(config):
        raise ShowError("; ".join(wrong))
    try:
        settings = settings_of(site, config)
        registration = Executor(report_pb2.TRAINER_MODE_INSTALLED).describe(settings)
    except ValueError as error:
        raise ShowError(one_line(error, 400)) from None
    yield from _about(site, registration)
    strategy = strategy_from_run_config(config)
    plans = list(_plans(strategy, registration, str(config["run-name"]) or "run"))
    rounds = config["num-server-rounds"]
    yield f"A run with {config['strategy']!r} ({rounds} rounds and the delivery) would ask for this:"
    untold = {"evaluate": "measures a model on your examples; no score leaves"}
    private = settings.privacy.epsilon and settings.privacy.metrics == "none"
    yield from _asked(plans, registration, _WORDS | (untold if private else {}), strategy.asks_later)
    yield from _answered(settings, plans, registration, strategy.asks_later)


def _about(site: Site, registration: report_pb2.Registration) -> Iterator[str]:
    who = ", ".join(site.servers.values()) or "anybody who can open its socket: no signature is required"
    yield f"Client {site.client_id!r} serves runs named {', '.join(site.runs)}, for {who}."
    for task in registration.tasks:
        counts = ", ".join(f"{count} {split}" for split, count in sorted(task.examples.items()))
        yield f"It would report that it has {task.kind} with {counts} examples, and {len(task.notes)} notes on them:"
        yield from (f"  {one_line(note)}" for note in task.notes)


def _plans(
    strategy: AlloyStrategy[Any], registration: report_pb2.Registration, run_name: str
) -> Iterator[plan_pb2.Plan]:
    """The plans that this client would get."""
    from fedalloy_adapters.layout import Layout
    from strategies.framework.answers import client_from

    me = client_from(registration, Layout.from_proto(registration.layout), 1)
    for round_, client, brief in rehearsed(strategy, me):
        yield strategy.dispatch(round_, client, brief, run_name, b"").plan


def _asked(
    plans: list[plan_pb2.Plan],
    registration: report_pb2.Registration,
    about: Mapping[str, str],
    later: Iterable[str],
) -> Iterator[str]:
    from client_app.guard.policy import tally_of
    from fedalloy_adapters.layout import Layout
    from fedalloy_adapters.parts import layout_of_gram, layout_of_part, layout_of_sketch
    from fedalloy_adapters.wire.codec import encoding_from_proto, payload_size

    layout = Layout.from_proto(registration.layout)
    counts = Counter(step.WhichOneof("kind") or "?" for plan in plans for step in plan.steps)
    for kind, count in counts.most_common():
        yield f"  {kind}, {count} times: it {about.get(kind, 'does something that this version does not know')}"
    for kind in later:
        yield f"  {kind}, once others have answered: it {about[kind]}"
    sizes = Counter[str]()
    for plan in plans:
        for step in plan.steps:
            kind = step.WhichOneof("kind")
            body = getattr(step, kind) if kind in ("send", "sketch", "gram") else None
            if body is None:
                continue
            if kind == "send":
                sent = layout_of_part(layout, body.part)
            elif kind == "gram":
                sent = layout_of_gram(layout)
            else:
                sent = layout_of_sketch(Layout.from_proto(registration.reference), body.row_count)
            encoding = encoding_from_proto(body.encoding)
            sizes[f"{body.slot!r} as {encoding}"] += payload_size(sent, encoding)
    taken = Counter[str]()
    for plan in plans:
        taken.update(tally_of(plan))
    yield f"In all: {taken['steps']} training steps, {taken['evaluations']} measurements, and uploads of"
    yield from (f"  {size / 10**6:.3f} MB of {what}" for what, size in sizes.items())
    if not sizes:
        yield "  nothing"


def _answered(
    settings: Settings, plans: list[plan_pb2.Plan], registration: report_pb2.Registration, later: Iterable[str]
) -> Iterator[str]:
    """The answer of the site's file, with each refusal once."""
    from client_app.guard.policy import PolicyError, tally_of
    from client_app.guard.privacy import require_private_steps, spending_of
    from client_app.session import budget_of

    examples: Counter[str] = Counter()
    for task in registration.tasks:
        examples.update({split: int(count) for split, count in task.examples.items()})

    def size_of(split: str) -> int:
        return sum(examples[part] for part in split.split("+"))

    said: dict[str, None] = {}
    hidden: frozenset[str] = frozenset()
    taken: Counter[str] = Counter()
    for plan in [*plans, _plan_of(later, settings.client_id)]:
        try:
            settings.policy.require_plan(plan, {})
            if settings.privacy.epsilon:
                require_private_steps(plan)
            if plan.round:
                settings.policy.require_examples(plan, size_of)
                hidden = settings.policy.require_private(plan, hidden)
        except PolicyError as error:
            said[str(error)] = None
        taken.update(tally_of(plan))
    for what, count in taken.items():
        most = getattr(settings.policy, f"max_run_{what}")
        if most and count > most:
            said[f"the run would take {count} {what}, and client.max-run-{what} is {most}"] = None
    budget = budget_of(settings)
    if budget is not None:
        more = [spent for plan in plans for spent in spending_of(plan, settings.privacy, size_of)]
        yield f"Of the privacy budget, epsilon {budget.spent:.3f} is spent, and {budget.after(more):.3f} would be."
        if not budget.after(more) <= settings.privacy.epsilon:
            said[f"the run would spend more than dp.epsilon, which is {settings.privacy.epsilon:g}"] = None
    if said:
        yield "The site's file refuses this:"
        yield from (f"  {one_line(words, 400)}" for words in said)
    else:
        yield "The site's file allows all of it."


def _plan_of(kinds: Iterable[str], client_id: str) -> plan_pb2.Plan:
    """A plan of such steps, which says nothing of their examples."""
    from proto.fedalloy.v1 import plan_pb2

    found = plan_pb2.Plan(client_id=client_id)
    for kind in kinds:
        getattr(found.steps.add(), kind).SetInParent()
    return found
