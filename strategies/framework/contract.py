"""What every strategy shares: the contract, and the bridge to Flower's own ``Strategy``.

A strategy decides *which adapters* a client is sent, *which plan* it runs, and *how answers are merged*. It never sees
the network, and a client never sees the algorithm. One round is::

    for each client:  brief(round, client)  -> Brief     what to send and what to ask
    for each answer:  absorb(round, client, answer)      as it arrives
    once:             settle(round)         -> record    merge; what it returns is written to rounds.jsonl

and after the last round ``deliver(client)`` hands every client its personal model. State is plain tensors and JSON.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_args

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.blocks import MemoryRow, Row
from fedalloy_adapters.bank.store import Bank, FileRow, Storage, tensor_of
from fedalloy_adapters.groups import groups_of
from fedalloy_adapters.layout import Layout, LayoutError
from fedalloy_adapters.parts import layout_of_sketch
from proto.fedalloy.v1 import plan_pb2, report_pb2
from strategies.framework.limits import Limits, bounded, require_affordable, with_bounded_weight, within_round
from strategies.framework.messages import (
    BadAnswerError,
    Dispatch,
    plan_dispatch,
    read_answer,
    read_registration,
    register_message,
    require_size,
)
from strategies.framework.options import NoOptions, RunConfig, keys_of, read_options, require_range
from strategies.framework.steps import Training

OptionsT = TypeVar("OptionsT")
"""A strategy's options: a frozen dataclass."""
_INFO, _WARNING = 20, 30
_REGISTRATION_SECONDS = 300.0


@dataclass(frozen=True)
class About:
    """What the table of strategies says of one (``docs/strategies.md``), and which group it belongs to.

    Attributes:
        gives: what a client gets.
        trains: what a client trains.
        travels: what a client sends up and is sent in a round. P is the whole adapter, P_A and P_B its factors with the
            head in both; S counts the clients of a round.
        group: the ``"main"`` strategies are explained and measured at length; comparisons always contain the
            ``"reference"`` and the ``"control"`` ones; all others are ``"related"``.
    """

    gives: str
    trains: str = "A, B, head"
    travels: str = "P up, P down"
    group: Literal["main", "reference", "related", "control"] = "related"


@dataclass(frozen=True)
class Client:
    """A registered client. ``examples`` counts its training examples; ``id`` is stable across runs and restarts.

    ``reference`` is the gradient that its sketches are made of, None for a client that cannot make any.
    """

    id: str
    node_id: int
    layout: Layout
    examples: int
    base_model: str = ""
    registration: report_pb2.Registration = field(default_factory=report_pb2.Registration, compare=False, repr=False)
    reference: Layout | None = None

    @property
    def claimed(self) -> int:
        """Training examples that the client registered with; ``examples`` is what it counts for."""
        return sum(int(task.examples.get("train", 0)) for task in self.registration.tasks)

    @property
    def held_out(self) -> int:
        """Validation examples that the client registered with."""
        return sum(int(task.examples.get("validation", 0)) for task in self.registration.tasks)


@dataclass(frozen=True)
class Brief:
    """What one client gets in one round: steps to run, and adapters to install in slots before running them.

    Adapters that are the client's own are recipes (:class:`fedalloy_adapters.bank.store.Made`): they are made when the
    message is, and again when its answer needs them, so that no round holds one for every client.
    """

    steps: Sequence[plan_pb2.Step]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one client answered, checked.

    ``adapters`` by slot, in the layout that was asked for; ``received`` is what the client started from, after decoding
    (it differs from what was sent where the encoding is lossy); ``metrics`` by label of the evaluate step; ``clipped``
    has the norms of updates that were longer than ``max-update-norm``, by slot.
    """

    adapters: Mapping[str, Adapter]
    received: Mapping[str, Adapter]
    metrics: Mapping[str, Mapping[str, float]]
    examples: int
    report: report_pb2.Report
    clipped: Mapping[str, float] = field(default_factory=dict)


@dataclass
class State:
    """A strategy's state between rounds: tensors by name, and values that JSON can hold exactly.

    ``rows`` are tensors that are in files: a checkpoint links them and does not copy them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, FileRow] = field(default_factory=dict)

    def keep(self, prefix: str, bank: Bank) -> None:
        """All adapters of a bank, as ``<prefix>/<name>``; nobody writes to a row, so there is nothing to copy."""
        for name, row in zip(bank, bank.rows(), strict=True):
            if isinstance(row, FileRow):
                self.rows[f"{prefix}/{name}"] = row
            else:
                self.tensors[f"{prefix}/{name}"] = tensor_of(row)

    def row(self, name: str) -> Row:
        """A tensor of either kind."""
        return self.rows[name] if name in self.rows else MemoryRow(self.tensors[name])


