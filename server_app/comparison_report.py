"""``report.html`` of a comparison: one file that needs no network; figures have a text and their numbers as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from server_app.comparison import Comparison, Row, explanation

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #444; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; } details > * { display: block } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; break-inside: avoid; } figcaption { font-weight: 600; } .wide { overflow-x: auto; }
"""
THEME = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function paint(print) {
  const ink = dark.matches && !print ? '#e6e6e6' : '#1b1b1b', grid = dark.matches && !print ? '#3a3d42' : '#dddddd';
  for (const chart of document.querySelectorAll('.plotly-graph-div')) {
    const change = {'font.color': ink};
    for (const axis of ['xaxis', 'yaxis']) {
      change[axis + '.gridcolor'] = grid; change[axis + '.zerolinecolor'] = grid;
    }
    Plotly.relayout(chart, change);
  }
}
paint(false);
dark.addEventListener('change', () => paint(false));
addEventListener('beforeprint', () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  paint(true);
});
addEventListener('afterprint', () => paint(false));
"""
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


class ReportError(RuntimeError):
    """The library that draws is not installed."""


def as_html(
    found: Comparison, rows: Sequence[Row], title: str, matrices: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """The page.

    Args:
        found: the comparison.
        rows: all rounds, for the learning curves.
        title: of the page.
        matrices: what was merged, by strategy: for every round its number and rows of weights by client.

    Raises:
        ReportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError("report.html needs plotly: pip install 'fedalloy[report]'") from None
    figures = [_means(found), *_paired(found), _cost(found), _curves(found, rows), _bytes(found)]
    figures += [_matrix(strategy, rounds) for strategy, rounds in matrices.items()]
    notes = "".join(f"<li>{html.escape(line.removeprefix('* '))}</li>" for line in explanation(found))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{html.escape(title)}</h1>{_table(_summary(found))}<ul>{notes}</ul>{''.join(figures)}"
        f"<script>{THEME}</script></body></html>\n"
    )


def _summary(found: Comparison) -> Table:
    references = list(found.lines[0].against) if found.lines else []
    heads = ["strategy", found.metric, "95 %", "worst decile", *(f"against {name}" for name in references)]
    body = []
    for line in found.lines:
        against = [
            "" if name == line.strategy else f"{p.mean.value:+.3f} [{p.mean.low:+.3f}, {p.mean.high:+.3f}]"
            for name, p in line.against.items()
        ]
        mean, sizes = line.mean, [f"{line.megabytes[d] or 0:.2f}" for d in ("up", "down")]
        span = f"{mean.low:.3f} to {mean.high:.3f}"
        body.append(
            [
                line.strategy,
                f"{mean.value:.3f}",
                span,
                f"{line.worst.value:.3f}",
                *against,
                *sizes,
                f"{line.seconds:.1f}",
            ]
        )
    return [*heads, "MB up", "MB down", "seconds"], body


def _means(found: Comparison) -> str:
    import plotly.graph_objects as go

    names = [line.strategy for line in found.lines]
    chart = go.Figure()
    for label, intervals, symbol in (
        ("mean", [line.mean for line in found.lines], "circle"),
        ("worst decile", [line.worst for line in found.lines], "triangle-down"),
    ):
        chart.add_scatter(
            x=[i.value for i in intervals],
            y=names,
            mode="markers",
            name=label,
            marker={"size": 10, "symbol": symbol},
            error_x={
                "array": [i.high - i.value for i in intervals],
                "arrayminus": [i.value - i.low for i in intervals],
            },
        )
    chart.update_yaxes(autorange="reversed")
    body = [
        [n, *(f"{v:.3f}" for v in (a.mean.value, a.mean.low, a.mean.high, a.worst.value, a.worst.low, a.worst.high))]
        for n, a in zip(names, found.lines, strict=True)
    ]
    heads = ["strategy", "mean", "low", "high", "worst decile", "low", "high"]
    said = f"Mean and worst-decile {found.metric} of the clients with 95 % intervals, one row for each strategy."
    return _figure(chart, f"Clients' {found.metric} at the end", said, (heads, body), 24 * len(names) + 160)


def _paired(found: Comparison) -> list[str]:
    import plotly.graph_objects as go

    figures = []
    for reference in found.lines[0].against if found.lines else []:
        base = next((line.scores for line in found.lines if line.strategy == reference), {})
        chart, body = go.Figure(), []
        for line in found.lines:
            keys = [key for key in sorted(line.scores) if key in base]
            if line.strategy == reference or not keys:
                continue
            gains = [line.scores[key] - base[key] for key in keys]
            text = [f"{client}, seed {seed}" for seed, client in keys]
            chart.add_box(
                x=gains, y=[line.strategy] * len(gains), text=text, boxpoints="all", jitter=0.4, pointpos=0,
                orientation="h", name=line.strategy, showlegend=False,
            )  # fmt: skip
            body += [[line.strategy, who, f"{gain:+.3f}"] for who, gain in zip(text, gains, strict=True)]
        chart.update_yaxes(autorange="reversed")
        chart.add_vline(x=0, line_width=1)
        said = f"Difference in {found.metric} to {reference} of every client and seed: right of zero a client gains."
        table: Table = (["strategy", "client", "difference"], body)
        figures.append(
            _figure(chart, f"Who gains and who loses against {reference}", said, table, 28 * len(found.lines) + 140)
        )
    return figures


