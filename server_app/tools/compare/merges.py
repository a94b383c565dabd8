"""Figures of merges: weights by round, Potara's endpoints, TAP's replacements, FedMosaic's relevance.

They read the ``settled`` values in the round records of the first seed. Every value that maps clients to rows of
numbers is drawn as a matrix; nothing here depends on a strategy's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server_app.tools.compare.figures import COLOURS, OUTLINED, Table, figure, heights, slider
from server_app.tools.compare.records import FinishedRun
from server_app.tools.compare.statistics import with_score
from strategies.framework import round_record

MODELS = round_record.WEIGHTS
MATRICES = (MODELS, round_record.RELATIONS, round_record.RELEVANCE)
"""Names of rows of weights in ``settled``: of the server's models, or (the others) of clients."""
ENDPOINTS = ("local", "half", "federated")
"""Labels of evaluations beside the personal model's, if a merge has two ends."""
ENDS = ["federated", "local"]
Matrix = dict[str, list[float]]
"""Rows by client."""


def merges(runs: Sequence[FinishedRun], metric: str) -> list[str]:
    """All figures of merges, by strategy."""
    first: dict[str, FinishedRun] = {}
    for run in runs:
        first.setdefault(run.strategy, run)
    figures = []
    for name, run in first.items():
        figures += [*_matrices(name, run), *_entropy(name, run), *_endpoints(name, run, metric), *_search(name, run)]
        figures += _replacements(name, run)
    return figures


def _matrices(strategy: str, run: FinishedRun) -> list[str]:
    figures = []
    for kind in MATRICES:
        shown = [(r["round"], matrix_of(r.get("settled", {}).get(kind))) for r in run.rounds]
        shown = [(number, rows) for number, rows in shown if rows]
        if shown:
            figures.append(_matrix(strategy, kind, shown, run))
    return figures


def _matrix(strategy: str, kind: str, shown: Sequence[tuple[int, Matrix]], run: FinishedRun) -> str:
    """A heat map for each round with a slider: client by client, or client by model."""
    import plotly.graph_objects as go

    values = [value for _, rows in shown for row in rows.values() for value in row]
    low, high = min(0.0, *values), max(1.0, *values)
    chart, body = go.Figure(), []
    columns: list[str] = []
    for index, (number, rows) in enumerate(shown):
        width = max(len(row) for row in rows.values())
        columns = list(rows)
        if kind == MODELS:
            columns = ENDS if _weights(run) else [f"model {j + 1}" for j in range(width)]
        chart.add_heatmap(
            z=list(rows.values()), x=columns, y=list(rows), zmin=low, zmax=high, colorscale="Cividis",
            visible=index == len(shown) - 1, texttemplate="%{z:.2f}" if width <= 12 else None,
            colorbar={"thickness": 12}, xgap=1, ygap=1, textfont=OUTLINED,
        )  # fmt: skip
        body += [[number, client, *(f"{value:.3f}" for value in row)] for client, row in rows.items()]
    labels = [str(number) for number, _ in shown]
    visible = [[i == index for i in range(len(shown))] for index in range(len(shown))]
    chart.update_layout(sliders=[slider(labels, visible, "after round ")])
    chart.update_yaxes(autorange="reversed")
    across = "model" if kind == MODELS else "client"
    said = f"What each client's model of {strategy} is made of: a row for each client, a column for each {across}"
    said += f"; the slider chooses one of {len(shown)} rounds." if len(shown) > 1 else f", after round {labels[0]}."
    caption = f"{strategy}: {kind}, client by {across}, seed {run.seed}"
    return figure(chart, caption, said, (["round", "client", *columns], body), heights(len(shown[-1][1]), 230))


def matrix_of(rows: Any) -> Matrix:
    """Rows of weights; if a strategy records more for a client, the row is its one weight and the rest."""
    found: Matrix = {}
    for client, row in rows.items() if isinstance(rows, Mapping) else ():
        if isinstance(row, Mapping) and isinstance(row.get("weight"), int | float):
            row = [row["weight"], 1 - row["weight"]]
        if isinstance(row, list) and row and all(isinstance(value, int | float) for value in row):
            found[client] = [float(value) for value in row]
    return found


def _by_round(run: FinishedRun, key: str) -> list[tuple[int, Any]]:
    """A strategy's records under this key, with the number of the round."""
    return [(r["round"], r["settled"][key]) for r in run.rounds if key in r.get("settled", {})]


def _entropy(strategy: str, run: FinishedRun) -> list[str]:
    """A figure that shows how close to uniform the relevance is."""
    import plotly.graph_objects as go

    found = _by_round(run, round_record.ENTROPY)
    if not found:
        return []
    chart = go.Figure()
    chart.add_scatter(
        x=[n for n, _ in found], y=[e for _, e in found], mode="lines+markers", line={"color": COLOURS[0]}
    )
    chart.update_layout(xaxis_title="round", yaxis_title="relative entropy", showlegend=False)
    chart.update_yaxes(range=[0, 1.05])
    chart.update_xaxes(dtick=1 if len(found) <= 12 else None)
    said = "Mean entropy of a client's relevance by round, over its maximum: at 1 all peers count the same."
    body = [[number, f"{entropy:.4f}"] for number, entropy in found]
    return [
        figure(chart, f"{strategy}: entropy of the relevance, seed {run.seed}", said, (["round", "entropy"], body), 280)
    ]