class StrategyError(ValueError):
    """A client does not fit this strategy, or a strategy was asked for something it cannot do."""


@dataclass(frozen=True)
class _Run:
    """What a strategy needs to know of the run; 0 rounds: not known."""

    seed: int = 0
    num_server_rounds: int = 0

    def __post_init__(self) -> None:
        require_range("seed", self.seed, 0, 2**62)


class AlloyStrategy(Strategy, Generic[OptionsT]):
    """Base of all strategies.

    Subclasses name the dataclass of their options, ``class FedProx(AlloyStrategy[FedProxOptions])``, whose field
    ``mu_0`` is the key ``<name>.mu-0`` (``NoOptions`` where there are none). They set ``name`` (the run-config value)
    and ``about`` (for the table), and implement :meth:`brief`, :meth:`absorb`, :meth:`settle`, :meth:`deliver`,
    :meth:`state` and :meth:`load_state`. :meth:`enrol` is called once per client, before its first brief.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    Options: ClassVar[type[Any]] = NoOptions  # from the bases: a class variable cannot have a type variable

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for base in vars(cls).get("__orig_bases__", ()):
            cls.Options = next((kind for kind in get_args(base) if isinstance(kind, type)), cls.Options)

    def __init__(
        self,
        options: OptionsT | None = None,
        training: Training | None = None,
        seed: int = 0,
        rounds: int = 0,
        storage: Storage | None = None,
    ) -> None:
        self.options: OptionsT = self.Options() if options is None else options
        self.training = training or Training()
        self.seed = seed
        self.rounds = rounds  # of the whole run, 0 where that is not known
        self.limits = Limits()
        self.storage = storage or Storage()  # of what is kept of its clients
        self.clients: dict[str, Client] = {}
        self._pending: list[tuple[Message, Client, Dispatch]] = []
        self._flower_key = secrets.token_bytes(32)
        self._flower_run = f"flower-{secrets.token_hex(4)}"  # a folder at the clients that no earlier run has used

    @classmethod
    def from_run_config(cls, run_config: RunConfig) -> Self:
        """Build from run-config keys.

        Raises:
            OptionError: a value is of the wrong type or out of range.
        """
        options = read_options(cls.Options, run_config, f"{cls.name}.")
        run = read_options(_Run, run_config)
        strategy = cls(options, read_options(Training, run_config), run.seed, run.num_server_rounds)
        strategy.limits = read_options(Limits, run_config)
        return strategy

    @classmethod
    def option_keys(cls) -> dict[str, Any]:
        """This strategy's own run-config keys with their defaults."""
        return keys_of(cls.Options, f"{cls.name}.")

    def enrol(self, client: Client) -> None:
        """Take a client in; it may come at any round.

        Raises:
            StrategyError: its base model, ranks or modules do not fit the clients already enrolled, it has nothing to
                train on, or its adapter has a group without a valid name.
        """
        if client.examples < 1:
            raise StrategyError(f"client {client.id!r} has {client.examples} training examples, expected at least 1")
        try:
            groups_of(client.layout)
        except LayoutError as error:
            raise StrategyError(f"client {client.id!r}: {error}") from None
        for other in self.clients.values():
            conflict = self.conflict(other, client)
            if conflict is not None:
                raise StrategyError(f"client {client.id!r} has {conflict} (as client {other.id!r} has)")
        self.clients[client.id] = client

    def votes(self, clients: Iterable[Client]) -> dict[str, int]:
        """How many of these clients each one fits, itself among them, by id: most first, then in order of id.

        In this order they are enrolled: one client with a layout of its own, however early its id, keeps nobody out.
        """
        alike: dict[tuple[bytes, bytes], list[Client]] = {}
        for client in clients:
            reference = client.reference.digest if client.reference is not None else b""
            alike.setdefault((client.layout.digest, reference), []).append(client)
        voters = {key: sum(client.examples > 0 for client in found) for key, found in alike.items()}
        found: dict[str, int] = {}
        for same in alike.values():
            fitting = sum(voters[key] for key, others in alike.items() if self._fit(same[0], others[0]))
            found |= {client.id: fitting for client in same}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def _fit(self, first: Client, second: Client) -> bool:
        try:
            return self.conflict(first, second) is None
        except LayoutError:
            return False

    def conflict(self, first: Client, second: Client) -> str | None:
        """Why the second client cannot take part beside the first, in one line: its layout; or None."""
        if self.compatible(first.layout, second.layout):
            return None
        return self.difference(first.layout, second.layout)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Whether two clients' layouts can take part in one federation; by default they must be equal."""
        return first.digest == second.digest

    def difference(self, first: Layout, second: Layout) -> str:
        """Why they cannot, in one line."""
        return first.describe_difference(second)

    def needs_everyone(self, round_: int) -> bool:
        """Whether all clients take part in this round, whatever fraction the run samples; by default never."""
        return False

    @abstractmethod
    def brief(self, round_: int, client: Client) -> Brief:
        """What ``client`` is sent and asked in round ``round_`` (from 1)."""

    @abstractmethod
    def absorb(self, round_: int, client: Client, answer: Answer) -> None:
        """Take one answer in."""

    @abstractmethod
    def settle(self, round_: int) -> dict[str, Any]:
        """Merge what was absorbed; return what the round's record should show (JSON values)."""

    @abstractmethod
    def deliver(self, client: Client) -> Brief:
        """After the last round: install, save and evaluate the client's personal model."""

    @abstractmethod
    def state(self) -> State:
        """Everything that the next round depends on, between rounds."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Continue from :meth:`state`."""

    # Flower's own Strategy: the same class runs by `strategy.start(grid, initial_arrays=ArrayRecord(), ...)`. There a
    # round also delivers, and to a client a delivery is a round of its own: a plan of a round that it knows would start
    # from the slots before that round, and throw its training away.

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Register clients on the first round, then one message per client with its own plan and adapters."""
        if not self.clients:
            self._enrol_all(grid)
        briefs = {client: self.brief(server_round, client) for client in self.clients.values()}
        return self._messages(briefs, 2 * server_round - 1)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Absorb good answers, name bad ones in the log, settle."""
        self._absorb_all(server_round, replies, absorb=True)
        self.settle(server_round)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Deliver every client its personal model as it is after this round."""
        return self._messages({client: self.deliver(client) for client in self.clients.values()}, 2 * server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean and worst client accuracy of the personal models (accuracy where the task has one)."""
        personal = [answer.metrics["personal"] for answer in self._absorb_all(server_round, replies, absorb=False)]
        scores = [metrics["accuracy"] for metrics in personal if "accuracy" in metrics]
        if not scores:
            return None
        return MetricRecord({"mean-accuracy": sum(scores) / len(scores), "worst-accuracy": min(scores)})

    def summary(self) -> None:
        """Log the options."""
        log(_INFO, "\t├──> FedAlloy strategy %r: %s", self.name, self.options)

    def _enrol_all(self, grid: Grid) -> None:
        """Register every node; one that cannot take part is named in the log and left out."""
        asked = {node: register_message(node, _REGISTRATION_SECONDS) for node in sorted(grid.get_node_ids())}
        replies = {
            reply.metadata.reply_to_message_id: reply
            for reply in grid.send_and_receive(list(asked.values()), timeout=_REGISTRATION_SECONDS)
        }
        found: dict[str, Client] = {}
        for node, message in asked.items():
            try:
                if message.metadata.message_id not in replies:
                    raise BadAnswerError(f"node {node} did not answer in {_REGISTRATION_SECONDS:.0f} s")
                registration, layout = read_registration(replies[message.metadata.message_id], node)
                client = client_from(registration, layout, node)
                require_affordable(self.limits, client)
                holder = found.setdefault(client.id, client)
                if holder.node_id != node:
                    raise BadAnswerError(
                        f"node {node} claims client-id {holder.id!r}, which node {holder.node_id} holds already"
                    )
            except BadAnswerError as error:
                log(_WARNING, "refused: %s", error)
        counts = {client.id: client.examples for client in found.values()}
        votes = self.votes(found.values())
        for client_id in votes:  # not in order of connection
            try:
                self.enrol(with_bounded_weight(self.limits, found[client_id], counts))
            except StrategyError as error:
                log(_WARNING, "refused: %s%s", error, outvoted(votes, client_id))
        if not self.clients:
            raise StrategyError(
                f"no client registered; {len(asked)} nodes are online (the log says why they are refused)"
            )

    def _messages(self, briefs: Mapping[Client, Brief], round_: int) -> list[Message]:
        self._pending = []
        for client, brief in briefs.items():
            dispatch = plan_dispatch(
                brief.steps,
                brief.adapters,
                client_id=client.id,
                layout=client.layout,
                round_=round_,
                seed=self.seed,
                run_name=self._flower_run,
                run_key=self._flower_key,
                encoding=self.training.downlink_encoding,
                reference=client.reference,
            )
            self._pending.append((dispatch.message(client.node_id), client, dispatch))
        return [message for message, _, _ in self._pending]

    def _absorb_all(self, round_: int, replies: Iterable[Message], *, absorb: bool) -> list[Answer]:
        # By the message that is answered (the grid numbers messages when it sends them): errors carry no sender.
        asked = {message.metadata.message_id: (client, dispatch) for message, client, dispatch in self._pending}
        answers: dict[str, Answer] = {}
        for reply in replies:
            if reply.metadata.reply_to_message_id not in asked:
                continue
            client, dispatch = asked.pop(reply.metadata.reply_to_message_id)
            try:
                answers[client.id] = answer_from(dispatch, reply, self.limits)
            except BadAnswerError as error:
                log(_WARNING, "%s", error)
        answers = within_round(self.limits, answers)
        for client_id, answer in answers.items() if absorb else ():
            self.absorb(round_, self.clients[client_id], answer)
        for client, _ in asked.values():
            log(_WARNING, "client %r did not answer in time", client.id)
        return list(answers.values())


