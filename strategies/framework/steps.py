"""Plan steps, written the way a strategy reads: ``train(mixture("global"), slots=["global"], ...)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedalloy_adapters.algebra import Coefficient
from fedalloy_adapters.factors import Factor, factor_to_proto
from fedalloy_adapters.wire.codec import Encoding, encoding_to_proto
from proto.fedalloy.v1 import plan_pb2
from strategies.framework.training import OPTIMIZERS, SCHEDULES
from strategies.framework.training import Training as Training

Step = plan_pb2.Step
Draw = plan_pb2.Draw


def mixture(*slots: str, coefficients: Sequence[Coefficient] | None = None) -> plan_pb2.Mixture:
    """The base model plus coefficient times slot, summed; coefficients default to 1."""
    terms = []
    for slot, coefficient in zip(slots, coefficients or [1.0] * len(slots), strict=True):
        if isinstance(coefficient, Mapping):
            terms.append(plan_pb2.Term(slot=slot, per_module=plan_pb2.ModuleCoefficients(values=dict(coefficient))))
        else:
            terms.append(plan_pb2.Term(slot=slot, scalar=coefficient))
    return plan_pb2.Mixture(terms=terms)


def ensemble(slots: Sequence[str], shares: str) -> plan_pb2.Mixture:
    """The slots' predicted probabilities, each slot alone, averaged with the shares in the slot ``shares``."""
    return plan_pb2.Mixture(terms=mixture(*slots).terms, shares=shares)


def attribute(slots: Sequence[str], shares: str, *, split: str = "train") -> Step:
    """Divide every example of a split among ``slots``; the slot ``shares`` then holds the mean shares."""
    return Step(attribute=plan_pb2.AttributeStep(slots=list(slots), shares=shares, split=split))


def density(
    slots: Sequence[str], shares: str, gaussians: Sequence[plan_pb2.Gaussian], *, dimensions: int, seed: int
) -> Step:
    """Divide examples among slots and Gaussians over their features; the shares then depend on the input."""
    step = plan_pb2.DensityStep(slots=slots, shares=shares, split="train", dimensions=dimensions, seed=seed)
    step.gaussians.extend(gaussians)
    return Step(density=step)


def likeness(slot: str, source: str, *, samples: int, most: float) -> Step:
    """``slot`` holds how some training examples look with ``source``, and the share of one that looks the same."""
    return Step(likeness=plan_pb2.LikenessStep(slot=slot, source=source, split="train", samples=samples, most=most))


def by_likeness(near: str, far: str, slot: str) -> plan_pb2.Mixture:
    """``u near + (1 - u) far`` with a u for each example, by the :func:`likeness` in ``slot``."""
    return plan_pb2.Mixture(terms=mixture(near, far).terms, likeness=slot)


def gated(first: str, second: str, gates: str) -> plan_pb2.Mixture:
    """``sigmoid(g) first + (1 - sigmoid(g)) second`` for each module, with the gates g of the slot ``gates``."""
    return plan_pb2.Mixture(
        terms=[
            plan_pb2.Term(slot=first, gate=plan_pb2.Gate(slot=gates)),
            plan_pb2.Term(slot=second, gate=plan_pb2.Gate(slot=gates, complement=True)),
        ]
    )


def each_gated(gates: Mapping[str, str]) -> plan_pb2.Mixture:
    """``sum of sigmoid(g) slot`` for each module; ``gates`` maps each slot to the slot that holds its gates g."""
    return plan_pb2.Mixture(terms=[plan_pb2.Term(slot=s, gate=plan_pb2.Gate(slot=g)) for s, g in gates.items()])


def part(factors: Iterable[Factor] = (), modules: Iterable[str] = (), *, without_basis: bool = False) -> plan_pb2.Part:
    """The tensors with these factors and modules; an empty list does not restrict."""
    numbers = [factor_to_proto(factor) for factor in factors]
    return plan_pb2.Part(factors=numbers, modules=list(modules), without_basis=without_basis)


def initialise(slot: str, seed: int, *, keep_existing: bool = True, keep_own_heads: bool = False) -> Step:
    """Create ``slot`` from a seed; ``keep_own_heads`` keeps those of the old slot's heads that only the client has."""
    step = plan_pb2.InitialiseStep(slot=slot, seed=seed, keep_existing=keep_existing, keep_own_heads=keep_own_heads)
    return Step(initialise=step)


