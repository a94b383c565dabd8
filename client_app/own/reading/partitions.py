"""One data set divided among simulated clients, by the partitioners of flwr-datasets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from client_app.own.reading.readers import Table
from client_app.own.reading.text_files import ChosenRows, DataError
from client_app.settings import DataSettings

SEED = 42
"""Partitions do not depend on the run's seed: one run must not train on what another tests on."""


def partition(table: Table, settings: DataSettings, partition_id: int, num_partitions: int) -> Table:
    """The rows of one client; existing splits stay as they are.

    ``iid``; ``dirichlet``: shares of each value of a column follow a Dirichlet distribution; ``pathological``: a client
    has a few values only; ``natural``: one client for each value (a writer, a site), in order of first appearance.

    Args:
        table: all rows; every client reads the same.
        settings: the partitioner with its column (the label's by default), alpha, and number of classes.
        partition_id: this client, from 0.
        num_partitions: how many clients there are.

    Raises:
        DataError: no such partitioner or column, or this client would get nothing.
    """
    import datasets

    column = settings.partition_by or settings.label_column
    what = f"{settings.partitioner} partition {partition_id} of {num_partitions} by {column!r}"
    partitioner = _partitioner(settings, num_partitions)
    iid = settings.partitioner == "iid"
    values = ["" for _ in table.rows] if iid else _values(table, column)
    try:
        everything = datasets.Dataset.from_dict({"index": list(range(len(table.rows))), "value": values})
        partitioner.dataset = everything.shuffle(seed=SEED) if iid else everything
        chosen = sorted(partitioner.load_partition(partition_id)["index"])
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{what} of {len(table.rows)} rows cannot be made: {error}") from None
    if not chosen:
        raise DataError(f"{what} is empty")
    return replace(table, rows=ChosenRows.of(table.rows, chosen), splits=[table.splits[i] for i in chosen])


def _partitioner(settings: DataSettings, num_partitions: int) -> Any:
    """The partitioner of flwr-datasets; if it needs a column, that is ``value``."""
    try:
        from flwr_datasets import partitioner as partitioners
    except ImportError:
        raise DataError("a partitioner needs flwr-datasets: pip install 'fedalloy[simulation]'") from None

    makers: dict[str, Callable[[], Any]] = {
        "iid": lambda: partitioners.IidPartitioner(num_partitions=num_partitions),
        "dirichlet": lambda: partitioners.DirichletPartitioner(
            num_partitions=num_partitions,
            partition_by="value",
            alpha=settings.partition_alpha,
            min_partition_size=1,
            seed=SEED,
        ),
        "pathological": lambda: partitioners.PathologicalPartitioner(
            num_partitions=num_partitions,
            partition_by="value",
            num_classes_per_partition=settings.partition_classes,
            class_assignment_mode="deterministic",
            seed=SEED,
        ),
        "natural": lambda: partitioners.NaturalIdPartitioner(partition_by="value"),
    }
    if settings.partitioner not in makers:
        raise DataError(f"partitioner = {settings.partitioner!r}, expected one of {', '.join(makers)}")
    return makers[settings.partitioner]()


def _values(table: Table, column: str) -> list[str]:
    """Every row's value in the column by which the data are divided."""
    values = []
    for row in table.rows:
        if row.values.get(column) is None:
            raise DataError(f"{row.place}: no value in column {column!r}, by which the data are divided")
        values.append(str(row.values[column]))
    return values