def outvoted(votes: Mapping[str, int], client_id: str) -> str:
    """What a refusal adds where others have more :meth:`AlloyStrategy.votes`."""
    fits, most = votes[client_id], max(votes.values())
    return f"; {fits} of {len(votes)} new clients fit its layout, {most} that of most" if fits < most else ""


def client_from(registration: report_pb2.Registration, layout: Layout, node_id: int) -> Client:
    """The client that a checked registration describes.

    Raises:
        BadAnswerError: its reference model's layout is not valid.
    """
    reference = None
    if registration.HasField("reference"):
        try:
            reference = Layout.from_proto(registration.reference)
            require_size(reference)
            layout_of_sketch(reference, 1)
        except LayoutError as error:
            raise BadAnswerError(f"client {registration.client_id!r}: reference model: {error}") from None
    client = Client(registration.client_id, node_id, layout, 0, registration.base_model, registration, reference)
    return replace(client, examples=client.claimed)


def answer_from(dispatch: Dispatch, reply: Message, limits: Limits | None = None) -> Answer:
    """The checked answer in a client's reply, within the limits of the run.

    Raises:
        BadAnswerError: the reply is an error, not what the plan asked for, or beyond a limit; names client and reason.
    """
    report, adapters = read_answer(dispatch, reply)
    kept = bounded(limits or Limits(), dispatch, adapters)
    metrics = {
        result.evaluate.label: dict(result.evaluate.metrics)
        for result in report.results
        if result.WhichOneof("kind") == "evaluate"
    }
    return Answer(kept.adapters, dispatch.received, metrics, int(report.examples), report, kept.clipped)
