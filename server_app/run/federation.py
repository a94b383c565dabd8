"""Clients over Flower's grid: register them, hand out messages, take replies as they arrive.

Flower's own loop waits for everybody and polls every three seconds; this one polls shortly, yields each reply when it
comes, and turns errors, silence and lateness into named outcomes. A reply is matched by the message it answers,
because an error reply carries no sender. Clients may come, leave and return at any time: nodes that appear while a
round runs are asked to register meanwhile, and a client whose process died is asked once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from httpx import HTTPStatusError

from server_app.run.clients.enrolment import Enrolment
from server_app.run.clients.participants import is_named
from server_app.run.messages.exchange import Exchange, Make, Reply, Watch
from server_app.run.messages.reasons import PASSING
from server_app.run.messages.replies import MESSAGE_UNAVAILABLE, Intake
from server_app.run.options import RunOptions
from strategies.framework.dispatch import register_message
from strategies.framework.exchange import Client

Say = Callable[[str], None]
LOOK_SECONDS = 1.0
LOOKS_SHARE = 0.1
"""Largest share of the time for polling the SuperLink, which does nothing else meanwhile."""
MOST_PAUSE_SECONDS = 3.0
"""The time that Flower's own grid waits between two looks."""
SAY_SECONDS = 10.0
PAUSES = (0.1, 1.0, 0.0)
"""Seconds after each push of the same messages, where the SuperLink has not taken all of their objects."""
ALL_FOR_ONE = "all for one reason: "
"""Part of a :class:`NoClientError`'s message, by which readers of a record recognise it."""


class NotEnoughClientsError(RuntimeError):
    """Fewer clients than ``min-clients`` came, registered or answered."""


class NoClientError(NotEnoughClientsError):
    """Every client failed for the same reason, which would make another run fail, too."""


