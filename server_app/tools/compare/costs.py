"""Figures of a comparison's costs: bytes by kind and direction with their reconciliation, and slowest clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from server_app.tools.compare.figures import COLOURS, OUTLINED, Table, figure, heights
from server_app.tools.compare.records import DIRECTIONS, FinishedRun
from server_app.tools.compare.statistics import WORK, Comparison, Observation

# The ledger's kinds behind each colour; `fedalloy traffic RUN` shows each kind.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "tensors": ("tensors",),
    "sketches": ("sketches",),
    "message framing": ("message framing",),
    "app bundle": ("app bundle",),
    "Flower control, gRPC, TLS": ("Flower control", "gRPC calls", "TLS records", "HTTP/2 pings", "connection setup"),
    "polling, heartbeats": ("polling, heartbeats",),
    "TCP/IP headers, acknowledgements": ("TCP/IP headers", "acknowledgements", "retransmissions"),
    "unexplained": ("unexplained",),
}
Kinds = Mapping[str, Mapping[str, float]]
"""Megabytes by strategy and kind."""


def bytes_by_kind(found: Comparison, runs: Sequence[FinishedRun]) -> list[str]:
    """A figure for each direction."""
    names = [line.strategy for line in found.lines]
    return [_direction(direction, names, _megabytes(runs, direction), runs) for direction in DIRECTIONS]


def reconciliation(runs: Sequence[FinishedRun]) -> str:
    """The unexplained share of the wire's bytes, or a note that the wire was not measured."""
    shares = [(run.unexplained, run) for run in runs if run.unexplained is not None]
    if not shares:
        return (
            "The wire was not measured: these are the bytes that Flower serialised, by what they are (compare with "
            "--cluster counts the wire)."
        )
    worst, run = max(shares, key=lambda item: item[0])
    kept = "" if len(shares) == len(runs) else f" (of the {len(shares)} of {len(runs)} runs that measured it)"
    return (
        f"Every kind is counted or measured by itself; the rest of the wire's counters is unexplained: at most "
        f"{100 * worst:.2f} % of a run's bytes in one direction ({run.strategy}, seed {run.seed}){kept}."
    )


def slowest(found: Comparison, rows: Sequence[Observation]) -> str:
    """The slowest client of every round, in the first seed."""
    import plotly.graph_objects as go

    rows = [row for row in rows if row.phase in WORK]
    own = {line.strategy: [row for row in rows if row.strategy == line.strategy] for line in found.lines}
    own = {name: [row for row in rows if row.seed == min(r.seed for r in rows)] for name, rows in own.items() if rows}
    rounds = sorted({row.round for rows in own.values() for row in rows})
    shown = {
        name: {n: max((r for r in rows if r.round == n), key=lambda r: r.seconds) for n in {r.round for r in rows}}
        for name, rows in own.items()
    }
    labels = [f"round {n}" for n in rounds]
    if rounds and all(
        row.phase == "deliver" for last in shown.values() for row in last.values() if row.round == rounds[-1]
    ):
        labels[-1] = "delivery"
    chart = go.Figure()
    chart.add_heatmap(
        z=[[last[n].seconds if n in last else None for n in rounds] for last in shown.values()],
        text=[[last[n].client if n in last else "" for n in rounds] for last in shown.values()],
        x=labels, y=list(shown), colorscale="Cividis", xgap=1, ygap=1,
        colorbar={"thickness": 12, "title": {"text": "s"}}, textfont=OUTLINED,
        texttemplate="%{text}: %{z:.1f} s" if len(rounds) <= 6 else "%{z:.1f}" if len(rounds) <= 12 else None,
        hovertemplate="%{y}, %{x}: %{text}, %{z:.2f} s<extra></extra>",
    )  # fmt: skip
    chart.update_yaxes(autorange="reversed")
    body = [
        [name, row.round, row.client, f"{row.seconds:.2f}"]
        for name, last in shown.items()
        for _, row in sorted(last.items())
    ]
    said = "The slowest client of each round and its seconds, a row for each strategy, in the first seed."
    table: Table = (["strategy", "round", "client", "seconds"], body)
    return figure(chart, "The slowest client of each round", said, table, heights(len(shown)))


def _megabytes(runs: Sequence[FinishedRun], direction: str) -> Kinds:
    """Means over seeds."""
    sums = defaultdict[str, dict[str, float]](lambda: defaultdict[str, float](float))
    counts = defaultdict[str, int](int)
    for run in runs:
        counts[run.strategy] += 1
        for kind, count in run.kinds[direction].items():
            sums[run.strategy][kind] += count / 1e6
    return {name: {kind: total / counts[name] for kind, total in kinds.items()} for name, kinds in sums.items()}


def _direction(direction: str, names: Sequence[str], found: Kinds, runs: Sequence[FinishedRun]) -> str:
    import plotly.graph_objects as go

    level = "on the wire" if any(run.unexplained is not None for run in runs) else "of serialised messages"
    chart = go.Figure()
    shown: dict[str, list[float]] = {}
    for place, (label, members) in enumerate(GROUPS.items()):
        values = [sum(found.get(name, {}).get(kind, 0.0) for kind in members) for name in names]
        if any(values):
            shown[label] = values
            chart.add_bar(y=list(names), x=values, name=label, orientation="h", marker={"color": COLOURS[place]})
    chart.update_layout(barmode="relative", xaxis_title=f"MB {direction}, {level}, all clients")
    chart.update_yaxes(autorange="reversed")
    shares: dict[str, float] = {}
    for run in runs:
        if run.unexplained is not None:
            shares[run.strategy] = max(shares.get(run.strategy, 0.0), run.unexplained)
    body = []
    for place, name in enumerate(names):
        numbers = [values[place] for values in shown.values()]
        share = shares.get(name)
        cells = [f"{number:.4f}" for number in (*numbers, sum(numbers))]
        body.append([name, *cells, "-" if share is None else f"{100 * share:.2f} %"])
    heads = ["strategy", *shown, "sum", "unexplained, either way, at most"]
    said = f"Megabytes {direction} of all clients, mean over seeds, stacked by kind, a bar for each strategy."
    title = f"Where the bytes went, {direction}"
    return figure(chart, title, said, (heads, body), heights(len(names), 190), reconciliation(runs))
