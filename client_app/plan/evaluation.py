"""Metrics of the active mixture by kind of task: from logits, and from texts that the model writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import MASK, ClientData, Dataset, MixedDataset
from client_app.data.targets import IGNORED, target_mask
from client_app.kinds import Kind, kind_of
from client_app.kinds.scores.texts import Written, text_metrics
from client_app.model.forward.target_losses import AtTargets, AtTargetsWhole
from client_app.model.personal import PersonalModel
from client_app.plan import likeness
from client_app.plan.ensembles import forward_of
from client_app.plan.mixtures import activate
from client_app.plan.progress import tick
from client_app.plan.training import TrainingError, autocast, logits_of
from client_app.plan.workbench import Workbench
from proto.fedalloy.v1 import plan_pb2, report_pb2

_MAX_EXPONENT = 700.0


def carry_out(bench: Workbench, step: plan_pb2.EvaluateStep) -> report_pb2.EvaluateResult:
    """Evaluate a mixture or an ensemble on a split, and record its losses where the plan says so.

    Raises:
        TrainingError: the split has no example.
    """
    started = time.monotonic()
    if bench.private is not None and not bench.private.privacy.tells(step.split):
        return report_pb2.EvaluateResult(label=step.label, split=step.split, withheld=True)
    data, forward = bench.shown(step.split, step.examples), None
    if step.mixture.shares:
        forward = forward_of(bench, step.mixture)
    elif step.mixture.likeness:
        forward = likeness.forward_of(bench, step.mixture)
    else:
        activate(bench, step.mixture)
    metrics = evaluate(bench.model, data, bench.data, forward, loss_only=step.loss_only)
    if step.record:
        names = {task: f"{task}/loss" if bench.data.tasks else "loss" for task in bench.data.each_task}
        losses = {task: metrics[name] for task, name in names.items() if math.isfinite(metrics.get(name, math.inf))}
        bench.slots.losses[step.record] = losses
    return report_pb2.EvaluateResult(
        label=step.label,
        split=step.split,
        examples=len(data),
        metrics=metrics,
        seconds=time.monotonic() - started,
    )


@torch.no_grad()
def evaluate(
    model: PersonalModel,
    data: Dataset,
    client: ClientData | None = None,
    forward: Callable[[Dataset], Tensor] | None = None,
    *,
    loss_only: bool = False,
) -> dict[str, float]:
    """Metrics of a split.

    The mean ``loss``, and the scores of the kind of task. Generation: ``loss`` (mean over all target tokens) and
    ``perplexity``, its exponential; ``accuracy`` if the client has ``choices``; if it asks for texts, ``exact_match``,
    ``rouge_l`` and ``chrf`` over at most ``generate_examples`` examples (``answers`` says how many) with at most
    ``max_new_tokens`` new tokens each.

    ``forward`` gives the logits of a batch if they are not simply the model's. With it, or with ``loss_only``, no texts
    are written.

    Raises:
        TrainingError: the split has no example.
    """
    if len(data) == 0:
        raise TrainingError("nothing to evaluate: the split has no example")
    if isinstance(data, MixedDataset):
        assert client is not None
        of_tasks = {
            name: evaluate(model, part, client.tasks[name], loss_only=loss_only)
            for name, part in data.parts.items()
            if len(part)
        }
        return _over_tasks(of_tasks)
    model.module.eval()
    kind = kind_of(data.kind)
    if not kind.generative:
        return _scored(model, data, client, forward, loss_only=loss_only)
    metrics = _written(model, data, client, forward)
    writes = client is not None and client.decode is not None and client.generate_examples and forward is None
    if client is not None and writes and not loss_only:
        chosen = data.subset(torch.arange(min(client.generate_examples, len(data))))
        texts = write(model, chosen, client, _batch_size(model, kind))
        metrics |= text_metrics(texts) | {"answers": float(len(chosen))}
    return metrics


def _written(
    model: PersonalModel, data: Dataset, client: ClientData | None, forward: Callable[[Dataset], Tensor] | None
) -> dict[str, float]:
    """Loss over all target tokens, perplexity, and the accuracy among ``choices``."""
    loss, correct, count = 0.0, 0, 0
    for batch, labels in _batches(model, data):
        with autocast(model.device):
            said = _at_targets(model, batch, labels, forward)
            loss += float(said.losses().double().sum())
            count += len(said.tokens)
            if client is not None and client.choices:
                correct += likeliest_of(said.logits(first_targets(labels)), labels, client.choices)
    metrics = {"loss": loss / max(count, 1)}
    if client is not None and client.choices:
        metrics["accuracy"] = correct / len(data)
    metrics["perplexity"] = math.exp(min(metrics["loss"], _MAX_EXPONENT))
    return metrics


def _scored(
    model: PersonalModel,
    data: Dataset,
    client: ClientData | None,
    forward: Callable[[Dataset], Tensor] | None,
    *,
    loss_only: bool,
) -> dict[str, float]:
    """Loss and scores of a kind whose outputs are compared with labels."""
    kind = kind_of(data.kind)
    loss, count = 0.0, 0
    kept: list[Any] = []
    for batch, labels in _batches(model, data):
        with autocast(model.device):
            logits = (forward or partial(logits_of, model))(batch).float()
        total, losses = kind.summed_loss(logits, labels)
        loss, count = loss + total, count + losses
        kept.append(kind.keep(logits, labels, batch, client))
    whole = kind.whole_loss(kept)
    metrics = {"loss": loss / max(count, 1) if whole is None else whole}
    return metrics | kind.metrics(kept, client, loss_only=loss_only)


def _batch_size(model: PersonalModel, kind: Kind) -> int:
    return min(kind.evaluation_batch, model.micro_batch or kind.evaluation_batch)


def _batches(model: PersonalModel, data: Dataset) -> Iterator[tuple[Dataset, Tensor]]:
    """Batches with their labels on the model's device."""
    size = _batch_size(model, kind_of(data.kind))
    for done, indices in enumerate(torch.split(_by_length(data), size)):
        tick("evaluate", done * size, len(data))
        batch = data.batch(indices)
        yield batch, batch.labels.to(model.device)


