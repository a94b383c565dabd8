"""A stranger's words, before they are printed or stored: the one function that makes them harmless."""

from __future__ import annotations

import re

MAX_WORDS = 200
_TAG = re.compile(r"\[(?=[a-z/#@])")


def one_line(text: object, most: int = MAX_WORDS) -> str:
    """Text from somebody else as one printable line without markup.

    What ends a line, moves a cursor or turns the direction of writing becomes a space; a bracket that a terminal
    library would read as a tag becomes a round one. The rest stays as it was.

    Args:
        text: anybody's; what is no text is shown as ``str`` shows it.
        most: characters that are kept; what was longer ends in ``...``.
    """
    whole = str(text)
    cut = whole if len(whole) <= most else f"{whole[: most - 4]} ..."
    return _TAG.sub("(", "".join(letter if letter.isprintable() else " " for letter in cut))
