"""The contract of a strategy: what it is asked, in which order, and what it may rely on.

A strategy decides *which adapters* a client is sent, *which plan* it runs, and *how answers are merged*. It never sees
the network, and a client never sees the algorithm. One round is::

    for each client:  brief(round, client)  -> Brief     what to send and what to ask
    for each answer:  absorb(round, client, answer)      as it arrives
    once:             settle(round)         -> record    merge; what it returns is written to rounds.jsonl

and after the last round ``deliver(client)`` hands every client its personal model. State is plain tensors and JSON.

Nothing here knows Flower: :mod:`strategies.framework.flower` makes a Flower ``Strategy`` of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_args

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.bank.store import Storage
from fedalloy_adapters.groups import groups_of
from fedalloy_adapters.layout import Layout, LayoutError
from strategies.framework.dispatch import Dispatch, plan_dispatch
from strategies.framework.exchange import Answer, Brief, Client, State, StrategyError
from strategies.framework.holdings import Holding
from strategies.framework.limits import Limits, with_bounded_weight
from strategies.framework.options import NoOptions, RunConfig, keys_of, read_options, require_range
from strategies.framework.training import Training, counted, local_steps, resolved, settings_for

OptionsT = TypeVar("OptionsT")
"""A strategy's options: a frozen dataclass."""


@dataclass(frozen=True)
class About:
    """What the table of strategies (``docs/strategies.md``) says about a strategy, and its group.

    Attributes:
        gives: what a client gets.
        trains: what a client trains.
        travels: what a client sends up and is sent in a round. P is the whole adapter, P_A and P_B its factors with the
            head in both; S counts the clients of a round.
        when: the situation in which to try it, and what it costs beyond FedAvg's local work.
        group: the ``"main"`` strategies are explained and measured at length; comparisons always contain the
            ``"reference"`` and the ``"control"`` ones; all others are ``"related"``.
    """

    gives: str
    trains: str = "A, B, head"
    travels: str = "P up, P down"
    when: str = ""
    group: Literal["main", "reference", "related", "control"] = "related"


@dataclass(frozen=True)
class _Run:
    """What a strategy needs to know about the run; 0 rounds means that their number is not known."""

    seed: int = 0
    num_server_rounds: int = 0

    def __post_init__(self) -> None:
        require_range("seed", self.seed, 0, 2**62)