def initialise_gates(slot: str, kind: str) -> Step:
    """Create a slot of gates at one half, ``"scalar"``, ``"input"`` (by example) or ``"token"``, unless it exists."""
    name = f"GATE_KIND_{kind.upper()}"
    return Step(initialise=plan_pb2.InitialiseStep(slot=slot, gate=name, keep_existing=True))


def copy(slot: str, source: str) -> Step:
    """``slot`` becomes a copy of ``source``; at the start of a plan, before received adapters are installed."""
    return Step(initialise=plan_pb2.InitialiseStep(slot=slot, copy_of=source))


def own_heads(target: str, mix: plan_pb2.Mixture) -> Step:
    """If the client's labels are its own, give ``target`` the heads of ``mix``; its adapter stays as it is."""
    step = plan_pb2.MergeStep(target=target, mixture=mix, space=plan_pb2.MERGE_SPACE_DELTA, own_heads_only=True)
    return Step(merge=step)


def train(
    training: Training,
    mix: plan_pb2.Mixture,
    slots: Sequence[str],
    *,
    factors: Iterable[Factor] = (),
    modules: Iterable[str] = (),
    proximal: tuple[str, float] | None = None,
    steps: int | None = None,
    fold: tuple[int, int] | None = None,
    without_basis: bool = False,
    rate_scales: Mapping[Factor, float] | None = None,
    learning_rate: float | None = None,
    draw: Draw | None = None,
    draw_after_replace: Draw | None = None,
    record: str = "",
    record_batch_share: bool = False,
    keep_on_divergence: bool = False,
    attributed_to: str = "",
    split: str = "train",
    sharpness_radius: float = 0.0,
) -> Step:
    """Optimise ``slots`` inside ``mix``; ``proximal = (slot, mu)`` adds ``mu/2 ||trained - slot||^2``.

    ``fold = (i, n)`` trains on part i of n disjoint parts of the training split; ``rate_scales`` multiplies the
    learning rate of tensors with a factor. ``draw`` decides batches and dropout; ``draw_after_replace`` takes its place
    if a replace step has copied something. The tasks' losses are kept as ``record``, for such steps. ``attributed_to``
    weighs each example by the share of it that :func:`attribute` gave to that slot. With a ``sharpness_radius``, steps
    are sharpness-aware and take twice as long. Without ``steps``, the run decides their number: under ``local-epochs``
    they are counted when the client's message is made (:func:`strategies.framework.training.counted`).
    """
    step = plan_pb2.TrainStep(
        mixture=mix,
        slots=list(slots),
        part=part(factors, modules, without_basis=without_basis),
        steps=steps if steps is not None else 0 if training.local_epochs else training.local_steps,
        batch_size=training.batch_size,
        split=split,
        draw=draw,
        draw_after_replace=draw_after_replace,
        record=record,
        record_batch_share=record_batch_share,
        keep_on_divergence=keep_on_divergence,
        attributed_to=attributed_to,
        sharpness_radius=sharpness_radius,
        **_optimising(training, learning_rate, rate_scales or {}),
    )
    if proximal is not None and proximal[1] > 0:
        step.proximal.CopyFrom(plan_pb2.Proximal(slot=proximal[0], mu=proximal[1]))
    if fold is not None:
        step.fold.CopyFrom(plan_pb2.Fold(index=fold[0], count=fold[1]))
    return Step(train=step)


def _optimising(training: Training, rate: float | None, scales: Mapping[Factor, float]) -> dict[str, Any]:
    """The fields of a train step that say how it optimises."""
    return {
        "learning_rate": training.learning_rate if rate is None else rate,
        "rate_scales": [plan_pb2.RateScale(factor=factor_to_proto(f), scale=scale) for f, scale in scales.items()],
        "schedule": SCHEDULES[training.schedule],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optimizer": OPTIMIZERS[training.optimizer],
        "momentum": training.momentum,
        "keep_optimizer": training.optimizer_state == "keep",
    }


def merge(target: str, mix: plan_pb2.Mixture, *, space: str = "delta", truncate_rank: int = 0) -> Step:
    """``target <- mix`` in ``"delta"`` or ``"factor"`` space."""
    name = f"MERGE_SPACE_{space.upper()}"
    return Step(merge=plan_pb2.MergeStep(target=target, mixture=mix, space=name, truncate_rank=truncate_rank))


