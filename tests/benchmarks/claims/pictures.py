"""The map of one method: its gain over each control at every setting of the dial, with intervals, as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from server_app.tools.compare.statistics import Interval, paired
from tests.benchmarks.claims.found import Line
from tests.benchmarks.claims.jobs import Wanted
from tests.benchmarks.claims.tables import SIGNS, of_dial, scores

LEFT, RIGHT, ROW, WIDTH = 250, 30, 20, 760
"""Pixels."""


def picture(asked: Wanted, lines: Sequence[Line]) -> str:
    """A row is a setting of the dial and a control; right of zero the method is better."""
    method = asked.method
    rows: list[tuple[str, Interval | None]] = []
    for dial in asked.chosen_dials:
        found = of_dial(asked, lines, dial)
        if method not in found:
            continue
        rows.append((f"{dial}: {asked.design.places[dial].about}", None))
        own = scores(found, method, "loss")
        for arm in (arm.name for arm in asked.chosen_arms):
            if arm != method and arm in found:
                rows.append((f"against {arm}", paired(own, scores(found, arm, "loss"), SIGNS["loss"]).mean))
    return drawn(f"{method} on {asked.base_name}: loss lower by (95 % interval)", rows)


def drawn(title: str, rows: Sequence[tuple[str, Interval | None]]) -> str:
    """An SVG with a title, and a line with a dot for each interval."""
    ends = [abs(end) for _, found in rows if found is not None for end in (found.low, found.high)]
    most = max(ends, default=1.0) or 1.0
    middle, half = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2
    height = 60 + ROW * len(rows)

    def x(value: float) -> float:
        return round(middle + half * value / most, 1)

    parts = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    parts.append(f'<line x1="{x(0)}" y1="30" x2="{x(0)}" y2="{height - 25}" stroke="#999"/>')
    for number, (label, found) in enumerate(rows):
        y = 45 + ROW * number
        weight = "bold" if found is None else "normal"
        parts.append(
            f'<text x="{10 if found is None else 24}" y="{y + 4}" font-weight="{weight}">{escape(label)}</text>'
        )
        if found is not None:
            colour = "#1a7f37" if found.low > 0 else "#b42318" if found.high < 0 else "#57606a"
            parts.append(f'<line x1="{x(found.low)}" y1="{y}" x2="{x(found.high)}" y2="{y}" stroke="{colour}" '
                         'stroke-width="2"/>')  # fmt: skip
            parts.append(f'<circle cx="{x(found.value)}" cy="{y}" r="4" fill="{colour}"/>')
    for value in (-most, 0.0, most):
        parts.append(f'<text x="{x(value)}" y="{height - 8}" text-anchor="middle">{value:+.2f}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'font-family="sans-serif" font-size="12"><rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])
