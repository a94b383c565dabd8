"""``report.html`` of a comparison: one file that needs no network; figures have a text and a table of their numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from server_app.tools.compare.costs import bytes_by_kind, reconciliation, slowest
from server_app.tools.compare.figures import as_table
from server_app.tools.compare.merges import merges
from server_app.tools.compare.records import FinishedRun, remarks
from server_app.tools.compare.scores import by_encoding, costs, curves, differences, means
from server_app.tools.compare.statistics import COSTS, Comparison, Line, Paired, cells_of, explanation

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --soft: #f2f4f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #444; --soft: #22262c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; }
small { opacity: 0.75; } thead th { white-space: normal; vertical-align: bottom; }
.words { text-align: left; white-space: normal; min-width: 12rem; }
tbody th { font-weight: 500; } th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
figure { margin: 2.5rem 0; break-inside: avoid; } figcaption { font-weight: 600; font-size: 1.05rem; }
figure p { margin: 0.2rem 0; } .wide { overflow-x: auto; } .chart { min-width: 34rem; }
.glance { background: var(--soft); padding: 0.6rem 1rem 0.6rem 2rem; border-radius: 0.5rem; }
summary { cursor: pointer; font-size: 0.85rem; }
@media (max-width: 40rem) { .chart { min-width: 0; } .wide { border-right: 1px dashed var(--line); } }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --soft: #f5f5f5; }
  body { margin: 0; max-width: none; font-size: 11pt; } .wide { overflow: visible; } .chart { min-width: 0; }
  table { font-size: 7.5pt; } th, td { padding: 0.1rem 0.25rem; white-space: normal; } h2 { break-after: avoid; }
}
"""
THEME = """
const dark = matchMedia('(prefers-color-scheme: dark)');
const charts = [...document.querySelectorAll('.plotly-graph-div')];
function paint(print) {
  const night = dark.matches && !print, ink = night ? '#e6e6e6' : '#1b1b1b', grid = night ? '#3a3d42' : '#dddddd';
  for (const chart of charts) {
    const change = {'font.color': ink, 'sliders[0].font.color': ink};
    if (!chart.layout.sliders) delete change['sliders[0].font.color'];
    for (const axis of ['xaxis', 'yaxis']) {
      change[axis + '.gridcolor'] = grid; change[axis + '.zerolinecolor'] = grid;
    }
    if (print) change.width = 680;
    Plotly.relayout(chart, change);
    if (!print && chart.dataset.printed) Plotly.relayout(chart, {width: null, autosize: true});
    if (print) chart.dataset.printed = 'yes'; else delete chart.dataset.printed;
  }
}
paint(false);
dark.addEventListener('change', () => paint(matchMedia('print').matches));
let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open])')];
  closed.forEach(d => d.open = true);
  paint(true);
});
addEventListener('afterprint', () => { closed.forEach(d => d.open = false); paint(false); });
"""


FEW = 12
"""With at most this many scores (one per client and seed), or only one seed, the report warns against a choice."""


class ReportError(RuntimeError):
    """The drawing library is not installed."""


def as_html(found: Comparison, runs: Sequence[FinishedRun], title: str, failed: Mapping[str, str] | None = None) -> str:
    """The page.

    Args:
        found: the comparison.
        runs: the compared runs.
        title: the page's title.
        failed: why runs failed, by run name.

    Raises:
        ReportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("report.html needs plotly: pip install 'fedalloy[report]'") from None
    rows = [row for run in runs for row in run.rows]
    notes = "".join(f"<li>{html.escape(line.removeprefix('* '))}</li>" for line in explanation(found))
    glance = "".join(f"<li>{html.escape(line)}</li>" for line in at_a_glance(found, runs, failed or {}))
    parts: dict[str, list[str]] = {}
    if found.lines:
        parts = {
            "Clients": [means(found), *differences(found), curves(found, rows)],
            "Cost": [*costs(found), *by_encoding(found), *bytes_by_kind(found, runs), slowest(found, rows)],
            "What was merged": merges(runs, found.metric),
        }
    text = "".join(f"<h2>{name}</h2>{''.join(figures)}" for name, figures in parts.items() if figures)
    notes = notes.replace("`", "")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><main>"
        f'<h1>{html.escape(title)}</h1><ul class="glance">{glance}</ul>'
        f"{as_table(cells_of(found))}<ul>{notes}</ul>{text}"
        f"</main><script>{THEME}</script></body></html>\n"
    )


def at_a_glance(found: Comparison, runs: Sequence[FinishedRun], failed: Mapping[str, str]) -> list[str]:
    """The results in sentences, and remarks on the runs."""
    measured = [reconciliation(runs)] if any(run.unexplained is not None for run in runs) else []
    return [*verdict(found), *measured, *remarks(runs, failed)]


def verdict(found: Comparison) -> list[str]:
    """The results in sentences."""
    ranked = [line for line in found.ranked() if not math.isnan(line.mean.value)]
    if not ranked:
        return []
    best = ranked[0]
    said = [f"Best mean {found.metric}: {best.strategy}, {best.mean.value:.3f}{_role(best)}."]
    said += [
        f"Against {name}, {best.strategy} {_gain(paired)}."
        for name, paired in best.against.items()
        if name != best.strategy and not math.isnan(paired.mean.value)
    ]
    worst = max(ranked, key=lambda line: found.sign * line.worst.value)
    said.append(f"Best worst decile: {worst.strategy}, {worst.worst.value:.3f}{_role(worst)}.")
    if found.controlled:
        beyond = [
            f"{line.strategy} (against {line.rival})" for line in ranked if line.beyond and line.beyond.mean.low > 0
        ]
        rivals = sum(bool(line.rival) for line in ranked)
        said.append(
            f"Beyond the best control that learns from no other examples than they do, with a 95 % interval above 0: "
            f"{', '.join(beyond) or 'none'} ({len(beyond)} of {rivals})."
        )
    pairs, seeds = len(best.scores), len({seed for seed, _ in best.scores})
    if seeds < 2 or pairs < FEW:
        said.append(f"Only {pairs} scores of {seeds} seed{'s' * (seeds != 1)}: too few to choose by.")
    local = next((line for line in found.lines if line.strategy == "local"), None)
    for what, cost in COSTS.items():
        front = [
            line.strategy
            for line in found.cheapest(cost)
            if local is None or found.sign * (line.mean.value - local.mean.value) >= 0
        ]
        if front:
            said.append(
                f"Controls apart, not beaten by others with at most as many {what}, cheapest first: {', '.join(front)}."
            )
    return said


def _role(line: Line) -> str:
    return f" (a {line.role})" if line.role else ""


def _gain(found: Paired) -> str:
    mean = found.mean
    word = "gains" if mean.value >= 0 else "loses"
    return (
        f"{word} {abs(mean.value):.3f} [{mean.low:+.3f}, {mean.high:+.3f}]; {found.better} of "
        f"{found.better + found.worse + found.equal} pairs of client and seed gain, {found.worse} lose"
    )