def evaluate(
    training: Training,
    mix: plan_pb2.Mixture,
    label: str = "personal",
    split: str | None = None,
    record: str = "",
    *,
    loss_only: bool = False,
) -> Step:
    """Metrics of ``mix`` on a split, reported under ``label``; losses of tasks are kept as ``record``.

    ``loss_only`` spares the writing of texts, for decisions by the loss alone.
    """
    step = plan_pb2.EvaluateStep(
        label=label, mixture=mix, split=split or training.evaluate_split, record=record, loss_only=loss_only
    )
    return Step(evaluate=step)


def replace(
    target: str,
    source: str,
    margins: Mapping[str, float],
    *,
    records: tuple[str, str],
    relative: bool = False,
    exclusive: bool = False,
) -> Step:
    """Copy a task's groups from ``source`` where its loss plus the margin is below that of ``target``.

    Args:
        target: the slot that is changed.
        source: the slot that is copied from.
        margins: by task; may be infinite.
        records: names of the recorded losses of ``target`` and of ``source``.
        relative: margins are shares of the source's loss.
        exclusive: leave a group alone if another task uses it and that task's rule does not fire.
    """
    rules = [plan_pb2.ReplaceRule(task=task, margin=margin, relative=relative) for task, margin in margins.items()]
    step = plan_pb2.ReplaceStep(
        target=target,
        source=source,
        target_record=records[0],
        source_record=records[1],
        rules=rules,
        exclusive=exclusive,
    )
    return Step(replace=step)


def distill(
    step: Step,
    teacher: plan_pb2.Mixture,
    weights: Mapping[str, float],
    *,
    losses: Mapping[str, str] | None = None,
    temperature: float = 1.0,
    reduction: str = "per-position-mean",
    label_weight: float = 1.0,
) -> Step:
    """The train step ``step`` with the teacher's outputs as a second target.

    Args:
        step: what is trained, and how.
        teacher: frozen; a mixture or an :func:`ensemble`.
        weights: of the distance from the teacher, by task.
        losses: ``"kl"`` (the default) or ``"mse"`` by task.
        temperature: of both softmaxes.
        reduction: ``"per-position-mean"``, or ``"first-dim"``: the sum over all positions.
        label_weight: of the labels' loss; 0: the outputs are the only target.
    """
    kinds = {"kl": plan_pb2.DISTILL_LOSS_KL, "mse": plan_pb2.DISTILL_LOSS_MSE}
    reductions = {
        "per-position-mean": plan_pb2.DISTILL_REDUCTION_POSITION_MEAN,
        "first-dim": plan_pb2.DISTILL_REDUCTION_EXAMPLE_MEAN,
    }
    tasks = [
        plan_pb2.TaskDistillation(task=task, weight=weight, loss=kinds[(losses or {}).get(task, "kl")])
        for task, weight in weights.items()
    ]
    found = plan_pb2.DistillStep(
        train=step.train, teacher=teacher, temperature=temperature, reduction=reductions[reduction], tasks=tasks
    )
    if label_weight != 1.0:
        found.label_weight = label_weight
    return Step(distill=found)


def save(mix: plan_pb2.Mixture) -> Step:
    """Keep ``mix`` as the client's personal model."""
    return Step(save=plan_pb2.SaveStep(mixture=mix))


def send(
    training: Training,
    slot: str,
    *,
    factors: Iterable[Factor] = (),
    modules: Iterable[str] = (),
    relative_to_received: bool = True,
    comes_back: bool = False,
    sums_of_squares: bool = False,
    without_basis: bool = False,
    for_newcomers: bool = False,
) -> Step:
    """Upload ``slot`` or its ``factors`` and ``modules``, encoded as the run says.

    A lossy encoding stores the difference from what the client received for this slot, and what it drops is added to
    the next upload. Pass ``relative_to_received=False`` for a slot that does not start from that, and ``comes_back`` if
    a next round starts from what is made of it: integers give way to ``fp16``, as they do to ``bf16`` for
    ``sums_of_squares``. ``for_newcomers``: it will be given to clients that never trained.
    """
    asked = Encoding(training.uplink_encoding)
    whole = asked.for_starts if comes_back else asked.whole
    encoding = asked.for_sums if sums_of_squares else asked if relative_to_received else whole
    step = plan_pb2.SendStep(
        slot=slot,
        part=part(factors, modules, without_basis=without_basis),
        encoding=encoding_to_proto(encoding),
        relative_to_received=relative_to_received and encoding.is_lossy,
        for_newcomers=for_newcomers,
    )
    return Step(send=step)


