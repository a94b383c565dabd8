r"""Closed forms on adapters; no dense ``d_out x d_in`` matrix is ever formed.

For a LoRA module the *delta* is :math:`\Delta = s B A` with ``A [r, d_in]``, ``B [d_out, r]`` and scaling ``s``. Sums
can be taken in two spaces:

* *factor space*: numbers are added one by one. Linear in the vector, but the product of two sums has cross terms, so
  this is not the sum of the deltas unless all A (or all B) agree.
* *delta space*: the deltas are added (with P and Q: the maps ``x -> s (x A^T P + Q) B^T``). Exact as a stack of ranks;
  a best approximation at a given rank by truncation.

Weight and bias entries are differences from the base model and add linearly in both spaces.
The scaling is folded in exactly one place, :func:`folded`.

Example: two clients' updates of one number are ``2 x 3 = 6`` and ``4 x 1 = 4``. Their mean is 5 in delta space only.

>>> entries = (Entry("q", Factor.A, (1, 1)), Entry("q", Factor.B, (1, 1)))
>>> layout = Layout(entries, scalings={"q": 1.0}, base_fingerprint="00")
>>> clients = [Adapter(layout, torch.tensor(vector)) for vector in ([3.0, 2.0], [1.0, 4.0])]
>>> a, b = folded(stack(clients, [0.5, 0.5]), "q")
>>> float(b @ a)
5.0
>>> a, b = folded(weighted_sum(clients, [0.5, 0.5]), "q")
>>> float(b @ a)
6.0
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedalloy_adapters.adapter import Adapter, all_finite, require_same_layout
from fedalloy_adapters.bank.blocks import MemoryRow, combine
from fedalloy_adapters.bank.cores import on_all_cores
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError

_CHUNK_NUMBERS = 2**24
"""Memory for a group of modules that are decomposed in one call."""

Coefficient = float | Mapping[str, float]
"""A coefficient: one number for the whole adapter, or one per module."""


def coefficient_of(coefficient: Coefficient, module: str) -> float:
    """The coefficient of one module.

    Raises:
        LayoutError: a per-module coefficient does not name this module, or it is NaN or infinite.
    """
    if isinstance(coefficient, Mapping):
        if module not in coefficient:
            given = ", ".join(sorted(coefficient)) or "none"
            raise LayoutError(f"no coefficient for module {module!r}; given for {given}")
        coefficient = coefficient[module]
    if not math.isfinite(coefficient):
        raise LayoutError(f"coefficient {coefficient} for module {module!r}, expected a finite number")
    return float(coefficient)


def folded(adapter: Adapter, module: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """``(A [r, d_in], s B [d_out, r])``, in ``dtype`` if given: the one place where the scaling meets a factor.

    With P, A is ``P^T A``. With Q, A has one more column, Q, which acts on a constant input of one: ``[r, d_in + 1]``.

    Raises:
        LayoutError: the adapter has only one of the module's two factors, hence no delta.
    """
    if not all(f"{module}.{factor}" in adapter.layout.by_name for factor in (Factor.A, Factor.B)):
        raise LayoutError(f"module {module!r} has one LoRA factor; a delta needs both")
    a, b = (adapter[module, factor].to(dtype or adapter.vector.dtype) for factor in (Factor.A, Factor.B))
    if f"{module}.{Factor.P}" in adapter.layout.by_name:
        a = adapter[module, Factor.P].to(a).T @ a
    if f"{module}.{Factor.Q}" in adapter.layout.by_name:
        a = torch.cat([a, adapter[module, Factor.Q].to(a)[:, None]], dim=1)
    return a, adapter.layout.scalings[module] * b


def fold(adapter: Adapter) -> Adapter:
    """The same update without P: ``A <- P^T A``; Q stays (as the bias of B it is ``s B Q``)."""
    if adapter.layout.folded is adapter.layout:
        return adapter
    result = Adapter.zeros(adapter.layout.folded, adapter.vector.dtype, adapter.vector.device)
    for entry, tensor in result.items():
        value = adapter[entry.module, entry.factor]
        if entry.factor is Factor.A and f"{entry.module}.{Factor.P}" in adapter.layout.by_name:
            value = adapter[entry.module, Factor.P].T @ value
        tensor.copy_(value)
    return result


def combine_factors(adapters: Sequence[Adapter], weights: Tensor) -> Tensor:
    """Weighted sums in factor space: ``weights [M, N]`` times the adapters' matrix ``[N, P]`` gives ``[M, P]``.

    The matrix is never formed as a whole (:mod:`fedalloy_adapters.bank.blocks`).

    Raises:
        LayoutError: the layouts differ, or there is not one weight for each adapter.
    """
    for other in adapters[1:]:
        require_same_layout(adapters[0].layout, other.layout)
    if weights.ndim != 2 or not adapters or weights.shape[1] != len(adapters):
        raise LayoutError(f"got weights.shape={tuple(weights.shape)}, expected (*, {len(adapters)})")
    vectors = [adapter.vector for adapter in adapters]
    dtypes = {vector.dtype for vector in vectors}
    if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and all(v.device.type == "cpu" for v in vectors):
        return combine([MemoryRow(vector) for vector in vectors], weights)
    matrix = torch.stack(vectors)
    return weights.to(matrix) @ matrix


def weighted_sum(adapters: Sequence[Adapter], coefficients: Sequence[Coefficient]) -> Adapter:
    """Sum of coefficient times adapter in factor space; coefficients may be per module.

    Note that a module's coefficient multiplies both of its factors, hence the delta by its square: for a sum of deltas
    use :func:`stack`.

    Raises:
        LayoutError: layouts differ, counts differ, or a per-module coefficient is missing.
    """
    _require_counts(adapters, coefficients)
    layout = adapters[0].layout
    if all(not isinstance(coefficient, Mapping) for coefficient in coefficients):
        weights = torch.tensor([[coefficient_of(c, "*") for c in coefficients]], dtype=torch.float64)
        return Adapter(layout, combine_factors(adapters, weights)[0])
    total = Adapter.zeros(layout, adapters[0].vector.dtype, adapters[0].vector.device)
    for adapter, coefficient in zip(adapters, coefficients, strict=True):
        require_same_layout(layout, adapter.layout)
        for entry, tensor in total.items():
            tensor += coefficient_of(coefficient, entry.module) * adapter[entry.module, entry.factor]
    return total


def precision_mean(adapters: Sequence[Adapter], precisions: Sequence[Adapter]) -> Adapter:
    """Elementwise mean in factor space, weighted by each number's precision: ``sum_i p_i x_i / sum_i p_i``.

    With Fisher information as precision this is Fisher merging (Matena and Raffel, NeurIPS 2022).

    Raises:
        LayoutError: layouts or counts differ, a precision is negative, or all precisions of a number are 0.
    """
    _require_counts(adapters, precisions)
    return precision_mean_of(zip(adapters, precisions, strict=True))


def precision_mean_of(pairs: Iterable[tuple[Adapter, Adapter]]) -> Adapter:
    """:func:`precision_mean` of pairs (adapter, precision) that arrive one at a time; only two vectors stay in memory.

    Raises:
        LayoutError: as for :func:`precision_mean`, or there are no pairs.
    """
    layout, total, weighted = None, torch.zeros(()), torch.zeros(())
    for adapter, precision in pairs:
        layout = layout or adapter.layout
        require_same_layout(layout, adapter.layout)
        require_same_layout(layout, precision.layout)
        if not bool((precision.vector >= 0).all()):
            raise LayoutError(f"a precision of {float(precision.vector.min()):g}, expected no negative number")
        total, weighted = total + precision.vector, weighted + precision.vector * adapter.vector
    if layout is None:
        raise LayoutError("got no adapters, expected at least one")
    if not bool((total > 0).all()):
        raise LayoutError(f"{int((total == 0).sum())} numbers have no precision in any adapter, expected one above 0")
    return Adapter(layout, weighted / total)


def stack(adapters: Sequence[Adapter], coefficients: Sequence[Coefficient]) -> Adapter:
    """Exact sum in delta space: ``sum_i c_i Delta_i`` as one adapter whose ranks add up and whose scalings are 1.

    ``A' = [A_1; A_2; ...]``, ``B' = [c_1 s_1 B_1, c_2 s_2 B_2, ...]`` and ``Q' = [Q_1; Q_2; ...]``, with each P
    multiplied into its A. Ranks and scalings may differ between the adapters; modules, input and output sizes may not.

    Raises:
        LayoutError: base models, modules or sizes differ, counts differ, a module has only one of its factors, or a
            per-module coefficient is missing.
    """
    _require_counts(adapters, coefficients)
    adapters = [fold(adapter) for adapter in adapters]
    first = adapters[0].layout
    for other in adapters[1:]:
        _require_same_tensors(first, other.layout)
    entries: list[Entry] = []
    pieces: list[Tensor] = []
    for entry in first.entries:
        module, factor = entry.module, entry.factor
        if factor is Factor.A:
            tensor = torch.cat([folded(adapter, module)[0][:, : entry.shape[1]] for adapter in adapters], dim=0)
        elif factor is Factor.Q:
            tensor = torch.cat([adapter[module, factor] for adapter in adapters])
        elif factor is Factor.B:
            blocks = [
                coefficient_of(c, module) * folded(adapter, module)[1]
                for adapter, c in zip(adapters, coefficients, strict=True)
            ]
            tensor = torch.cat(blocks, dim=1)
        else:
            terms = [
                coefficient_of(c, module) * adapter[module, factor]
                for adapter, c in zip(adapters, coefficients, strict=True)
            ]
            tensor = torch.stack(terms).sum(dim=0)
        entries.append(Entry(module, factor, tuple(tensor.shape)))
        pieces.append(tensor.reshape(-1))
    layout = Layout(tuple(entries), dict.fromkeys(first.lora_modules, 1.0), first.base_fingerprint)
    return Adapter(layout, torch.cat(pieces))


def truncate(adapter: Adapter, layout: Layout, *, balanced: bool = True) -> Adapter:
    """Best approximation of every delta at the ranks of ``layout`` (Frobenius norm), in that layout without P.

    QR of B and of A transposed, then an SVD of the small core: ``O((d_in + d_out) r^2)``; equal to truncating the SVD
    of the dense delta (Eckart-Young). Singular values are split evenly between the factors. Unless ``balanced``, they
    all go to B, and A has orthonormal rows. If the target rank exceeds the adapter's, the rest is zero. Signs and
    rotations of an SVD are arbitrary: reset optimiser moments.

    Raises:
        LayoutError: ``layout`` has another base model, other modules or other sizes; a delta is not finite.
    """
    _require_same_tensors(layout, adapter.layout)
    layout = layout.folded
    result = Adapter.zeros(layout, adapter.vector.dtype, adapter.vector.device)
    for entry, tensor in result.items():
        if not entry.factor.is_lora:
            tensor.copy_(adapter[entry.module, entry.factor])

    def cut(modules: Sequence[str]) -> None:
        a, b = _folded_together(adapter, modules)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.mT)
        core = r_b @ r_a.mT
        if not core.is_meta and not all_finite(core):  # else the SVD fails or is NaN
            wrong = next(m for m, found in zip(modules, core, strict=True) if not all_finite(found))
            raise LayoutError(f"the delta of module {wrong!r} has numbers that are not finite")
        u, sigma, v_t = torch.linalg.svd(core, full_matrices=False)
        for index, module in enumerate(modules):
            kept = min(layout.ranks[module], sigma.shape[1])
            most = sigma[index, :kept]
            in_a, in_b = (most.sqrt(),) * 2 if balanced else (torch.ones_like(most), most)
            new_a = in_a[:, None] * (v_t[index, :kept] @ q_a[index].T)
            result[module, Factor.A][:kept] = new_a[:, : result[module, Factor.A].shape[1]]
            if f"{module}.{Factor.Q}" in layout.by_name:
                result[module, Factor.Q][:kept] = new_a[:, -1]
            result[module, Factor.B][:, :kept] = (q_b[index] @ u[index, :, :kept]) * in_b / layout.scalings[module]

    on_all_cores(cut, _alike(adapter.layout))
    return result


def _alike(layout: Layout) -> list[list[str]]:
    """LoRA modules in groups of one shape. Groups are small enough to keep all cores busy and to fit in memory."""
    groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for module in layout.lora_modules:
        found = [f"{module}.{factor}" for factor in (Factor.A, Factor.B, Factor.P, Factor.Q)]
        shapes = tuple(layout.by_name[name].shape if name in layout.by_name else () for name in found)
        groups.setdefault(shapes, []).append(module)
    chunks = []
    for shapes, modules in groups.items():
        most = max(1, _CHUNK_NUMBERS // max(sum(math.prod(shape) for shape in shapes), 1))
        size = min(most, -(-len(modules) // torch.get_num_threads()))
        chunks += [modules[start : start + size] for start in range(0, len(modules), size)]
    return chunks


def _folded_together(adapter: Adapter, modules: Sequence[str]) -> tuple[Tensor, Tensor]:
    """:func:`folded` of modules of one shape: ``A [M, r, d_in]`` and ``s B [M, d_out, r]``."""
    pairs = [folded(adapter, module) for module in modules]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def inner(first: Adapter, second: Adapter) -> float:
    """``<Delta_1, Delta_2>`` in delta space (Frobenius), weight and bias entries included; ranks may differ.

    ``tr(A_1^T B_1^T B_2 A_2) = sum((B_1^T B_2) * (A_1 A_2^T))``: two ``r_1 x r_2`` Gram matrices, in float64.

    Raises:
        LayoutError: base models, modules or sizes differ.
    """
    _require_same_tensors(first.layout, second.layout)
    total = 0.0
    for entry in first.layout.entries:
        if not entry.factor.is_lora:
            left = first[entry.module, entry.factor].double()
            total += float((left * second[entry.module, entry.factor].double()).sum())
    for module in first.layout.lora_modules:
        (a_1, b_1), (a_2, b_2) = (folded(adapter, module, torch.float64) for adapter in (first, second))
        total += float(((b_1.T @ b_2) * (a_1 @ a_2.T)).sum())
    return total


def gram(adapters: Sequence[Adapter]) -> Tensor:
    """Inner products of all pairs in delta space, ``[N, N]`` float64, symmetric."""
    result = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for i, first in enumerate(adapters):
        for j, second in enumerate(adapters[: i + 1]):
            result[i, j] = result[j, i] = inner(second, first)
    return result


def norm(adapter: Adapter) -> float:
    """Frobenius norm in delta space."""
    return math.sqrt(max(inner(adapter, adapter), 0.0))


def squared_distances(first: Adapter, second: Adapter) -> dict[str, float]:
    """Squared Frobenius norm of the difference of the deltas, by module.

    Computed on the stacked difference after orthogonalising its factors: the expansion ``|x|^2 + |y|^2 - 2<x,y>`` would
    lose all digits for neighbours.

    Raises:
        LayoutError: base models, modules or sizes differ.
    """
    difference = stack([first.to(torch.float64), second.to(torch.float64)], [1.0, -1.0])
    squared = dict.fromkeys(first.layout.modules, 0.0)
    for entry, tensor in difference.items():
        if not entry.factor.is_lora:
            squared[entry.module] += float(tensor.square().sum())

    def measured(modules: Sequence[str]) -> list[float]:
        a, b = _folded_together(difference, modules)
        core = torch.linalg.qr(b)[1] @ torch.linalg.qr(a.mT)[1].mT
        return [float(found.square().sum()) for found in core]

    chunks = _alike(difference.layout)
    for modules, found in zip(chunks, on_all_cores(measured, chunks), strict=True):
        for module, square in zip(modules, found, strict=True):
            squared[module] += square
    return squared


def distance(first: Adapter, second: Adapter) -> float:
    """Frobenius norm of the difference of the deltas."""
    return math.sqrt(sum(squared_distances(first, second).values()))


def _require_same_tensors(expected: Layout, found: Layout) -> None:
    """Raise LayoutError naming the first difference other than ranks, scalings, P and order."""
    difference = expected.folded.difference(found.folded, any_rank=True)
    if difference:
        raise LayoutError(f"found {difference}")


def _require_counts(adapters: Sequence[Adapter], coefficients: Sequence[object]) -> None:
    if not adapters or len(adapters) != len(coefficients):
        raise LayoutError(f"got {len(adapters)} adapters and {len(coefficients)} coefficients")
