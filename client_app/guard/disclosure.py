"""What the server learns of an error: its class, a column's name and a line's number.

The whole message stays in the client's log: an error in its data quotes data, and an error in its files names files.
Errors of a plan, of a received adapter and of the owner's policy are about what the server itself sent. Their messages
are passed on, without the text that other errors have added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from logging import ERROR

from flwr.app import Context, Message
from flwr.common.logger import log

from fedalloy_adapters.log_lines import log_in_one_line
from fedalloy_adapters.words import one_line

MAX_LOGGED = 2000
Handler = Callable[[Message, Context], Message]


UNTOLD = "(see the client's log)"
"""What the server gets instead of words."""


class ClientError(RuntimeError):
    """The error that the server gets; its message is :func:`told`."""


def told(error: BaseException) -> str:
    """The part of an error that the server may know.

    An error class may have ``told``, the text that may leave, and ``told_class`` if it stands for an error of another
    process.
    """
    name = str(getattr(error, "told_class", type(error).__name__))
    words = str(getattr(error, "told", ""))
    return f"{name}: {words}" if words else f"{name} {UNTOLD}"


def private_errors(handler: Handler) -> Handler:
    """Wrap a handler: its errors go to the client's log, and the server gets a :class:`ClientError`."""

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            if hasattr(error, "told_class"):  # its message names the class, and the trainer's log has the traceback
                log(ERROR, "%s", one_line(error, MAX_LOGGED))
            else:
                in_words = isinstance(error, ValueError)  # ours say what is wrong; others need a traceback
                log(ERROR, "%s: %s", type(error).__name__, one_line(error, MAX_LOGGED), exc_info=not in_words)
            failure = ClientError(one_line(told(error), 500))
        log_in_one_line(failure, "")
        raise failure

    return guarded