def fisher(
    first: str,
    second: str,
    *,
    split: str,
    samples: int,
    damping: float,
    more_dampings: Sequence[float] = (),
    in_delta_space: bool = False,
    keep: tuple[str, str] = ("", ""),
) -> Step:
    """Compare two slots by their diagonal Fisher information; ``keep`` names slots that hold it afterwards.

    Dampings are relative; what depends on them is reported for ``more_dampings``, too.
    """
    step = plan_pb2.FisherStep(
        first=first,
        second=second,
        split=split,
        samples=samples,
        relative_damping=damping,
        more_dampings=more_dampings,
        in_delta_space=in_delta_space,
        keep_first=keep[0],
        keep_second=keep[1],
    )
    return Step(fisher=step)


def distance(first: str, second: str) -> Step:
    """Squared distances of two slots' deltas, by module."""
    return Step(distance=plan_pb2.DistanceStep(first=first, second=second))


def precision_mixture(precisions: Mapping[str, str]) -> plan_pb2.Mixture:
    """A merge in factor space: slots, and the slots that hold the weight of each of their numbers."""
    return plan_pb2.Mixture(terms=[plan_pb2.Term(slot=slot, precision=name) for slot, name in precisions.items()])


def sketch(
    training: Training,
    slot: str,
    *,
    batches: int,
    rows: int,
    row_choice: str = "random",
    gradient: str = "exact",
    noise: float = 0.0,
    noise_on_gradients: bool = False,
    new_weight: float = 1.0,
    encoding: str = "bf16",
) -> Step:
    """Upload ``rows`` rows of the reference model's gradient on ``batches`` batches; ``slot`` averages over rounds."""
    choices = {"first": plan_pb2.SKETCH_ROWS_FIRST, "random": plan_pb2.SKETCH_ROWS_RANDOM}
    gradients = {"exact": plan_pb2.SKETCH_GRADIENT_EXACT, "diagonal": plan_pb2.SKETCH_GRADIENT_DIAGONAL}
    step = plan_pb2.SketchStep(
        slot=slot,
        split="train",
        batches=batches,
        batch_size=training.batch_size,
        gradient=gradients[gradient],
        rows=choices[row_choice],
        row_count=rows,
        noise=noise,
        noise_on_gradients=noise_on_gradients,
        new_weight=new_weight,
        encoding=encoding_to_proto(Encoding(encoding)),
    )
    return Step(sketch=step)


def select(target: str, candidates: Sequence[str], rule: str, *, split: str, samples: int = 0) -> Step:
    """``target`` becomes the ``"best"`` candidate, or moves towards those that are an ``"improvement"``."""
    rules = {"best": plan_pb2.SELECT_RULE_BEST, "improvement": plan_pb2.SELECT_RULE_IMPROVEMENT}
    step = plan_pb2.SelectStep(slots=list(candidates), target=target, rule=rules[rule], split=split, samples=samples)
    return Step(select=step)


def search(
    target: str, candidates: Sequence[str], *, split: str, samples: int, evaluations: int, penalty: float, bound: float
) -> Step:
    """``target`` becomes the best sum of coefficient times candidate that forward passes find; nothing is trained."""
    step = plan_pb2.SearchStep(
        slots=list(candidates),
        target=target,
        split=split,
        samples=samples,
        evaluations=evaluations,
        penalty=penalty,
        bound=bound,
    )
    return Step(search=step)


def gram(training: Training, slot: str, mix: plan_pb2.Mixture, *, samples: int = 0) -> Step:
    """Upload the second moments of every module's inputs, under the name ``slot``; integers give way to ``bf16``."""
    encoding = encoding_to_proto(Encoding(training.uplink_encoding).for_sums)
    step = plan_pb2.GramStep(slot=slot, mixture=mix, split="train", samples=samples, encoding=encoding)
    return Step(gram=step)