class Federation:
    """The clients of one run.

    Args:
        grid: Flower's grid.
        poll_interval: seconds between looks for replies.
        say: called with progress messages.
        arrived: called with every answer to a registration, and the client that it describes (None: refused).
        enrolment: reads registrations, and knows the clients.
        request: makes the content of the message that asks who a client is.
    """

    def __init__(
        self,
        grid: Grid,
        poll_interval: float,
        say: Say,
        arrived: Callable[[Reply, Client | None], None],
        enrolment: Enrolment,
        request: Callable[[], RecordDict] = RecordDict,
    ) -> None:
        self.grid = grid
        self.request = request
        self.intake = Intake(grid, say)
        self.poll_interval = poll_interval
        self.say = say
        self.arrived = arrived
        self.enrolment = enrolment
        self.late: Callable[[str, Message], bool] = lambda client_id, reply: False  # takes a late answer
        self.overdue_answers: dict[str, int] = {}
        self._nodes: dict[int, NodeInfo] = {}
        self._seen: dict[int, NodeInfo] = {}  # including nodes that have gone, because a refusal names them
        self._asked: set[int] = set()
        self._asking: dict[str, tuple[int, float]] = {}
        self._overdue: dict[str, str] = {}
        self._look_at = float("-inf")

    # ------------------------------------------------------------------------------------------------- who is there

    def wait_for_nodes(self, minimum: int, timeout: float) -> list[NodeInfo]:
        """Wait until at least ``minimum`` nodes are online; says so every few seconds.

        Raises:
            NotEnoughClientsError: the time ran out.
        """
        started = time.monotonic()
        next_word = started + 2
        while True:
            nodes = sorted(self.grid.get_nodes(), key=lambda node: node.node_id)
            if len(nodes) >= minimum:
                return nodes
            now = time.monotonic()
            if now - started > timeout:
                raise NotEnoughClientsError(
                    f"{len(nodes)} of at least {minimum} SuperNodes are online after {timeout:.0f} s "
                    "(startup-timeout); start the missing ones, or lower min-clients"
                )
            if now >= next_word:
                self.say(f"waiting for clients: {len(nodes)} of at least {minimum} SuperNodes online")
                next_word = now + SAY_SECONDS
            time.sleep(max(self.poll_interval, 0.2))

    def register(self, minimum: int, timeout: float, watch: Watch) -> None:
        """Ask every online node to register, and wait for the answers; at least ``minimum`` must register.

        Afterwards the enrolment has clients that may take part as newcomers; errors, bad registrations and ids of other
        owners are its refusals.

        Raises:
            NotEnoughClientsError: fewer than ``minimum`` registered; names what went wrong.
        """
        deadline = time.monotonic() + timeout
        self._nodes = {node.node_id: node for node in self.wait_for_nodes(minimum, timeout)}
        self._seen |= self._nodes
        self._asked |= set(self._nodes)
        count = len(self._nodes)
        self.say(f"asking {count} SuperNodes who they are; each loads its base model and data, which may take a minute")
        makes = {f"node {node_id}": self._registration(node_id, timeout) for node_id in self._nodes}
        for reply in self.exchange(makes, max(deadline - time.monotonic(), self.poll_interval), watch):
            self._welcome(self._node_of(reply.client_id), reply)
        if len(self.enrolment.newcomers) < minimum:
            count = len(self.enrolment.newcomers)
            if not count and (reason := one_reason(self.enrolment.refused)):
                said = f"none of {len(self.enrolment.refused)} clients can take part, all for one reason: {reason}"
                raise NoClientError(said)
            raise NotEnoughClientsError(
                f"{count} of at least {minimum} clients registered. {self.enrolment.why_missing()}"
            )

    def present(self, watch: Watch) -> list[Client]:
        """Enrolled clients whose nodes are online now, in order of id; unknown nodes are asked to register."""
        self._look_around(watch, now=True)
        for _ in self._pull({}):
            pass
        return [client for _, client in sorted(self.enrolment.clients.items()) if client.node_id in self._nodes]

    # ----------------------------------------------------------------------------------------------------- messages

    def exchange(
        self,
        makes: Mapping[str, Make],
        timeout: float,
        watch: Watch,
        enough: Callable[[], bool] = lambda: True,
        again: Callable[[str, Message], bool] = lambda client_id, reply: False,
        patience: Callable[[], float] = lambda: math.inf,
    ) -> Iterator[Reply]:
        """Push one message per client and yield replies as they arrive; None for those that do not in ``timeout`` s.

        A client whose process died is asked again. One whose node is gone is waited for only as long as there are not
        ``enough`` usable answers without it; when it is back, it is asked again. One whose reply makes ``again`` true
        is asked again at once. ``patience`` says how many seconds the others have from now on; it never prolongs.
        """
        exchange = Exchange(self, makes, watch)
        started = time.monotonic()
        next_word, next_pull, ends = started, started, started + timeout
        while exchange.is_open or (exchange.lost and not enough()):
            exchange.push()
            if time.monotonic() >= next_pull:  # not after each push, because a look costs the SuperLink more
                for reply in self._pull(exchange.waiting):
                    found = exchange.taken(reply, again)
                    if found is not None:
                        yield found
                next_pull = time.monotonic() + _pause(self.poll_interval, self.intake.asking_seconds)
            now = time.monotonic()
            ends = min(ends, now + patience())
            next_pull = min(next_pull, max(ends, now))  # so that answers in time are seen
            if now > ends:
                break
            self._look_around(watch)
            for client_id in [name for name in exchange.lost if self.is_online(name)]:
                self.say(f"{client_id} is back and is asked again")
                exchange.again(client_id)
            if exchange.lost and now >= next_word and (exchange.waiting or not enough()):
                self.say(_waiting_for(exchange.lost, exchange.waiting, ends - now, enough()))
                next_word = now + SAY_SECONDS
            exchange.wait(self.poll_interval)
        yield from exchange.left()

    def _pull(self, waiting: Mapping[str, str]) -> Iterator[Message]:
        """Replies to these messages, by client id. Other replies are handled here; each message is answered once."""
        ids, names = dict.fromkeys([*waiting, *self._asking, *self._overdue]), dict(waiting)
        for reply in self.intake.pull(list(ids)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in self._asking:
                node_id, asked = self._asking.pop(message_id)
                if reply.has_error() and reply.error.code == MESSAGE_UNAVAILABLE:
                    self._asked.discard(node_id)  # its answer was lost: it is asked again at the next look
                else:
                    self._welcome(node_id, Reply(f"node {node_id}", reply, time.monotonic() - asked))
            elif message_id in waiting:
                yield reply
            else:  # a late or repeated reply: taken off the SuperLink and reported
                overdue = self._overdue.pop(message_id, None)
                if overdue is not None and overdue.startswith("node ") and not reply.has_error():
                    # Its registration was late; it takes part from the next round on.
                    self.enrolment.forgive(self._node_of(overdue))
                    self._welcome(self._node_of(overdue), Reply(overdue, reply, 0.0))
                elif overdue is not None and not reply.has_error() and self.late(overdue, reply):
                    self.say(f"{overdue} has answered an earlier round; it counts in this one")
                elif not (reply.has_error() and reply.metadata.src_node_id == SUPERLINK_NODE_ID):
                    name = overdue or names.get(message_id, "somebody")
                    self.overdue_answers[name] = self.overdue_answers.get(name, 0) + 1

    def push(self, messages: Sequence[Message]) -> list[str | None]:
        """The messages' ids; None where the SuperLink did not take one: its node went away in between.

        A busy SuperLink answers later than Flower waits; Flower then sends the object again, and takes "I have it" for
        a failure. Or its database was locked for too long, and it answers with an error. So the same messages are
        pushed once more: the SuperLink asks for nothing that it has.
        """
        for pause in PAUSES:
            try:
                found = [message_id or None for message_id in self.grid.push_messages(messages)]
                return found or [None] * len(messages)  # of what it finds too large it says nothing
            except (ObjectPushError, HTTPStatusError) as error:
                if isinstance(error, HTTPStatusError) and not error.response.is_server_error:
                    raise
                time.sleep(pause)
        return [None] * len(messages)

    def overdue(self, message_id: str, client_id: str) -> None:
        """Stop waiting for the answer to this message; it is taken off the SuperLink when it comes."""
        self._overdue[message_id] = client_id

    def gone(self, client_id: str) -> None:
        """Note that the client is gone, until a later look finds it back."""
        self._nodes.pop(self._node_of(client_id), None)

    def is_online(self, client_id: str) -> bool:
        """Whether the client's node was there at the last look."""
        return self._node_of(client_id) in self._nodes

    def _node_of(self, client_id: str) -> int:
        client = self.enrolment.clients.get(client_id)
        return client.node_id if client else int(client_id.removeprefix("node "))

    def _look_around(self, watch: Watch, *, now: bool = False) -> None:
        """Look which nodes are online. New ones are asked to register, and answer while others train."""
        if not now and time.monotonic() < self._look_at:
            return
        started = time.monotonic()
        try:
            self._nodes = {node.node_id: node for node in self.grid.get_nodes()}
        except HTTPStatusError as error:  # of a SuperLink whose database is locked: as at the last look
            if not error.response.is_server_error:
                raise
        self._look_at = time.monotonic() + _pause(LOOK_SECONDS, time.monotonic() - started)
        self._seen |= self._nodes
        held = {client.node_id for client in [*self.enrolment.clients.values(), *self.enrolment.newcomers.values()]}
        self._asked &= set(self._nodes) | held  # a node that left before it was enrolled is asked again when it is back
        for node_id in sorted(set(self._nodes) - self._asked - held):
            self._asked.add(node_id)
            message = register_message(node_id, 3600, self.request())
            watch.pushing(f"node {node_id}")
            for message_id in self.push([message]):
                if message_id:
                    self._asking[message_id] = (node_id, time.monotonic())
                else:
                    self._asked.discard(node_id)
            watch.pushed(f"node {node_id}", message)

    def _registration(self, node_id: int, timeout: float) -> Make:
        return lambda: register_message(node_id, timeout, self.request())

    def _welcome(self, node_id: int, reply: Reply) -> None:
        node = self._seen.get(node_id) or NodeInfo(node_id=node_id)
        self.arrived(reply, self.enrolment.welcome(reply.client_id, node, reply.message, self._nodes))


def _waiting_for(lost: Iterable[str], waiting: Mapping[str, str], seconds: float, enough: bool) -> str:
    """A message that says what the run waits for while clients are gone, and for how long."""
    gone, at_work = ", ".join(lost), len(waiting)
    if not waiting:
        return f"waiting for {gone} to come back, at most {seconds:.0f} s more: too few answered without"
    if enough:
        return f"{gone} went away; the run goes on without {gone} when the other {at_work} have answered"
    return (
        f"{gone} went away; waiting for the other {at_work}, at most {seconds:.0f} s more, and for {gone} where too "
        "few answer"
    )


def one_reason(reasons: Mapping[str, str]) -> str:
    """The reason why several clients failed, if it is the same for all and may last; else empty."""
    found = {reason.replace(repr(who), "...") for who, reason in reasons.items()}
    if len(reasons) < 2 or len(found) > 1:
        return ""
    reason = found.pop()
    return "" if reason.startswith(PASSING) else reason


def require_enough(enrolment: Enrolment, options: RunOptions) -> None:
    """Require that a run can start: at least ``min-clients`` fit, one of them takes part, and nobody was refused.

    With ``min-clients`` a run goes on without those that were refused; so does one that only hands out models.

    Raises:
        NotEnoughClientsError: the message names the refused clients, the reasons, and how to go on without them.
    """
    fitting = sum(client.node_id != 0 for client in enrolment.clients.values())
    if fitting < options.least:
        raise NotEnoughClientsError(f"{fitting} of at least {options.least} clients fit. {enrolment.why_missing()}")
    if options.is_over:
        return
    if not any(is_named(client_id, options.clients) for client_id in enrolment.clients):
        who = ", ".join(sorted(enrolment.clients))
        raise NotEnoughClientsError(f"clients = {options.clients!r} fits none of the run's clients: {who}")
    if enrolment.refused and not options.min_clients:
        raise NotEnoughClientsError(
            f"{fitting} of {fitting + len(enrolment.refused)} sites that are online can take part; refused: "
            f"{enrolment.why_refused()}. Put that right and start again, or go on without: min-clients={fitting}"
        )


def _pause(least: float, took: float) -> float:
    """Seconds until the next look, from the duration of the last one: a busy SuperLink is asked less often."""
    return max(least, min(took / LOOKS_SHARE, MOST_PAUSE_SECONDS))
