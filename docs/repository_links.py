"""For mkdocs: a link to a file outside ``docs/`` leads to that file in the repository.

In the repository such a link is relative, so that it works in a checkout and where the Markdown is shown as it is.
"""

from __future__ import annotations

import os
import re
from typing import Any

LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)\s#]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, **others: Any) -> str:
    """Called by mkdocs with each page's text; the text that it shows."""

    def repository(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), match[1]))
        inside = path == "docs" or path.startswith("docs/")
        return match[1] if inside else f"{config['repo_url'].rstrip('/')}/blob/main/{path}"

    return LINK.sub(repository, markdown)
