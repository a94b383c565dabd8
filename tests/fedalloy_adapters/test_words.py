"""A stranger's words on a terminal and in a file."""

from __future__ import annotations

import io
import re

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedalloy_adapters.words import MAX_WORDS, one_line

ESCAPES = "\x1b[31mred\x1b]52;c;aGk=\x07 \x1b]8;;http://x\x1b\\link\x9b2J\r\n\u202eright\u2028"
"""Colour, a clipboard write, a link, clearing the screen, a line's end, the other direction of writing."""


def test_escapes_and_markup_become_text() -> None:
    shown = one_line(ESCAPES + "[/bold][link=http://x]here[/] ['a', 3] [1]")
    assert shown.isprintable()
    assert "(/bold](link=http://x]here(/] ['a', 3] [1]" in shown


def test_what_is_plain_stays_as_it_is() -> None:
    assert one_line("client 'berlin' sent rank 16, expected 8 [x > 3]") == (
        "client 'berlin' sent rank 16, expected 8 (x > 3]"
    )
    assert one_line(["q", 1]) == "['q', 1]"
    assert one_line("é漢") == "é漢"


@given(st.text(max_size=400))
def test_any_text_is_one_short_line_that_a_terminal_prints_as_it_is(text: str) -> None:
    shown = one_line(text)
    assert len(shown) <= MAX_WORDS
    assert shown.isprintable()
    out = io.StringIO()
    Console(file=out, width=10_000, no_color=True).print(shown, highlight=False, emoji=False)
    assert out.getvalue() == f"{shown}\n" or re.search(r"\\\[|\\$", shown)
