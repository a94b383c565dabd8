"""Figures of the clients' scores: means and worst clients, gains and losses, costs, and curves."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from fedalloy_adapters.wire.codec import Encoding
from server_app.tools.compare.figures import COLOURS, DASHES, OUTLINED, ROLES, Table, figure, heights, ticks
from server_app.tools.compare.statistics import COSTS, Comparison, Line, Observation, Scores, gains_over, number

SHOWN = 6
"""This many of the best strategies show their curves at first; the others appear after a click on their names."""
PLACES = ("top center", "bottom center", "middle right", "middle left")
"""Places of a label at its point, the best first."""
LABELLED = 12
"""With at most this many points, every point has a label."""


def means(found: Comparison) -> str:
    """A figure of the mean and the worst decile, with intervals."""
    import plotly.graph_objects as go

    lines = found.ranked()
    names = [line.label for line in lines]
    chart = go.Figure()
    for label, intervals, symbol, colour in (
        ("mean", [line.mean for line in lines], "circle", COLOURS[0]),
        ("worst decile", [line.worst for line in lines], "triangle-down", COLOURS[1]),
    ):
        chart.add_scatter(
            x=[i.value for i in intervals],
            y=names,
            mode="markers",
            name=label,
            marker={"size": 9, "symbol": symbol, "color": colour},
            error_x={
                "array": [i.high - i.value for i in intervals],
                "arrayminus": [i.value - i.low for i in intervals],
                "thickness": 1.2,
            },
        )
    chart.update_yaxes(autorange="reversed")
    chart.update_xaxes(title=found.metric)
    body = [[a.strategy, *(number(v, 3) for i in (a.mean, a.worst) for v in (i.value, i.low, i.high))] for a in lines]
    heads = ["strategy", "mean", "low", "high", "worst decile", "low", "high"]
    said = (
        f"Mean and worst-decile {found.metric} of the clients with 95 % intervals, a row for each strategy, best first."
    )
    return figure(chart, f"Clients' {found.metric} at the end", said, (heads, body), heights(len(names)))


def differences(found: Comparison) -> list[str]:
    """For each reference: every client's difference with the mean's interval, and a map of who gains and loses."""
    references = list(found.lines[0].against) if found.lines else []
    return [text for name in references for text in (_spread(found, name), _map(found, name))]


def costs(found: Comparison) -> list[str]:
    """The Pareto pictures: the metric against bytes and against seconds."""
    level = "on the wire" if found.level == "wire" else "of serialised messages"
    axes = {"bytes": f"MB up and down, {level}", "seconds": "seconds, sum of each round's slowest client"}
    return [_cost(found, what, axes[what], cost) for what, cost in COSTS.items()]


def by_encoding(found: Comparison) -> list[str]:
    """The metric against bytes, a line through the encodings of each strategy; nothing if none were compared."""
    import plotly.graph_objects as go

    cost = COSTS["bytes"]
    sides: dict[str, list[tuple[str, Line]]] = {}
    for line in found.lines:
        strategy, _, encoding = line.strategy.rpartition("-")
        if strategy and encoding in list(Encoding) and not math.isnan(line.mean.value):
            sides.setdefault(strategy, []).append((encoding, line))
    if not sides:
        return []
    chart, body = go.Figure(), []
    for place, (strategy, points) in enumerate(sides.items()):
        points.sort(key=lambda point: cost(point[1]))
        means = [line.mean for _, line in points]
        chart.add_scatter(
            x=[cost(line) for _, line in points], y=[mean.value for mean in means], name=strategy,
            text=[encoding for encoding, _ in points], mode="lines+markers+text", textposition=PLACES[place % 2],
            marker={"size": 9, "color": COLOURS[place % len(COLOURS)]}, cliponaxis=False,
            error_y={
                "array": [mean.high - mean.value for mean in means],
                "arrayminus": [mean.value - mean.low for mean in means],
                "thickness": 1,
            },
        )  # fmt: skip
        rows = [(f"{line.mean.value:.3f}", f"{line.mean.low:.3f}", f"{line.mean.high:.3f}") for _, line in points]
        body += [[strategy, name, f"{cost(line):.3f}", *row] for (name, line), row in zip(points, rows, strict=True)]
    spread = [cost(line) for points in sides.values() for _, line in points]
    if min(spread) > 0:
        marks = ticks(min(spread), max(spread))
        chart.update_xaxes(type="log", tickvals=marks, ticktext=[f"{mark:g}" for mark in marks])
    axis = f"MB up and down, {'on the wire' if found.level == 'wire' else 'of serialised messages'}"
    chart.update_layout(xaxis_title=axis, yaxis_title=f"mean {found.metric}")
    said = (
        f"Mean {found.metric} with its 95 % interval against bytes, a line for each strategy and on it a point for "
        "each encoding. Where a line is level, the smaller encoding costs nothing that can be seen."
    )
    table: Table = (["strategy", "encoding", axis, f"mean {found.metric}", "low", "high"], body)
    return [figure(chart, f"{found.metric.capitalize()} against bytes, by encoding", said, table, 460)]


def curves(found: Comparison, rows: Sequence[Observation]) -> str:
    """A figure of the mean over the clients' models after every round."""
    import plotly.graph_objects as go

    chart, body = go.Figure(), []
    plain = 0
    for place, line in enumerate(found.ranked()):
        by_round: dict[int, list[float]] = {}
        for row in rows:
            if row.strategy == line.strategy and found.metric in row.metrics:
                by_round.setdefault(row.round, []).append(row.metrics[found.metric])
        rounds = sorted(by_round)
        scores = [sum(by_round[r]) / len(by_round[r]) for r in rounds]
        plain += not line.role
        chart.add_scatter(
            # These are the models that rounds begin with; the last point is the delivered one.
            x=[r - 1 for r in rounds],
            y=scores,
            mode="lines+markers",
            name=line.label,
            line={"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]},
            visible=True if line.role or plain <= SHOWN else "legendonly",
        )
        body.append([line.strategy, " ".join(f"{value:.3f}" for value in scores)])
    chart.update_layout(xaxis_title="rounds done", yaxis_title=f"mean {found.metric}")
    chart.update_xaxes(dtick=1 if max((row.round for row in rows), default=0) <= LABELLED else None)
    said = f"Mean {found.metric} of the clients' models after every round, a line for each strategy."
    note = "Names in grey are hidden; a click on a name shows or hides its line." if plain > SHOWN else ""
    table: Table = (["strategy", "after 0, 1, 2 ... rounds"], body)
    return figure(chart, "Learning curves", said, table, 480 + 8 * len(body), note)


def _others(found: Comparison, reference: str) -> list[tuple[Line, Scores]]:
    base: Scores = next((line.scores for line in found.lines if line.strategy == reference), {})
    gains = [(line, gains_over(line.scores, base, found.sign)) for line in found.ranked() if line.strategy != reference]
    return [(line, found) for line, found in gains if found]


def _spread(found: Comparison, reference: str) -> str:
    import plotly.graph_objects as go

    chart, body = go.Figure(), []
    shown = _others(found, reference)
    points = [(line.label, gain, f"{c}, seed {s}") for line, gains in shown for (s, c), gain in gains.items()]
    chart.add_scatter(
        x=[gain for _, gain, _ in points], y=[name for name, _, _ in points], text=[who for _, _, who in points],
        mode="markers", name="a client and seed", marker={"size": 7, "color": COLOURS[5], "opacity": 0.6},
    )  # fmt: skip
    paired = [(line, line.against[reference]) for line, _ in shown]
    chart.add_scatter(
        x=[p.mean.value for _, p in paired], y=[line.label for line, _ in paired], mode="markers", name="mean, 95 %",
        marker={"size": 11, "symbol": "diamond", "color": COLOURS[1]},
        error_x={
            "array": [p.mean.high - p.mean.value for _, p in paired],
            "arrayminus": [p.mean.value - p.mean.low for _, p in paired],
        },
    )  # fmt: skip
    chart.update_yaxes(autorange="reversed")
    chart.update_xaxes(title=f"difference in {found.metric}; right of 0 is better")
    chart.add_vline(x=0, line_width=1, line_color="#8a8f98")
    for line, p in paired:
        body.append([line.strategy, *(f"{v:+.3f}" for v in (p.mean.value, p.mean.low, p.mean.high)), p.better, p.worse])
    said = f"Difference in {found.metric} to {reference} of every client and seed, and its mean: right of 0 it gains."
    table: Table = (["strategy", "mean", "low", "high", "better", "worse"], body)
    return figure(chart, f"Paired differences against {reference}", said, table, heights(len(shown)))


def _map(found: Comparison, reference: str) -> str:
    import plotly.graph_objects as go

    shown = _others(found, reference)
    clients = sorted({client for _, gains in shown for _, client in gains}, key=_natural)
    cells = []
    for _, gains in shown:
        by_client = defaultdict[str, list[float]](list)
        for (_, client), gain in gains.items():
            by_client[client].append(gain)
        cells.append([sum(by_client[c]) / len(by_client[c]) if c in by_client else math.nan for c in clients])
    bound = max((abs(value) for row in cells for value in row if not math.isnan(value)), default=0) or 1.0
    chart = go.Figure()
    chart.add_heatmap(
        z=cells, x=clients, y=[line.label for line, _ in shown], zmin=-bound, zmax=bound, colorscale="RdBu",
        textfont=OUTLINED,
        text=[[f"{value:+.2f}" for value in row] for row in cells],
        texttemplate="%{text}" if len(clients) <= LABELLED else None, colorbar={"thickness": 12}, xgap=1, ygap=1,
    )  # fmt: skip
    chart.update_yaxes(autorange="reversed")
    body = [[line.strategy, *(f"{value:+.3f}" for value in row)] for (line, _), row in zip(shown, cells, strict=True)]
    said = f"Each client's difference in {found.metric} to {reference}, mean over seeds: blue gains, red loses."
    table: Table = (["strategy", *clients], body)
    return figure(chart, f"Who gains and who loses against {reference}", said, table, heights(len(shown)))


def _natural(client: str) -> tuple[str, int]:
    """A sort key that puts client-10 after client-9."""
    name = client.rstrip("0123456789")
    return name, int(client[len(name) :] or -1)


def _places(points: Sequence[tuple[str, float, float]]) -> dict[str, str]:
    """The place of each point's label (name, cost, metric), so that close points have theirs on different sides."""
    if not points:
        return {}
    smallest = min((x for _, x, _ in points if x > 0), default=1.0)
    put = [(name, math.log(max(x, smallest)), y) for name, x, y in points]
    width, height = (max(axis) - min(axis) or 1.0 for axis in ([x for _, x, _ in put], [y for _, _, y in put]))
    found: dict[str, str] = {}
    for name, x, y in put:
        near = [other for other, a, b in put if abs(a - x) < 0.2 * width and abs(b - y) < 0.06 * height]
        taken = {found[other] for other in near if other in found}
        found[name] = next((place for place in PLACES if place not in taken), PLACES[0])
    return found


def _cost(found: Comparison, what: str, axis: str, cost: Callable[[Line], float]) -> str:
    import plotly.graph_objects as go

    lines = [line for line in found.ranked() if not math.isnan(line.mean.value)]
    front = found.cheapest(cost)
    labelled = [line for line in lines if line in front or line.role or len(lines) <= LABELLED]
    places = _places([(line.strategy, cost(line), line.mean.value) for line in labelled])
    chart = go.Figure()
    chart.add_scatter(
        x=[cost(line) for line in front], y=[line.mean.value for line in front], mode="lines", name="Pareto front",
        line={"color": COLOURS[2], "shape": "hv", "width": 2}, hoverinfo="skip",
    )  # fmt: skip
    for role, (colour, symbol) in ROLES.items():
        own = [line for line in lines if line.role == role]
        chart.add_scatter(
            x=[cost(line) for line in own], y=[line.mean.value for line in own],
            text=[line.strategy if line.strategy in places else "" for line in own],
            hovertext=[line.strategy for line in own], mode="markers+text",
            textposition=[places.get(line.strategy, PLACES[0]) for line in own],
            name=role or "strategy", marker={"size": 10, "symbol": symbol, "color": colour}, cliponaxis=False,
        )  # fmt: skip
    spread = [cost(line) for line in lines]
    if spread and min(spread) > 0 and max(spread) > 10 * min(spread):
        marks = ticks(min(spread), max(spread))
        chart.update_xaxes(type="log", tickvals=marks, ticktext=[f"{mark:g}" for mark in marks])
    chart.update_layout(xaxis_title=axis, yaxis_title=f"mean {found.metric}")
    chart.update_xaxes(showline=True, linecolor="#8a8f98")
    body = [
        [line.strategy, f"{cost(line):.3f}", f"{line.mean.value:.3f}", "yes" if line in front else ""] for line in lines
    ]
    said = (
        f"Mean {found.metric} against {what}, a point for each strategy. The line is the Pareto front: strategies that "
        f"no other one (controls apart) beats at the same or lower cost: {', '.join(line.strategy for line in front)}."
    )
    table: Table = (["strategy", axis, f"mean {found.metric}", "on the front"], body)
    return figure(chart, f"{found.metric.capitalize()} against {what}", said, table, 480)
