"""Parts of every figure in a comparison's report: a caption, a text, a chart, and its numbers as a table."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""Column heads and rows."""
# Okabe and Ito's colours, which the colour-blind can tell apart; the last one is grey, for lines in the background.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a300", "#7f7f7f")
DASHES = ("solid", "dash", "dot", "dashdot")
ROLES = {"": ("#0072b2", "circle"), "reference": ("#d55e00", "square"), "control": ("#7f7f7f", "diamond")}
"""Colour and symbol of a strategy by its role."""
OUTLINED = {"color": "#ffffff", "shadow": "0 0 2px #000, 0 0 3px #000, 0 0 3px #000"}
"""Font of numbers that can be read on every colour of a scale."""
WORDS = re.compile(r"[a-z]{2,}\S* \S")
"""What a cell has that is more than a number or a name."""
READABLE = 26
"""Height of a row of text, in pixels."""


def figure(chart: Any, caption: str, said: str, table: Table, height: int, note: str = "") -> str:
    """One figure.

    Args:
        chart: plotly's chart.
        caption: its title.
        said: a description, also for readers who cannot see the figure.
        table: its numbers.
        height: in pixels.
        note: more text.
    """
    chart.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    )
    chart.update_yaxes(automargin=True)
    chart.update_xaxes(automargin=True)
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    drawn = chart.to_html(include_plotlyjs=False, full_html=False, config=config)
    more = f"<p>{html.escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption><p>{html.escape(said)}</p>{more}"
        f'<div class="wide"><div class="chart" role="group" aria-label="{html.escape(said, quote=True)}">{drawn}</div>'
        f"</div><details><summary>Numbers: {html.escape(caption)}</summary>{as_table(table)}</details></figure>"
    )


def as_table(table: Table) -> str:
    """A table that scrolls if the page is narrow; intervals are in small print below numbers, words to the left."""
    heads, body = table
    worded = {place for row in body for place, cell in enumerate(row) if place and WORDS.search(str(cell))}
    kinds = {place: ' class="words"' for place in worded}
    top = "".join(f'<th scope="col"{kinds.get(i, "")}>{html.escape(str(head))}</th>' for i, head in enumerate(heads))
    lines = []
    for first, *rest in body:
        cells = "".join(f"<td{kinds.get(i, '')}>{_cell(str(cell))}</td>" for i, cell in enumerate(rest, 1))
        lines.append(f'<tr><th scope="row">{html.escape(str(first))}</th>{cells}</tr>')
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(text: str) -> str:
    number, bracket, interval = text.partition(" [")
    return html.escape(number) + (f"<br><small>[{html.escape(interval)}</small>" if bracket else "")


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers and one beyond each, for a logarithmic axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]


def slider(labels: Sequence[str], visible: Sequence[Sequence[bool]], prefix: str) -> dict[str, Any]:
    """A slider that shows some of a chart's traces at each step, the last one at first."""
    steps = [
        {"method": "update", "label": label, "args": [{"visible": list(shown)}]}
        for label, shown in zip(labels, visible, strict=True)
    ]
    return {
        "active": len(labels) - 1,
        "currentvalue": {"prefix": prefix},
        "pad": {"t": 40},
        "bgcolor": "#8a8f98",
        "bordercolor": "#8a8f98",
        "activebgcolor": "#0072b2",
        "tickcolor": "#8a8f98",
        "steps": steps,
    }


def heights(rows: int, rest: int = 130) -> int:
    """The height in pixels of a chart with this many rows of text."""
    return READABLE * rows + rest
