"""What users read when a client fails: no class name of ours, no error number of Flower's."""

from __future__ import annotations

import pytest
from flwr.app import Error

from server_app.run.federation import one_reason
from server_app.run.messages.reasons import PASSING, reason_of


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (2, "<class 'client_app.guard.disclosure.ClientError'>:<'DataError: line 3'>", "DataError: line 3"),
        (2, "<class 'builtins.KeyError'>:<'x'>", "KeyError: x"),
        (2, "<class 'KeyError'>:<''>", "KeyError"),
        (5, "Node Unavailable", "its SuperNode is not online (Node Unavailable)"),
        (3, "Error: Message Unavailable - not found", "it did not answer in time, or its answer was lost on the way"),
        (8, "", "its process ended: killed, or out of memory?"),
        (2, "", "it gave no reason (Flower's error 2)"),
        (2, "two\nlines", "two lines"),
    ],
)
def test_a_reason_is_one_line_in_words(code: int, reason: str, said: str) -> None:
    assert reason_of(Error(code, reason)) == said


@pytest.mark.parametrize("reason", PASSING)
def test_what_may_be_otherwise_the_next_time_is_no_reason_to_give_up(reason: str) -> None:
    assert one_reason({"a": f"{reason} (why)", "b": f"{reason} (why)"}) == ""
    assert one_reason({"a": "client 'a' has no data", "b": "client 'b' has no data"}) == "client ... has no data"
