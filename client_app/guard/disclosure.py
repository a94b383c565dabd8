"""What of an error leaves the client: its class, a column's name and a line's number. The words stay in its log.

An error of the client's data says what was found, and that is data; an error of its files says which there are. The
server gets neither. What was asked for is the server's own: errors of a plan, of a received adapter and of the owner's
policy are told in their words, but for what other errors have added to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from logging import ERROR

from flwr.app import Context, Message
from flwr.common.logger import log

from fedalloy_adapters.words import one_line

Handler = Callable[[Message, Context], Message]


class ClientError(RuntimeError):
    """What the server is told of an error: :func:`told`."""


def told(error: BaseException) -> str:
    """What the server may know of an error.

    An error class may have ``told``: the words, or the place, that may leave; and ``told_class``, where it stands for
    an error of another process.
    """
    name = str(getattr(error, "told_class", type(error).__name__))
    words = str(getattr(error, "told", ""))
    return f"{name}: {words}" if words else f"{name} (the client's log says more)"


def private_errors(handler: Handler) -> Handler:
    """The handler, whose errors are written to the client's log and told as :class:`ClientError`."""

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            in_words = isinstance(error, ValueError)  # ours say what is wrong; of others one needs to see where
            log(ERROR, "%s: %s", type(error).__name__, one_line(error, 2000), exc_info=not in_words)
            failure = ClientError(one_line(told(error), 500))
        raise failure

    return guarded
