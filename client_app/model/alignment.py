r"""Alignment of Co-LoRA's frozen A and B between architectures, once, on public data; and the file that holds it.

Co-LoRA (ICLR 2026, arXiv 2506.11024): a pivot model has random A with orthonormal rows and B with orthonormal columns
at its block ends. For every other model, at the modules of the same shared names, with inputs :math:`x_t` of the
target's and :math:`x_p` of the pivot's module for the same token:

* stage A: :math:`\min_A mean (A x_t - A_p x_p)^2 + \lambda \Omega(A)`, then the polar factor of A. :math:`\Omega` is
  the mean squared cosine of A's columns, computed as :math:`(\|\tilde A \tilde A^T\|^2 - d) / (d (d - 1))`.
* stage B: whiten with the pivot's statistics, rotate by CCA, colour with the target's: :math:`B = B_0 T` with the
  ``r x r`` matrix T of :func:`recolouring`; equal to the ``d x d`` form because :math:`B_0 A x` has rank r.

The base models are frozen and adapters take no part, so inputs do not depend on A: one pass over the data for their
second moments is all of the data that both stages need, and the authors' stochastic epoch becomes an exact objective.
Models whose tokenizers divide texts differently are compared by sub-words (:mod:`client_app.model.subwords`); models
without texts must see the same examples as the same number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from client_app.data.dataset import MASK, Dataset
from client_app.model.personal import PersonalModel
from client_app.model.subwords import Decode, Pairs, Pieces, pairs_of
from fedalloy_adapters.adapter import Adapter, polar
from fedalloy_adapters.files.atomic_files import write_durably
from fedalloy_adapters.layout import Factor, Layout

FORMAT = "fedalloy.alignment.v1"
_SAVE_EVERY = 20


class AlignmentError(ValueError):
    """Models cannot be aligned, or an alignment file is missing, damaged or for other models."""


@dataclass(frozen=True)
class AlignOptions:
    """``penalty`` is lambda, ``ridge`` gamma; ``orthonormal_b`` adds a polar step on B, which the authors leave out."""

    seed: int = 0
    batch_size: int = 32
    steps: int = 500
    learning_rate: float = 2e-2
    penalty: float = 0.5
    ridge: float = 1e-4
    orthonormal_b: bool = False


Progress = Callable[[str, int, int], None]
"""Progress callback: gets what is being done, how much is done, and the total."""


def align(
    pivot: PersonalModel,
    targets: Sequence[PersonalModel],
    data: Sequence[Dataset],
    folder: Path,
    options: AlignOptions | None = None,
    progress: Progress = lambda what, done, total: None,
    decode: Sequence[Decode] = (),
) -> Path:
    """Align all targets to the pivot and write ``<folder>/<sha256>.safetensors``; the file's name is its hash.

    Intermediate results are saved beside it every few batches, so that a stopped run continues from there.

    Args:
        pivot: usually the smallest model.
        targets: the others.
        data: the same public examples as each model reads them, the pivot's first.
        folder: where the file goes.
        options: see :class:`AlignOptions`.
        progress: see :data:`Progress`.
        decode: gives the text of tokens, one for each model, the pivot's first; only with them can models be aligned
            that divide texts into different tokens.

    Raises:
        AlignmentError: the models do not share the same modules, or split the examples into tokens that cannot be
            compared.
    """
    options, pieces = options or AlignOptions(), [Pieces(one) for one in decode]
    tensors: dict[str, Tensor] = {}
    start = Adapter.initial(pivot.layout, options.seed)
    _keep(tensors, basis_of(start))
    for number, (target, read) in enumerate(zip(targets, data[1:], strict=True), start=1):
        if dict(_by_name(target.layout)).keys() != dict(_by_name(pivot.layout)).keys():
            raise AlignmentError(
                f"{target.base.name!r} shares {sorted(target.layout.shared_names.values())}, expected "
                f"{sorted(pivot.layout.shared_names.values())} as {pivot.base.name!r}"
            )
        tokens = (pieces[0], pieces[number]) if pieces else None
        moments = _moments(pivot, start, target, (data[0], read), folder, options, progress, tokens)
        _keep(tensors, _aligned(target, start, pivot.layout, moments, options, progress))
    about = {
        "format": FORMAT,
        "pivot": pivot.base.fingerprint,
        "models": {model.base.fingerprint: model.base.name for model in (pivot, *targets)},
        "convention": "s (x A^T P + Q) B^T",
        "options": asdict(options),
    }
    # One key: safetensors writes several in a random order, and the hash would differ from run to run.
    content = save(tensors, metadata={"fedalloy": json.dumps(about, sort_keys=True)})
    path = folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    write_durably(path, content)
    for target, read in zip(targets, data[1:], strict=True):
        _partial(folder, pivot, target, options, (data[0], read)).unlink(missing_ok=True)
    return path


def load_alignment(folder: Path, digest: str, layout: Layout) -> Adapter:
    """A and B for the modules with P of a layout, from the alignment file with this hash.

    Raises:
        AlignmentError: there is no such file, its content is not what its name says, or it has nothing for this model.
    """
    path = folder / f"{digest}.safetensors"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AlignmentError(
            f"no alignment {digest[:80]!r} in {folder} ({error.strerror}): put the file of `fedalloy align` there"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise AlignmentError(f"{path} has the hash {found}, expected {digest}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("fedalloy", "{}"))
        tensors = load(content)
    except (SafetensorError, ValueError) as error:
        raise AlignmentError(f"{path} is damaged: {error}") from None
    if about.get("format") != FORMAT:
        raise AlignmentError(f"{path} has format {about.get('format')!r}, expected {FORMAT!r}")
    basis = basis_of(Adapter.zeros(layout))
    for entry, tensor in basis.items():
        value = tensors.get(f"{layout.base_fingerprint}/{entry.name}")
        if value is None:
            raise AlignmentError(
                f"{path} has nothing for {entry.name!r} of base model {layout.base_fingerprint[:12]}; it is for "
                f"{', '.join(about.get('models', {}).values()) or 'none'}"
            )
        if tuple(value.shape) != entry.shape:
            raise AlignmentError(f"{path} has shape {tuple(value.shape)} for {entry.name!r}, expected {entry.shape}")
        tensor.copy_(value)
    return basis


def basis_of(adapter: Adapter) -> Adapter:
    """A and B of the modules with P.

    Raises:
        AlignmentError: no module has P.
    """
    layout = adapter.layout
    modules = [entry.module for entry in layout.entries if entry.factor is Factor.P]
    if not modules:
        raise AlignmentError("no module has P and Q: lora-blocks is 0")
    return adapter.select([Factor.A, Factor.B], modules)


def column_penalty(a: Tensor) -> Tensor:
    """Omega: mean squared cosine of two different columns of ``a`` ``[r, d]``, at least ``(d - r) / (r (d - 1))``."""
    d = a.shape[1]
    unit = torch.nn.functional.normalize(a, dim=0)
    return ((unit @ unit.T).square().sum() - d) / (d * (d - 1))


def recolouring(c_tt: Tensor, c_pp: Tensor, c_tp: Tensor, ridge: float) -> Tensor:
    r"""T ``[r, r]`` of stage B from second moments of the centred activations ``A x``, target's and pivot's.

    :math:`T = C_{tt}^{1/2} U V^T C_{pp}^{-1/2}` with the SVD :math:`U \Sigma V^T` of
    :math:`C_{tt}^{-1/2} C_{tp} C_{pp}^{-1/2}`, and ``ridge`` on the diagonals of :math:`C_{tt}` and :math:`C_{pp}`.
    """
    eye = torch.eye(len(c_tt), dtype=c_tt.dtype)
    root_t, inverse_t = _roots(c_tt + ridge * eye)
    _, inverse_p = _roots(c_pp + ridge * eye)
    return root_t @ polar(inverse_t @ c_tp @ inverse_p) @ inverse_p


def fit_a(start: Tensor, x_tt: Tensor, x_tz: Tensor, options: AlignOptions) -> Tensor:
    """Stage A from moments: ``x_tt = mean x_t x_t^T`` ``[d, d]`` and ``x_tz = mean x_t (A_p x_p)^T`` ``[d, r]``."""
    a = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([a], lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    for _ in range(options.steps):
        error = ((a @ x_tt) * a).sum() - 2 * (a * x_tz.T).sum()  # plus a constant
        loss = error / a.shape[0] + options.penalty * column_penalty(a)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return polar(a.detach())


def _aligned(
    target: PersonalModel,
    pivot_start: Adapter,
    pivot_layout: Layout,
    moments: Mapping[str, Tensor],
    options: AlignOptions,
    progress: Progress,
) -> Adapter:
    result = basis_of(Adapter.initial(target.layout, options.seed))
    names = _by_name(target.layout)
    for done, (name, module) in enumerate(sorted(names.items())):
        progress(f"fitting {target.base.name}", done, len(names))
        count = moments[f"{name}.count"]
        x_tt, x_tz, z_pp = (moments[f"{name}.{kind}"] / count for kind in ("tt", "tz", "zz"))
        mean_t, mean_z = moments[f"{name}.t"] / count, moments[f"{name}.z"] / count
        a = fit_a(result[module, Factor.A].double(), x_tt, x_tz, options)
        mean = a @ mean_t
        c_tt = count * (a @ x_tt @ a.T - torch.outer(mean, mean))
        c_tp = count * (a @ x_tz - torch.outer(mean, mean_z))
        c_pp = count * (z_pp - torch.outer(mean_z, mean_z))
        b = result[module, Factor.B].double() @ recolouring(c_tt, c_pp, c_tp, options.ridge)
        result[module, Factor.A].copy_(a)
        result[module, Factor.B].copy_(polar(b) if options.orthonormal_b else b)
    progress(f"fitting {target.base.name}", len(names), len(names))
    return result


def _moments(
    pivot: PersonalModel,
    start: Adapter,
    target: PersonalModel,
    data: tuple[Dataset, Dataset],
    folder: Path,
    options: AlignOptions,
    progress: Progress,
    tokens: tuple[Pieces, Pieces] | None,
) -> dict[str, Tensor]:
    """Sums over tokens by shared name: ``tt [d, d]``, ``tz [d, r]``, ``zz [r, r]``, ``t [d]``, ``z [r]``, ``count``."""
    partial = _partial(folder, pivot, target, options, data)
    moments: dict[str, Tensor] = {}
    begin = 0
    if partial.exists():
        try:
            moments = load_file(partial)
            begin = int(moments.pop("begin"))
        except (SafetensorError, KeyError):
            moments, begin = {}, 0
    total = len(data[0])
    for batch, first in enumerate(range(begin, total, options.batch_size)):
        progress(f"reading for {target.base.name}", first, total)
        if batch and batch % _SAVE_EVERY == 0:
            write_durably(partial, save(moments | {"begin": torch.tensor(first)}))
        indices = torch.arange(first, min(first + options.batch_size, total))
        batches = [read.batch(indices) for read in data]
        pairs = _pairs(batches, tokens)
        theirs, ours = (_inputs(model, batch) for model, batch in zip((pivot, target), batches, strict=True))
        for name, x_t in ours.items():
            x_p = theirs[name]
            if pairs is None and len(x_t) != len(x_p):
                raise AlignmentError(
                    f"{target.base.name!r} makes {len(x_t)} tokens of a batch, {pivot.base.name!r} {len(x_p)}: "
                    "models that divide their inputs differently cannot be aligned"
                )
            z = x_p @ start[_by_name(pivot.layout)[name], Factor.A].double().T
            if pairs is not None:
                x_t, z = x_t[pairs.rows], pairs.pooled(z)
            found = {"tt": x_t.T @ x_t, "tz": x_t.T @ z, "zz": z.T @ z, "t": x_t.sum(0), "z": z.sum(0)}
            found["count"] = torch.tensor(float(len(x_t)), dtype=torch.float64)
            for kind, value in found.items():
                key = f"{name}.{kind}"
                moments[key] = moments[key] + value if key in moments else value
    progress(f"reading for {target.base.name}", total, total)
    if not all(float(value) for key, value in moments.items() if key.endswith(".count")):
        raise AlignmentError(f"{target.base.name!r} and {pivot.base.name!r} have no sub-word of these texts in common")
    return moments


def _pairs(batches: Sequence[Dataset], tokens: tuple[Pieces, Pieces] | None) -> Pairs | None:
    """Which tokens of a batch belong together, the pivot's batch first; None: each to the one in its own place."""
    ids = [batch.inputs.get("input_ids") for batch in batches]
    if tokens is None or any(found is None or MASK not in b.inputs for found, b in zip(ids, batches, strict=True)):
        _require_same_lengths(batches)
        return None
    theirs, ours = (
        [pieces.of(row[mask.bool()]) for row, mask in zip(batch.inputs["input_ids"], batch.inputs[MASK], strict=True)]
        for pieces, batch in zip(tokens, batches, strict=True)
    )
    return None if theirs == ours else pairs_of(ours, theirs)