def _by_length(data: Dataset) -> Tensor:
    """The order of examples in which batches need the least padding, longest first: too large a batch fails early."""
    if data.lengths is None:
        return torch.arange(len(data))
    return torch.argsort(data.lengths, descending=True, stable=True)


def _over_tasks(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    metrics = {f"{task}/{name}": value for task, values in found.items() for name, value in values.items()}
    for name in ("loss", "accuracy"):
        values = [values[name] for values in found.values() if name in values]
        if values:
            metrics[name] = sum(values) / len(values)
    return metrics


def _at_targets(
    model: PersonalModel, batch: Dataset, labels: Tensor, forward: Callable[[Dataset], Tensor] | None
) -> AtTargets:
    if forward is None:
        return model.at_targets(model.inputs(batch.inputs), labels, batch.task)
    return AtTargetsWhole(labels[:, 1:][target_mask(labels)], forward(batch))


def first_targets(labels: Tensor) -> Tensor:
    """The position of each row's first target ``[b]`` among all n targets of ``labels [b, L]``, row by row."""
    counts = target_mask(labels).sum(dim=1)
    return counts.cumsum(dim=0) - counts


def likeliest_of(logits: Tensor, labels: Tensor, choices: Sequence[int]) -> int:
    """Number of right answers if the model chooses among the first tokens ``choices``.

    Args:
        logits: ``[b, V]`` of each row's first target.
        labels: ``[b, L]``, each row with one answer.
        choices: tokens, each the beginning of one possible answer.
    """
    offered = torch.tensor(list(choices), device=labels.device)
    first = labels[:, 1:][target_mask(labels)][first_targets(labels)]
    return int((offered[logits[:, offered].argmax(dim=1)] == first).sum())


@torch.no_grad()
def write(model: PersonalModel, data: Dataset, client: ClientData, batch_size: int) -> Written:
    """Let the model write each example's last answer, greedily, with at most ``client.max_new_tokens`` tokens."""
    assert client.decode is not None
    texts, references = [], []
    for done, indices in enumerate(torch.split(_by_length(data), batch_size)):
        tick("generate", done * batch_size, len(data))
        batch = data.batch(indices)
        width, starts, stops = _last_answers(batch)
        prompts = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(prompts)
        for row, start in enumerate(starts):  # moved to the right end, where generation begins
            prompts[row, width - start :] = batch.inputs["input_ids"][row, :start]
            mask[row, width - start :] = 1
            references.append(client.decode(batch.labels[row, start : stops[row]]))
        others = {k: v for k, v in batch.inputs.items() if k not in ("input_ids", MASK)}
        for name in [n for n, v in others.items() if n not in batch.rows and v.shape == batch.inputs[MASK].shape]:
            told = torch.zeros_like(prompts)
            for row, start in enumerate(starts):
                told[row, width - start :] = others[name][row, :start]
            others[name] = told
        rest: dict[str, Any] = dict(model.inputs(others))
        module: Any = model.module
        ends = _ends_of(module)
        if batch.task:
            rest["task"] = batch.task
        with autocast(model.device):
            found = module.generate(
                input_ids=prompts.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=client.max_new_tokens,
                do_sample=False,
                use_cache=True,
                **rest,
            )
        texts += [client.decode(_cut(row[width:], ends)) for row in found.cpu()]
    return Written(texts, references)


def _ends_of(module: Any) -> frozenset[int]:
    """Tokens that end a text: those of the model's own settings, or of a model for several tasks."""
    known = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    found = getattr(module, "ends", ())[:1] if known is None else known if isinstance(known, list) else [known]
    return frozenset(found)


def _cut(row: Tensor, ends: frozenset[int]) -> Tensor:
    """A text up to its own end token; what comes after it, up to the longest of the batch, may be any token."""
    first = next((place for place, token in enumerate(row.tolist()) if token in ends), len(row))
    return row[: first + 1]


def _last_answers(batch: Dataset) -> tuple[int, list[int], list[int]]:
    """The longest prompt's length, and where each example's last run of targets begins and ends."""
    starts, ends = [], []
    for labels in batch.labels:
        targets = (labels != IGNORED).nonzero().flatten().tolist()
        start = targets[-1]
        while start > 1 and int(labels[start - 1]) != IGNORED:
            start -= 1
        starts.append(start)
        ends.append(targets[-1] + 1)
    return max(starts), starts, ends
