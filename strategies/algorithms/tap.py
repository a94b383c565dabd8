r"""TAP: a personal adapter that takes over better parts of the federated one, and learns from it at the end.

Lee, Fang, Han, Hosseinalipour and Brinton, "TAP: Two-Stage Adaptive Personalization of Multi-task and Multi-Modal
Foundation Models in Federated Learning", 2025 (arXiv 2509.26524). A client has several tasks; its adapter is made of
parameter groups (:mod:`fedalloy_adapters.groups`), and task o uses the groups R(o). Only the federated adapter
W is ever sent.

* *Stage 1*, every round: W is trained and sent. For each task o with ``h_W[o] + m[o] < h_X[o]`` (recorded training
  losses h and a margin m), the groups R(o) of W are copied into the client's personal adapter X. Then X is trained as
  long as W was, on the same batches, or on others if something was copied. X never influences W or the server.
* *Stage 2*, once, for every client: W, trained on for J steps (:math:`V`), teaches X, trained for J steps with
  :math:`\sum_o (n_o / n) \ell_o + \lambda_o KL_o(V \| X)`.

Defaults are those of our reading of the paper; the authors' code differs, and these settings follow it:
``tap.history-norm = "batch-share"`` (a task's loss times its share of the client's data), ``tap.seed-mode =
"reference"``, ``tap.kd-reduction = "first-dim"`` with ``tap.kd-weights = "text-classification=1,
image-classification=0.002,causal-lm=0.002,image-text-to-text=0.002"``, ``tap.warm-up-rounds = 20``, and, for
optimisation itself, ``weight-decay = 0.01`` and ``max-grad-norm = 1``. Here a pass goes over all examples in turn; in
the authors' code K of them are drawn for each call. J counts optimiser steps; the authors' 50 are micro-batches, and
four of these are accumulated: ``tap.distill-steps = 13``. docs/paper-settings.md has all of it as run-config.

The rule compares training losses. In the paper few of many clients take part in a round and their data are similar, so
X is old when it is compared. If every client takes part in every round and has few examples, X memorises them, and its
training loss is always the lower one. For this case ``history = "probe"`` compares both on examples that neither has
seen. The authors' image generation tasks are not covered: no kind of task here makes images.

Baselines are settings of the same code: FedAvg is ``tap.margin = inf, tap.margins = "", tap.deliver = "global"``;
FedAvg and J steps of fine-tuning ``tap.deliver = "finetuned"`` (``tap.finetune-steps = 100``: twice as many); local
training an infinite margin with ``tap.deliver = "stage1"``; TAP without distillation ``tap.kd-weight = 0``; a margin of
``-inf`` always replaces. Every delivery evaluates all four models.

If a client's labels are its own, so are the heads of W and X, which never leave it. If all of W replaces X, its head
does, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fedalloy_adapters.groups import groups_of
from fedalloy_adapters.layout import Layout
from proto.fedalloy.v1 import report_pb2
from strategies.algorithms.tap_options import DELIVERED, DISTILLED, FINETUNED, PERSONAL, RECEIVED, pairs, table
from strategies.algorithms.tap_options import TapOptions as TapOptions
from strategies.families.fedavg import SLOT as GLOBAL
from strategies.families.fedavg import Averaging
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
from strategies.framework.options import NoOptions

T = TypeVar("T")
_BATCHES = 1
"""The step whose batches W and X are trained on: FedAvg's, so that W is FedAvg's to the bit."""
_OTHER_BATCHES = 1_000_001
_TABLES = ("margins", "kd_weights", "kd_losses")
_WARNING = 30


class _Federated(Averaging[NoOptions]):
    """W at the server: FedAvg over the owners of each group."""

    by_task = False

    def weight_of(self, group: str, client: str, examples: int) -> int:
        """Example count of the client, or of its tasks that use the group."""
        if not self.by_task:
            return examples
        return sum(int(task.examples["train"]) for task in _tasks(self.clients[client]) if group in _groups(task))


class Tap(AlloyStrategy[TapOptions]):
    """A federated adapter for all, a personal one that never leaves its client."""

    name = "tap"
    about = About(
        "an adapter of its own that takes over groups of the federated one by a margin rule, then learns from it; "
        "clients may have several tasks and modalities",
        trains="A, B, heads",
        travels="P up, P down; P down once more at the end",
        group="main",
        when="clients have several tasks or modalities; twice FedAvg's steps",
    )
    options: TapOptions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.federated = _Federated(NoOptions(), self.training, self.seed)
        self.federated.by_task = self.options.weight == "task"
        self.replacements: dict[str, dict[str, Any]] = {}
        self.totals: dict[str, int] = {}

    @property
    def learns_from(self) -> tuple[str, ...]:
        """Validation examples, if a probe decides about replacements."""
        return ("train", "validation") if self.options.history == "probe" else ("train",)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """As for FedAvg: groups that both have are equal."""
        return self.federated.compatible(first, second)

    def difference(self, first: Layout, second: Layout) -> str:
        """As for FedAvg."""
        return self.federated.difference(first, second)

    def enrol(self, client: Client) -> None:
        """Both adapters start from the seed. The groups that the client's tasks declare must be those of its adapter.

        Raises:
            StrategyError: they are not, or the client has no validation examples to probe on.
        """
        before = dict(self.clients)
        super().enrol(client)
        problem = self._problem(client)
        if problem:
            self.clients = before
            raise StrategyError(f"client {client.id!r} {problem}")
        self.federated.enrol(client)

    def brief(self, round_: int, client: Client) -> Brief:
        """Train W and send it; replace groups of X as the rule says; train X."""
        probes = self.options.history == "probe"
        plan = [
            steps.initialise(PERSONAL, self.seed),
            steps.evaluate(self.training, steps.mixture(PERSONAL)),
        ]
        source = GLOBAL
        if self.options.replace_source == "global":
            plan.append(steps.copy(RECEIVED, GLOBAL))
            source = RECEIVED
        plan += [
            self._train(round_, GLOBAL, record="" if probes else GLOBAL),
            steps.send(self.training, GLOBAL),
        ]
        if probes:
            for slot, record in ((source, GLOBAL), (PERSONAL, PERSONAL)):
                label = f"probe-{record}"
                plan.append(steps.evaluate(self.training, steps.mixture(slot), label, "validation", record))
        plan += [
            steps.replace(
                PERSONAL,
                source,
                {task.name: self._margin(task) for task in _tasks(client)},
                records=(PERSONAL, GLOBAL),
                relative=self.options.margin_mode == "rel",
                exclusive=self.options.replace_scope == "exclusive",
            ),
            self._train(round_, PERSONAL, record="" if probes else PERSONAL),
        ]
        return Brief(plan, {GLOBAL: self.federated.part_of(client)})

    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Keep W until the round settles, and keep for the record what was replaced."""
        self.federated.absorb(round_, client, answer)
        for result in answer.report.results:
            if result.WhichOneof("kind") == "replace":
                self.replacements[client.id] = {task.task: _shown(task) for task in result.replace.tasks}

    def settle(self, round_: int) -> dict[str, Any]:
        """Average W; the record shows who replaced what, and how often each task's rule has fired so far."""
        found = {name: self.replacements[name] for name in sorted(self.replacements)}
        self.replacements = {}
        fired = [task for tasks in found.values() for task, shown in tasks.items() if shown["replaced"]]
        for task in fired:
            self.totals[task] = self.totals.get(task, 0) + 1
        record: dict[str, Any] = {
            "replaced": len(fired),
            round_record.REPLACEMENTS: found,
            "replaced_so_far": dict(self.totals),
        }
        unknown = self._unknown_names()
        if unknown:
            record[round_record.WARNING] = (
                f"no client has a task or kind of task {', '.join(map(repr, unknown))}, as tap.* names"
            )
            log(_WARNING, "%s", record[round_record.WARNING])
        return self.federated.settle(round_) | record

    def deliver(self, client: Client) -> Brief:
        """Stage 2, and the four models side by side; X itself stays as it is."""
        train: dict[str, Any] = {
            "learning_rate": self.training.learning_rate * self.options.distill_rate,
            "draw": steps.Draw(as_step=_BATCHES),
            "keep_on_divergence": True,  # a client whose stage 2 fails gets what it had
        }
        finetune = self.options.finetune_steps or self.options.distill_steps
        tuned, student = steps.mixture(FINETUNED), steps.mixture(DISTILLED)
        learn = steps.train(self.training, student, [DISTILLED], steps=self.options.distill_steps, **train)
        teacher = tuned if self.options.kd_teacher == "finetuned" else steps.mixture(GLOBAL)
        mix = steps.mixture(DELIVERED[self.options.deliver])
        plan = [
            steps.initialise(PERSONAL, self.seed),  # for a client that was never asked
            steps.evaluate(self.training, steps.mixture(GLOBAL), "global"),
            steps.evaluate(self.training, steps.mixture(PERSONAL), "stage1"),
            steps.copy(FINETUNED, GLOBAL),
            steps.train(self.training, tuned, [FINETUNED], steps=finetune, **train),
            steps.evaluate(self.training, tuned, "finetuned"),
            steps.copy(DISTILLED, PERSONAL),
            steps.distill(
                learn,
                teacher,
                {task.name: self._kd_weight(task) for task in _tasks(client)},
                losses={task.name: _named(self._kd_losses, task, "kl") for task in _tasks(client)},
                temperature=self.options.temperature,
                reduction=self.options.kd_reduction,
            ),
            steps.evaluate(self.training, student, "distilled"),
            steps.save(mix),
            steps.evaluate(self.training, mix),
        ]
        return Brief(plan, {GLOBAL: self.federated.part_of(client)})

    def state(self) -> State:
        """W; everything else is at the clients."""
        federated = self.federated.state()
        return State(federated.tensors, federated.values | {"replaced": dict(self.totals)})

    def load_state(self, state: State) -> None:
        """Continue from saved numbers; clients are enrolled before."""
        self.federated.load_state(state)
        self.totals = {str(task): int(count) for task, count in state.values["replaced"].items()}

    def _problem(self, client: Client) -> str:
        """What is wrong with the client's declarations; empty if nothing is."""
        odd = {group for task in _tasks(client) for group in _groups(task)} ^ set(groups_of(client.layout))
        if odd:
            return f"has group {min(odd)!r} not both declared by a task and in its adapter"
        names = [task.name for task in _tasks(client)]
        if len(set(names)) != len(names):
            return f"has tasks {', '.join(sorted(names))}, expected names that differ"
        empty = [task.name for task in _tasks(client) if not task.examples.get("train", 0)]
        if empty:
            return f"has no training examples of task {empty[0]!r}"
        blind = [task.name for task in _tasks(client) if not task.examples.get("validation", 0)]
        if blind and self.options.history == "probe":
            return f"has no validation examples of task {blind[0]!r} to probe on"
        return ""

    def _train(self, round_: int, slot: str, record: str) -> steps.Step:
        draw, other = steps.Draw(as_step=_BATCHES), steps.Draw(as_step=_OTHER_BATCHES)
        if self.options.seed_mode == "reference":
            draw, other = steps.Draw(seed=round_ - 1), steps.Draw(seed=2 * (round_ - 1))
        is_personal = slot == PERSONAL
        return steps.train(
            self.training,
            steps.mixture(slot),
            [slot],
            learning_rate=self.training.learning_rate * self._warm_up(round_),
            draw=draw,
            draw_after_replace=other if is_personal else None,
            record=record,
            record_batch_share=self.options.history_norm == "batch-share",
            keep_on_divergence=is_personal,  # X must not keep W from being sent
        )

    def _unknown_names(self) -> list[str]:
        """Names in the options' tables that no client has; the names in the defaults may be missing."""
        known = {name for client in self.clients.values() for task in _tasks(client) for name in (task.name, task.kind)}
        given, usual = (
            {name for key in _TABLES for name in pairs(key, getattr(options, key))}
            for options in (self.options, TapOptions())
        )
        return sorted(given - usual - known)

    def _warm_up(self, round_: int) -> float:
        rounds = self.options.warm_up_rounds
        return 1.0 if round_ > rounds else (1 + 2 * (round_ - 1) / rounds) / 3

    def _margin(self, task: report_pb2.Task) -> float:
        return _named(table("tap.margins", self.options.margins), task, self.options.margin)

    def _kd_weight(self, task: report_pb2.Task) -> float:
        return self.options.kd_weight * _named(table("tap.kd-weights", self.options.kd_weights), task, 0.0)

    @property
    def _kd_losses(self) -> dict[str, str]:
        return pairs("tap.kd-losses", self.options.kd_losses)


def _tasks(client: Client) -> list[report_pb2.Task]:
    return list(client.registration.tasks)


def _groups(task: report_pb2.Task) -> tuple[str, ...]:
    """R(o), as declared; the one group of an adapter without groups."""
    return tuple(task.groups) or ("",)


def _named(table: Mapping[str, T], task: report_pb2.Task, default: T) -> T:
    """The value of a task: by its name, else by its kind."""
    return table.get(task.name, table.get(task.kind, default))


def _shown(found: report_pb2.TaskReplacement) -> dict[str, Any]:
    """One task's outcome as JSON; losses that are not known are left out."""
    shown: dict[str, Any] = {"replaced": found.replaced}
    for key in ("source_loss", "target_loss"):
        if found.HasField(key):
            shown[key] = round(getattr(found, key), 6)
    return shown
