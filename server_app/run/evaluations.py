"""How often clients evaluate during a run, and on which examples: on validation examples, if they have any.

The test split is for delivered models only: looking at it in every round would mean choosing by it.
"""

from __future__ import annotations

from dataclasses import replace

from proto.fedalloy.v1 import plan_pb2
from server_app.run.clients.held_out import SPLIT
from server_app.run.options import RunOptions
from strategies.framework.exchange import Brief, Client


def spared(brief: Brief, client: Client, round_: int, options: RunOptions) -> Brief:
    """A round's brief with the evaluations of personal models that the options ask for, and on as many examples.

    Evaluations that a strategy learns from have other labels, or are recorded at the client: they stay as they are.
    """
    steps = []
    for step in brief.steps:
        if step.WhichOneof("kind") == "evaluate" and step.evaluate.label == "personal" and not step.evaluate.record:
            if (round_ - 1) % options.evaluate_every:
                continue
            bounded = plan_pb2.Step()
            bounded.CopyFrom(step)
            bounded.evaluate.examples = options.evaluate_examples
            if client.held_out:
                bounded.evaluate.split = SPLIT
            steps.append(bounded)
        else:
            steps.append(step)
    return replace(brief, steps=steps)