class Contract(ABC, Generic[OptionsT]):
    """What every strategy implements; its class is a subclass of ``AlloyStrategy``, which is this and Flower's own.

    Subclasses name the dataclass of their options, ``class FedProx(AlloyStrategy[FedProxOptions])``, whose field
    ``mu_0`` is the key ``<name>.mu-0`` (``NoOptions`` if there are none). They set ``name`` (the run-config value)
    and ``about`` (for the table), and implement :meth:`brief`, :meth:`absorb`, :meth:`settle`, :meth:`deliver`,
    :meth:`state` and :meth:`load_state`. :meth:`enrol` is called once per client, before its first brief.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    may_end_early: ClassVar[bool] = True  # whether its last round is like any other
    asks_later: ClassVar[tuple[str, ...]] = ()  # steps that are not private, and follow only on others' answers
    participants: ClassVar[str] = ""  # who is asked, if the method decides that; otherwise run-config does
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
        self.rounds = rounds  # of the whole run; 0 if not known
        self.limits = Limits()
        self.storage = storage or Storage()  # where the clients' adapters are kept
        self.clients: dict[str, Client] = {}

    @classmethod
    def from_run_config(cls, run_config: RunConfig) -> Self:
        """Build from run-config keys.

        Raises:
            OptionError: a value is of the wrong type or out of range.
        """
        options = read_options(cls.Options, run_config, f"{cls.name}.")
        run = read_options(_Run, run_config)
        training = resolved(read_options(Training, run_config), str(run_config.get("base-model", "")))
        strategy = cls(options, training, run.seed, run.num_server_rounds)
        strategy.limits = read_options(Limits, run_config)
        return strategy

    @classmethod
    def option_keys(cls) -> dict[str, Any]:
        """This strategy's own run-config keys with their defaults."""
        return keys_of(cls.Options, f"{cls.name}.")

    @property
    def learns_from(self) -> tuple[str, ...]:
        """The splits that decide a client's model; whatever it is compared with should have them, too."""
        return ("train",)

    def enrol(self, client: Client) -> None:
        """Take a client in; it may join in any round.

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

    def take_in(self, newcomers: Iterable[Client]) -> Iterator[tuple[Client, str | None]]:
        """Enrol newcomers in the order of :meth:`votes`, not of arrival.

        Yields:
            each newcomer, with the number of examples that it counts for, and why it is refused (None: it is enrolled).
        """
        new = {client.id: client for client in newcomers}
        votes = self.votes(new.values())
        known = [*self.clients.values(), *(new[client_id] for client_id in votes)]
        # What clients claim that fit nobody says nothing of the others' counts.
        counts = {client.id: client.claimed for client in known if self._fit(known[0], client)}
        for client_id in votes:
            client = with_bounded_weight(self.limits, new[client_id], counts)
            try:
                self.enrol(client)
            except StrategyError as error:
                yield client, f"{error}{_outvoted(votes, client_id)}"
                continue
            yield client, None

    def votes(self, clients: Iterable[Client]) -> dict[str, int]:
        """By id, how many of these clients each one fits, including itself; most first, then in order of id.

        Clients are enrolled in this order. So a client with a layout of its own keeps nobody out, even if its id comes
        first.
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
        """Why the second client's layout keeps it from taking part beside the first, in one line; None if it fits."""
        if self.compatible(first.layout, second.layout):
            return None
        return self.difference(first.layout, second.layout)

    def compatible(self, first: Layout, second: Layout) -> bool:
        """Whether two clients' layouts can take part in one federation; by default they must be equal."""
        return first.digest == second.digest

    def difference(self, first: Layout, second: Layout) -> str:
        """Why they cannot, in one line."""
        return first.describe_difference(second)

    def place(self, round_: int) -> tuple[int, int]:
        """A round's place in the learning rate's schedule over the run, and the number of rounds in that schedule."""
        return round_, self.rounds

    def local_steps(self, client: Client) -> int:
        """Optimiser steps that the client makes in a round, for a plan that divides them."""
        return local_steps(self.training_of(client), client.claimed or client.examples)

    def training_of(self, client: Client) -> Training:
        """How this client trains: by the run's settings, or by those of its kinds and model if the run sets none."""
        return settings_for(self.training, client.kinds, client.layout)

    def needs_everyone(self, round_: int) -> bool:
        """Whether all clients take part in this round, whatever fraction the run samples; by default never."""
        return False

    def fraction(self, configured: float) -> float:
        """Share of the clients that a round asks (the first one, where cohorts grow); by default what the run says."""
        return configured

    def late_weight(self, rounds: int) -> float:
        """Weight of an answer that comes this many rounds (from 1) late, relative to one in time; by default 0."""
        return 0.0

    def absorb_late(self, round_: int, client: Client, answer: Answer, weight: float) -> None:
        """Take in an answer to an earlier round; only called where :meth:`late_weight` is above 0."""
        raise NotImplementedError

    def dispatch(
        self,
        round_: int,
        client: Client,
        brief: Brief,
        run_name: str,
        run_key: bytes,
        holding: Holding | None = None,
        train_round: int | None = None,
        pinned: int | None = None,
    ) -> Dispatch:
        """The client's brief, encoded as the run says; ``run_name`` is the folder of its slots at the client.

        ``train_round`` is the round for the learning rate's schedule, if it is not ``round_``. The client keeps its
        slots as they were after the round ``pinned``, whatever else it removes.
        """
        place = self.place(train_round or round_)
        examples = client.claimed or client.examples, client.held_out
        steps = counted(brief.steps, self.training, examples, *place, self.training_of(client))
        return plan_dispatch(
            steps,
            brief.adapters,
            client_id=client.id,
            layout=client.layout,
            round_=round_,
            seed=self.seed,
            run_name=run_name,
            run_key=run_key,
            encoding=self.training.downlink_encoding,
            reference=client.reference,
            holding=holding,
            pinned=pinned,
            beside=client.registration.reads_beside,
        )

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

    def global_models(self, client: Client) -> Mapping[str, Adapter]:
        """Global models that belong to no client, by name, as this client would be sent them; its merge is of these.

        A client that never trained gets a weighted sum of them; if there are none, of what would be delivered to it.
        """
        return {}

    @abstractmethod
    def state(self) -> State:
        """Everything that the next round depends on, between rounds."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Continue from :meth:`state`."""


def _outvoted(votes: Mapping[str, int], client_id: str) -> str:
    """What a refusal adds if other clients have more :meth:`Contract.votes`."""
    fits, most = votes[client_id], max(votes.values())
    return f"; {fits} of {len(votes)} new clients fit its layout, {most} fit the most common one" if fits < most else ""
