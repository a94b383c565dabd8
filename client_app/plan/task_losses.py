"""Training losses of each task over one train step, for the report."""

from __future__ import annotations

from collections.abc import Mapping

from proto.fedalloy.v1 import report_pb2


class TaskLosses:
    """Training losses of each task over one train step."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches = 0
        self.examples: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def add(self, found: Mapping[str, tuple[int, float]]) -> None:
        """Add one batch: number of examples and mean loss by task."""
        self.batches += 1
        for task, (examples, loss) in found.items():
            self.examples[task] = self.examples.get(task, 0) + examples
            self.sums[task] = self.sums.get(task, 0.0) + examples * loss

    def to_proto(self) -> dict[str, report_pb2.TaskLoss]:
        """For the report: over a task's examples, and as (1 / batches) sum (examples / batch size) loss."""
        return {
            task: report_pb2.TaskLoss(
                examples=count,
                mean=self.sums[task] / count,
                batch_share=self.sums[task] / (self.batch_size * self.batches),
            )
            for task, count in self.examples.items()
        }
