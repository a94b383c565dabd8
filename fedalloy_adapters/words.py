"""Makes text from other machines harmless before it is printed or stored."""

from __future__ import annotations

import re

MAX_WORDS = 200
_TAG = re.compile(r"\[(?=[a-z/#@])")


def one_line(text: object, most: int = MAX_WORDS) -> str:
    """Text from somebody else as one printable line without markup.

    Characters that end a line, move the cursor or turn the direction of writing become spaces. A bracket that a
    terminal library would read as a tag becomes a round one. The rest stays as it was.

    Args:
        text: from anybody; other objects are shown as ``str`` shows them.
        most: characters that are kept; longer text ends in ``...``.
    """
    whole = str(text)
    cut = whole if len(whole) <= most else f"{whole[: most - 4]} ..."
    return _TAG.sub("(", "".join(letter if letter.isprintable() else " " for letter in cut))