def _cost(found: Comparison) -> str:
    import plotly.graph_objects as go

    chart = go.Figure()
    for line in found.lines:
        total = (line.megabytes["up"] or 0) + (line.megabytes["down"] or 0)
        chart.add_scatter(
            x=[total], y=[line.mean.value], mode="markers+text", text=[line.strategy], textposition="top center",
            name=line.strategy, showlegend=False, hovertext=[f"{line.seconds:.1f} s"],
        )  # fmt: skip
    chart.update_layout(xaxis_title="MB, up and down", yaxis_title=found.metric)
    body = [
        [
            a.strategy,
            f"{(a.megabytes['up'] or 0) + (a.megabytes['down'] or 0):.3f}",
            f"{a.seconds:.1f}",
            f"{a.mean.value:.3f}",
        ]
        for a in found.lines
    ]
    said = f"Mean {found.metric} against megabytes sent in both directions, one point for each strategy."
    return _figure(chart, "What it costs", said, (["strategy", "MB", "seconds", found.metric], body), 520)


def _curves(found: Comparison, rows: Sequence[Row]) -> str:
    import plotly.graph_objects as go

    chart, body = go.Figure(), []
    for line in found.lines:
        by_round: dict[int, list[float]] = {}
        for row in rows:
            if row.strategy == line.strategy and found.metric in row.metrics:
                by_round.setdefault(row.round, []).append(row.metrics[found.metric])
        rounds = sorted(by_round)
        means = [sum(by_round[r]) / len(by_round[r]) for r in rounds]
        # The model that a round begins with: the last point is what is delivered.
        chart.add_scatter(x=[r - 1 for r in rounds], y=means, mode="lines+markers", name=line.strategy)
        body.append([line.strategy, " ".join(f"{value:.3f}" for value in means)])
    chart.update_layout(xaxis_title="rounds done", yaxis_title=f"mean {found.metric}")
    said = f"Mean {found.metric} of the clients' models after every round, one line for each strategy."
    return _figure(chart, "Learning curves", said, (["strategy", "after 0, 1, 2 ... rounds"], body), 520)


def _bytes(found: Comparison) -> str:
    import plotly.graph_objects as go

    names = [line.strategy for line in found.lines]
    chart = go.Figure()
    for direction in ("up", "down"):
        chart.add_bar(
            y=names, x=[line.megabytes[direction] or 0 for line in found.lines], name=direction, orientation="h"
        )
    chart.update_layout(barmode="stack", xaxis_title=f"MB ({found.level})")
    chart.update_yaxes(autorange="reversed")
    body = [[a.strategy, *(f"{a.megabytes[d] or 0:.3f}" for d in ("up", "down"))] for a in found.lines]
    said = "Megabytes up and down, all clients, mean over seeds, stacked for each strategy."
    return _figure(chart, "Where the bytes went", said, (["strategy", "up", "down"], body), 24 * len(names) + 160)


def _matrix(strategy: str, rounds: Sequence[Mapping[str, Any]]) -> str:
    """A heat map for each round with a slider: client by client, or client by model."""
    import plotly.graph_objects as go

    chart, body, steps = go.Figure(), [], []
    shown = [(item["round"], _numbers(item["rows"])) for item in rounds]
    shown = [(number, rows) for number, rows in shown if rows]
    if not shown:
        return ""
    for index, (number, rows) in enumerate(shown):
        width = max(len(row) for row in rows.values())
        columns = list(rows) if width == len(rows) else [f"weight {j + 1}" for j in range(width)]
        chart.add_heatmap(
            z=list(rows.values()), x=columns, y=list(rows), zmin=0, zmax=1, colorscale="Cividis",
            visible=index == len(shown) - 1, texttemplate="%{z:.2f}",
        )  # fmt: skip
        steps.append(
            {"method": "update", "label": str(number), "args": [{"visible": [i == index for i in range(len(shown))]}]}
        )
        body += [[number, client, *(f"{value:.3f}" for value in row)] for client, row in rows.items()]
    slider = {"active": len(shown) - 1, "currentvalue": {"prefix": "round "}, "pad": {"t": 40}, "steps": steps}
    chart.update_layout(sliders=[slider])
    chart.update_yaxes(autorange="reversed")
    said = f"How much of what each client's model of {strategy} is made of, by round: a row for each client."
    heads = [
        "round",
        "client",
        *(f"{j + 1}" for j in range(max(len(row) for _, rows in shown for row in rows.values()))),
    ]
    return _figure(chart, f"What {strategy} merged", said, (heads, body), 60 * len(shown[-1][1]) + 220)


def _numbers(rows: Mapping[str, Any]) -> dict[str, list[float]]:
    """Rows of weights; of a strategy that records more for a client, its one weight and the rest."""
    found = {}
    for client, row in rows.items():
        if isinstance(row, Mapping) and isinstance(row.get("weight"), int | float):
            row = [row["weight"], 1 - row["weight"]]
        if isinstance(row, list) and all(isinstance(value, int | float) for value in row):
            found[client] = [float(value) for value in row]
    return found


def _figure(chart: Any, caption: str, said: str, table: Table, height: int) -> str:
    chart.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h"},
    )
    chart.update_yaxes(automargin=True)
    drawn = chart.to_html(include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True})
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption><p>{html.escape(said)}</p>"
        f'<div role="img" aria-label="{html.escape(said, quote=True)}">{drawn}</div>'
        f"<details><summary>Numbers</summary>{_table(table)}</details></figure>"
    )


def _table(table: Table) -> str:
    heads, body = table
    top = "".join(f'<th scope="col">{html.escape(str(head))}</th>' for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