def _require_same_lengths(batches: Sequence[Dataset]) -> None:
    """Texts are compared token by token; images have no mask."""
    lengths = [batch.inputs[MASK].sum(dim=1).tolist() for batch in batches if MASK in batch.inputs]
    if len(lengths) == 2 and lengths[0] != lengths[1]:
        first = next(index for index, (one, other) in enumerate(zip(*lengths, strict=True)) if one != other)
        raise AlignmentError(
            f"a text has {lengths[0][first]} tokens for one model and {lengths[1][first]} for the other: models with "
            "different tokenizers are aligned by sub-words, for which their tokens must be decoded"
        )


@torch.no_grad()
def _inputs(model: PersonalModel, batch: Dataset) -> dict[str, Tensor]:
    """Inputs ``[tokens, d_in]`` float64 of the shared modules in the frozen base model, by shared name; no padding."""
    kept: dict[str, Tensor] = {}
    mask = batch.inputs.get(MASK)

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            flat = x[mask.bool().to(x.device)] if mask is not None and x.ndim == 3 else x.reshape(-1, x.shape[-1])
            kept[name] = flat.double().cpu()

        return hook

    hooks = [
        model.module.get_submodule(module).register_forward_pre_hook(keep(name))
        for name, module in _by_name(model.layout).items()
    ]
    try:
        model.activate({})
        model.module.eval()
        model.logits({name: value.to(model.device) for name, value in batch.inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _by_name(layout: Layout) -> dict[str, str]:
    return {name: module for module, name in layout.shared_names.items()}


def _keep(tensors: dict[str, Tensor], basis: Adapter) -> None:
    for entry, tensor in basis.items():
        tensors[f"{basis.layout.base_fingerprint}/{entry.name}"] = tensor.clone().contiguous()


def _partial(
    folder: Path, pivot: PersonalModel, target: PersonalModel, options: AlignOptions, data: Sequence[Dataset]
) -> Path:
    content = hashlib.sha256()
    for read in data:
        content.update(read.labels.numpy().tobytes())
        first = read.batch(torch.arange(min(len(read), options.batch_size)))  # images may be in batches only
        for name, value in [*sorted(read.inputs.items()), *sorted(first.inputs.items())]:
            content.update(name.encode() + value.contiguous().numpy().tobytes())
    identity = (pivot.layout.digest, target.layout.digest, asdict(options), content.hexdigest())
    return folder / f".partial-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.safetensors"


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T