def _endpoints(strategy: str, run: FinishedRun, metric: str) -> list[str]:
    """The merged model between its two ends, client by client."""
    import plotly.graph_objects as go

    (last,) = [r for r in run.rounds if r["phase"] == "deliver"][-1:] or [{"clients": {}}]
    models = (*ENDPOINTS, "personal")
    measured = {
        client: {label: with_score(metrics) for label, metrics in answer.get("metrics", {}).items()}
        for client, answer in last["clients"].items()
    }
    found = {
        client: {label: metrics[label][metric] for label in models}
        for client, metrics in measured.items()
        if all(metric in metrics.get(label, {}) for label in models)
    }
    if not found:
        return []
    weights = _weights(run)
    chart = go.Figure()
    for client, scores in found.items():
        ends = [scores[label] for label in ENDPOINTS]
        chart.add_scatter(
            x=[ends[0], ends[2]], y=[client] * 2, mode="lines", line={"color": "#8a8f98"}, showlegend=False,
            hoverinfo="skip",
        )  # fmt: skip
    shapes = (("triangle-left", 1), ("line-ns-open", 7), ("triangle-right", 2), ("diamond", 0))
    for label, (symbol, colour) in zip(models, shapes, strict=True):
        chart.add_scatter(
            x=[scores[label] for scores in found.values()], y=list(found), mode="markers",
            name={"personal": "merged", "half": "half of each"}.get(label, f"{label} alone"),
            marker={"size": 11, "symbol": symbol, "color": COLOURS[colour]},
            text=[f"weight of the federated adapter {weights[c]:.3f}" if c in weights else "" for c in found],
        )  # fmt: skip
    chart.update_layout(xaxis_title=metric)
    chart.update_yaxes(autorange="reversed")
    body = [
        [
            client,
            *(f"{scores[label]:.3f}" for label in models),
            f"{weights.get(client, float('nan')):.3f}",
        ]
        for client, scores in found.items()
    ]
    said = f"{metric.capitalize()} of each client's merged model between its ends, the local and the federated adapter."
    table: Table = (["client", "local alone", "half of each", "federated alone", "merged", "weight of federated"], body)
    return [
        figure(
            chart, f"{strategy}: the merge and both its ends, seed {run.seed}", said, table, heights(len(found), 160)
        )
    ]


def _search(strategy: str, run: FinishedRun) -> list[str]:
    """A figure of the loss on held-out examples along the line between both ends."""
    import plotly.graph_objects as go

    shown = {
        client: row
        for r in run.rounds
        for client, row in (r.get("settled", {}).get(round_record.WEIGHTS) or {}).items()
        if isinstance(row, Mapping) and row.get("search_losses")
    }
    if not shown:
        return []
    weights = _weights(run)
    chart, body = go.Figure(), []
    for place, (client, row) in enumerate(shown.items()):
        losses = row["search_losses"]
        grid = [index / max(1, len(losses) - 1) for index in range(len(losses))]
        colour = COLOURS[place % len(COLOURS)]
        chart.add_scatter(x=grid, y=losses, mode="lines", name=client, line={"color": colour}, legendgroup=client)
        if client in weights:
            nearest = min(range(len(grid)), key=lambda i, w=weights[client]: abs(grid[i] - w))  # type: ignore[misc]
            chart.add_scatter(
                x=[weights[client]], y=[losses[nearest]], mode="markers", showlegend=False, legendgroup=client,
                name=f"{client}'s weight", marker={"size": 11, "symbol": "diamond", "color": colour},
            )  # fmt: skip
        body.append(
            [
                client,
                f"{weights.get(client, float('nan')):.3f}",
                *(f"{losses[i]:.4f}" for i in (0, -1)),
                f"{min(losses):.4f}",
            ]
        )
    chart.update_layout(
        xaxis_title="weight of the federated adapter (0: local alone, 1: federated alone)", yaxis_title="loss"
    )
    said = "Loss on held-out examples along the line from each client's local to the federated adapter, and its weight."
    table: Table = (["client", "weight", "loss of local alone", "loss of federated alone", "lowest loss"], body)
    return [figure(chart, f"{strategy}: along the line between both ends, seed {run.seed}", said, table, 420)]


def _weights(run: FinishedRun) -> dict[str, float]:
    """The last weight of each client that has one."""
    return {
        client: float(row["weight"])
        for r in run.rounds
        for client, row in (r.get("settled", {}).get(round_record.WEIGHTS) or {}).items()
        if isinstance(row, Mapping) and isinstance(row.get("weight"), int | float)
    }


def _replacements(strategy: str, run: FinishedRun) -> list[str]:
    """A figure of how many clients' groups were replaced in each round, by task."""
    import plotly.graph_objects as go

    found = _by_round(run, round_record.REPLACEMENTS)
    tasks = sorted({task for _, clients in found for shown in clients.values() for task in shown})
    if not tasks:
        return []
    chart, body = go.Figure(), []
    for place, task in enumerate(tasks):
        counts = [sum(bool(c.get(task, {}).get("replaced")) for c in clients.values()) for _, clients in found]
        chart.add_bar(
            x=[number for number, _ in found],
            y=counts,
            name=task or "all",
            marker={"color": COLOURS[place % len(COLOURS)]},
        )
    for number, clients in found:
        for client, shown in clients.items():
            for task, outcome in shown.items():
                losses = [f"{outcome[key]:.4f}" if key in outcome else "-" for key in ("source_loss", "target_loss")]
                body.append([number, client, task or "all", "yes" if outcome.get("replaced") else "no", *losses])
    chart.update_layout(barmode="stack", xaxis_title="round", yaxis_title="replacements", showlegend=True)
    chart.update_xaxes(dtick=1 if len(found) <= 12 else None)
    chart.update_yaxes(rangemode="tozero", tickformat="d")
    said = "How many clients took over a task's groups of the federated adapter in each round, stacked by task."
    table: Table = (["round", "client", "task", "replaced", "federated loss", "personal loss"], body)
    return [figure(chart, f"{strategy}: replacements by round, seed {run.seed}", said, table, 340)]
