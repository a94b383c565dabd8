"""Layouts and adapters to test with: small fixed ones, random ones, and Hypothesis strategies.

Everything a test expects is computed here from first principles (dense matrices, slices counted by hand), never by the
code under test.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.layout import Entry, Factor, Layout
from fedalloy_adapters.wire.codec import Encoding

INTEGERS = (Encoding.INT8, Encoding.INT4, Encoding.INT2)
FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """So many examples, the same in every run; FUZZ_EXAMPLES=10000 searches that many, at random."""
    return settings(max_examples=FUZZ_EXAMPLES or count, derandomize=not FUZZ_EXAMPLES, deadline=None)


def layout_of(
    ranks: Mapping[str, int] | int = 2,
    scalings: Mapping[str, float] | float = 2.0,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    head: tuple[int, int] | None = (3, 5),
    base: str = "base",
) -> Layout:
    """LoRA modules with ``(d_in, d_out)`` of ``sizes``, and a classifier ``(classes, d)``."""
    sizes = sizes or {"q_proj": (4, 5), "v_proj": (6, 3)}
    entries = []
    for module, (d_in, d_out) in sizes.items():
        rank = ranks if isinstance(ranks, int) else ranks[module]
        entries += [Entry(module, Factor.A, (rank, d_in)), Entry(module, Factor.B, (d_out, rank))]
    if head:
        entries += [Entry("classifier", Factor.WEIGHT, head), Entry("classifier", Factor.BIAS, head[:1])]
    by_module = {module: scalings if isinstance(scalings, float) else scalings[module] for module in sizes}
    return Layout(tuple(entries), by_module, base)


def random_adapter(layout: Layout, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(layout, (scale * torch.randn(layout.size, generator=generator, dtype=torch.float64)).to(dtype))


def distance(first: Adapter, second: Adapter) -> float:
    """Norm of the difference, in double precision."""
    return float((first.vector.double() - second.vector.double()).norm())


def tensor_of(adapter: Adapter, module: str, factor: Factor) -> Tensor:
    """A tensor cut out of the vector by counting, in float64."""
    position = 0
    for entry in adapter.layout.entries:
        count = int(np.prod(entry.shape))
        if (entry.module, entry.factor) == (module, factor):
            return adapter.vector[position : position + count].reshape(entry.shape).double()
        position += count
    raise KeyError((module, factor))


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to each parameter: ``scaling * B @ A`` by module, heads by ``module.factor``; float64."""
    result = {}
    for entry in adapter.layout.entries:
        if entry.factor is Factor.B:
            a, b = (tensor_of(adapter, entry.module, factor) for factor in (Factor.A, Factor.B))
            result[entry.module] = adapter.layout.scalings[entry.module] * (b @ a)
        elif entry.factor is not Factor.A:
            result[f"{entry.module}.{entry.factor.value}"] = tensor_of(adapter, entry.module, entry.factor)
    return result


def flat(matrices: Mapping[str, Tensor]) -> Tensor:
    """Dense updates as one vector, in order of their names."""
    return torch.cat([matrices[name].reshape(-1) for name in sorted(matrices)])


names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=12
)
"""Valid names: any printable text, spaces and dots included."""


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to four modules, each LoRA (both factors or one), a trained parameter of 1 to 4 dimensions, or both."""
    modules = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    small = st.integers(1, 4)
    entries, scalings = [], {}
    for module in modules:
        kinds = draw(st.sets(st.sampled_from(list(Factor)), min_size=1))
        rank = draw(small)
        for factor in draw(st.permutations(sorted(kinds))):
            if factor is Factor.A:
                shape: tuple[int, ...] = (rank, draw(small))
            elif factor is Factor.B:
                shape = (draw(small), rank)
            elif factor is Factor.P:
                shape = (rank, rank)
            elif factor is Factor.Q:
                shape = (rank,)
            else:
                shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
            entries.append(Entry(module, factor, shape))
        if any(factor.is_lora for factor in kinds):
            scalings[module] = draw(st.floats(0, exclude_min=True, allow_infinity=False))
    return Layout(tuple(draw(st.permutations(entries))), scalings, draw(names))


def vectors(layout: Layout, largest: float | None = None) -> st.SearchStrategy[Tensor]:
    """Any finite float32 numbers, minus zero and subnormals included, up to ``largest`` in size."""
    least = None if largest is None else -largest
    numbers = st.floats(least, largest, width=32, allow_nan=False, allow_infinity=False)
    return arrays(np.float32, layout.size, elements=numbers).map(torch.from_numpy)


def adapters_of(layout: Layout, largest: float | None = None) -> st.SearchStrategy[Adapter]:
    return vectors(layout, largest).map(lambda vector: Adapter(layout, vector))


def adapters(largest: float | None = None) -> st.SearchStrategy[Adapter]:
    return layouts().flatmap(lambda layout: adapters_of(layout, largest))


def bits(vector: Tensor) -> bytes:
    """The exact bits of float32 numbers: unlike ``==``, tells minus zero from zero."""
    return bytes(vector.to(torch.float32).contiguous().numpy().tobytes())
