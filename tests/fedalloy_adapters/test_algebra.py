from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.algebra import (
    Coefficient,
    coefficient_of,
    combine_factors,
    distance,
    folded,
    gram,
    inner,
    norm,
    stack,
    truncate,
    weighted_sum,
)
from fedalloy_adapters.layout import Entry, Factor, Layout, LayoutError
from tests.fedalloy_adapters.dense import ADAPTERS, LAYOUTS, PER_MODULE, assert_close, dense_sum
from tests.fedalloy_adapters.samples import bits, dense, examples, flat, layout_of, random_adapter, tensor_of


@pytest.mark.parametrize(
    "coefficients",
    [[1.0, 1.0, 1.0], [0.2, -0.7, 1.5], [0.0, 0.0, 1.0], PER_MODULE, [0.5, PER_MODULE[1], PER_MODULE[2]]],
    ids=["sum", "scalars", "one", "per module", "mixed"],
)
def test_stacking_is_the_sum_of_the_dense_deltas(coefficients: list[Coefficient]) -> None:
    stacked = stack(ADAPTERS, coefficients)
    assert_close(dense(stacked), dense_sum(ADAPTERS, coefficients), 1e-12)
    assert stacked.layout.ranks == {"q_proj": 13, "v_proj": 6}
    assert stacked.layout.scalings == {"q_proj": 1.0, "v_proj": 1.0}
    assert [entry.name for entry in stacked.layout.entries] == [entry.name for entry in LAYOUTS[0].entries]


@examples(40)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(-100, 100), st.integers(0, 2**32)),
        min_size=1,
        max_size=4,
    )
)
def test_stacking_is_exact_for_any_ranks_scalings_and_coefficients(
    clients: list[tuple[int, float, float, int]],
) -> None:
    found = [random_adapter(layout_of(rank, scaling), seed, torch.float64) for rank, scaling, _, seed in clients]
    coefficients = [coefficient for _, _, coefficient, _ in clients]
    stacked, expected = dense(stack(found, coefficients)), dense_sum(found, coefficients)
    size = sum(abs(c) * float(flat(dense(adapter)).norm()) for adapter, c in zip(found, coefficients, strict=True))
    assert float((flat(stacked) - flat(expected)).norm()) <= 1e-12 * max(size, 1e-300)


def test_stacking_float32_keeps_float32_and_one_adapter_keeps_its_delta() -> None:
    adapter = random_adapter(LAYOUTS[0], 3)
    stacked = stack([adapter], [1.0])
    assert stacked.vector.dtype == torch.float32
    assert_close(dense(stacked), dense(adapter), 1e-6)
    assert stacked.vector.data_ptr() != adapter.vector.data_ptr()


def test_stacking_takes_tensors_in_any_order() -> None:
    first = ADAPTERS[0]
    backwards = Layout(LAYOUTS[1].entries[::-1], LAYOUTS[1].scalings, "base")
    second = Adapter(
        backwards, torch.cat([tensor_of(ADAPTERS[1], e.module, e.factor).reshape(-1) for e in backwards.entries])
    )
    expected = stack([first, ADAPTERS[1]], [1.0, 2.0])
    assert torch.equal(stack([first, second], [1.0, 2.0]).vector, expected.vector)


@pytest.mark.parametrize(("scaling", "expected"), [(2.0, 30.0), (0.5, 7.5)])
def test_scaling_is_folded_exactly_once(scaling: float, expected: float) -> None:
    """One number: A = 3, B = 5, so that a scaling left out, or squared, cannot hide."""
    layout = layout_of(1, scaling, {"q": (1, 1)}, head=None)
    adapter = Adapter(layout, torch.tensor([3.0, 5.0]))
    a, b = folded(adapter, "q")
    assert (float(a), float(b)) == (3.0, 5.0 * scaling)
    stacked = stack([adapter], [1.0])
    assert float(stacked["q", Factor.A] * stacked["q", Factor.B]) * stacked.layout.scalings["q"] == expected
    assert norm(adapter) == expected
    assert inner(adapter, adapter) == expected**2
    assert inner(adapter, stacked) == expected**2
    assert distance(adapter, Adapter.zeros(layout)) == pytest.approx(expected, rel=1e-15)
    for target in (2.0, 0.5, 12.5):
        cut = truncate(adapter, layout_of(1, target, {"q": (1, 1)}, head=None))
        assert target * float(cut["q", Factor.A] * cut["q", Factor.B]) == pytest.approx(expected, rel=1e-6)
    # Factor space: the numbers themselves, whatever the scaling.
    assert weighted_sum([adapter, adapter], [0.5, 1.5]).vector.tolist() == [6.0, 10.0]


def test_inner_products_are_those_of_the_dense_deltas() -> None:
    matrix = torch.stack([flat(dense(adapter)) for adapter in ADAPTERS])
    expected = matrix @ matrix.T
    scale = matrix.norm(dim=1)
    found = gram(ADAPTERS)
    assert torch.equal(found, found.T)
    assert float(((found - expected) / (scale[:, None] * scale)).abs().max()) < 1e-14
    for i, first in enumerate(ADAPTERS):
        assert norm(first) == pytest.approx(float(scale[i]), rel=1e-14)
        for j, second in enumerate(ADAPTERS):
            assert inner(first, second) == pytest.approx(float(expected[i, j]), abs=1e-13 * float(scale[i] * scale[j]))
            if i != j:
                assert distance(first, second) == pytest.approx(float((matrix[i] - matrix[j]).norm()), rel=1e-13)


def test_inner_products_of_float32_adapters_are_computed_in_float64() -> None:
    layout = layout_of(3, 12.5 / 3)
    first, second = random_adapter(layout, 0), random_adapter(layout, 1)
    expected = float(flat(dense(first)) @ flat(dense(second)))
    size = norm(first) * norm(second)
    assert inner(first, second) == pytest.approx(expected, abs=1e-14 * size)
    assert distance(first, Adapter.zeros(layout)) == pytest.approx(norm(first), rel=1e-14)


def test_distance_of_neighbours_keeps_its_digits() -> None:
    """B moves by 2^-26 in one direction, so the true distance is known; |x|^2 + |y|^2 - 2<x,y> has no digit left."""
    layout = layout_of(3, 2.0, {"q": (20, 30)}, head=None)
    first = random_adapter(layout, 0, torch.float64)
    first = Adapter(layout, (first.vector * 1024).round() / 1024)  # so that adding 2^-26 is exact
    second = first.clone()
    second["q", Factor.B][4, 1] += 2.0**-26
    expected = 2.0 * 2.0**-26 * float(first["q", Factor.A][1].norm())
    assert distance(first, second) == pytest.approx(expected, rel=1e-6)
    expanded = inner(first, first) + inner(second, second) - 2 * inner(first, second)
    assert abs(math.sqrt(max(expanded, 0)) - expected) > 0.1 * expected, "the naive formula would do; drop this test"


def test_distance_to_itself_and_symmetry() -> None:
    assert distance(ADAPTERS[0], ADAPTERS[0]) <= 1e-14 * norm(ADAPTERS[0])
    assert distance(ADAPTERS[0], ADAPTERS[1]) == pytest.approx(distance(ADAPTERS[1], ADAPTERS[0]), rel=1e-14)
    assert distance(Adapter.zeros(LAYOUTS[0]), Adapter.zeros(LAYOUTS[1])) == 0


def test_factor_sum_is_the_matrix_product() -> None:
    found = [random_adapter(LAYOUTS[0], seed) for seed in range(4)]
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, -1.0, 0.5, 0.0]])
    matrix = torch.stack([adapter.vector for adapter in found])
    product = combine_factors(found, weights)
    assert product.dtype == torch.float32
    assert torch.allclose(product.double(), weights.double() @ matrix.double(), atol=1e-6)
    single = weighted_sum(found, weights[0].tolist())
    assert torch.allclose(single.vector, product[0], atol=1e-7)
    assert single.layout == LAYOUTS[0]
    assert torch.equal(combine_factors(found, torch.eye(4)), matrix)


def test_factor_sum_per_module() -> None:
    found = [random_adapter(LAYOUTS[0], seed, torch.float64) for seed in range(3)]
    total = weighted_sum(found, PER_MODULE)
    for entry, tensor in total.items():
        expected = sum(
            c[entry.module] * tensor_of(adapter, entry.module, entry.factor)
            for adapter, c in zip(found, PER_MODULE, strict=True)
        )
        assert torch.allclose(tensor, torch.as_tensor(expected), rtol=1e-14, atol=1e-14)
    constant: list[Coefficient] = [dict.fromkeys(LAYOUTS[0].modules, c) for c in (0.5, 0.25, -1.0)]
    assert torch.allclose(
        weighted_sum(found, constant).vector, weighted_sum(found, [0.5, 0.25, -1.0]).vector, atol=1e-14
    )


def test_factor_sum_has_exactly_the_cross_term_that_is_stated() -> None:
    """(c x + d y) in factor space is c^2 Delta_x + d^2 Delta_y + c d s (B_x A_y + B_y A_x); heads stay linear."""
    x, y = (random_adapter(LAYOUTS[0], seed, torch.float64) for seed in range(2))
    c, d = 0.3, 1.7
    found = dense(weighted_sum([x, y], [c, d]))
    expected = dense_sum([x, y], [c * c, d * d])
    for module in ("q_proj", "v_proj"):
        ax, bx, ay, by = (tensor_of(z, module, factor) for z in (x, y) for factor in (Factor.A, Factor.B))
        expected[module] += c * d * LAYOUTS[0].scalings[module] * (bx @ ay + by @ ax)
    expected |= {name: m for name, m in dense_sum([x, y], [c, d]).items() if "." in name}
    assert_close(found, expected, 1e-14)


def test_factor_sum_with_a_common_a_is_the_sum_of_deltas() -> None:
    x, y = (random_adapter(LAYOUTS[0], seed, torch.float64) for seed in range(2))
    y = y.with_part(x.select([Factor.A]))
    assert_close(dense(weighted_sum([x, y], [0.25, 0.75])), dense_sum([x, y], [0.25, 0.75]), 1e-14)


def test_heads_are_linear_in_both_spaces() -> None:
    found = [random_adapter(LAYOUTS[0], seed, torch.float64) for seed in range(3)]
    coefficients: list[Coefficient] = [0.2, PER_MODULE[1], -3.0]
    for factor in (Factor.WEIGHT, Factor.BIAS):
        expected = sum(
            c * tensor_of(adapter, "classifier", factor) for adapter, c in zip(found, (0.2, 1 / 3, -3.0), strict=True)
        )
        for total in (weighted_sum(found, coefficients), stack(found, coefficients)):
            assert torch.allclose(total["classifier", factor], torch.as_tensor(expected), atol=1e-14)


def test_arguments_are_left_alone() -> None:
    found = [random_adapter(LAYOUTS[0], seed) for seed in range(2)]
    before = [bits(adapter.vector) for adapter in found]
    for total in (
        weighted_sum(found, [1.0, 1.0]),
        weighted_sum(found, [PER_MODULE[0], 1.0]),
        stack(found, [1.0, 1.0]),
        truncate(found[0], LAYOUTS[0]),
        weighted_sum(found[:1], [1.0]),
    ):
        total.vector.fill_(7)
    assert [bits(adapter.vector) for adapter in found] == before


OPERATIONS: dict[str, Callable[[Adapter, Adapter], object]] = {
    "stack": lambda x, y: stack([x, y], [1.0, 1.0]),
    "truncate": lambda x, y: truncate(y, x.layout),
    "inner": inner,
    "gram": lambda x, y: gram([x, y]),
    "distance": distance,
    "weighted sum": lambda x, y: weighted_sum([x, y], [1.0, 1.0]),
    "weighted sum per module": lambda x, y: weighted_sum([x, y], [1.0, PER_MODULE[0]]),
}
EXPECTED = layout_of()
MISMATCHES = {
    "base model other, expected base": layout_of(base="other"),
    "no tensor 'classifier.weight', expected one of shape (3, 5)": layout_of(head=None),
    "no tensor 'v_proj.A', expected one of shape (2, 6)": layout_of(sizes={"q_proj": (4, 5)}),
    "unknown tensor 'k_proj.A'": layout_of(sizes={"q_proj": (4, 5), "v_proj": (6, 3), "k_proj": (1, 1)}),
    "shape (2, 7) for 'v_proj.A', expected (2, 6)": layout_of(sizes={"q_proj": (4, 5), "v_proj": (7, 3)}),
    # Shapes of size 1 would broadcast without an error.
    "shape (1, 2) for 'v_proj.B', expected (3, 2)": layout_of(sizes={"q_proj": (4, 5), "v_proj": (6, 1)}),
    "shape (1, 5) for 'classifier.weight', expected (3, 5)": layout_of(head=(1, 5)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("difference", MISMATCHES)
def test_layouts_that_do_not_match_are_refused_by_name(operation: str, difference: str) -> None:
    with pytest.raises(LayoutError) as caught:
        OPERATIONS[operation](Adapter.zeros(EXPECTED), Adapter.zeros(MISMATCHES[difference]))
    assert difference in str(caught.value)


@pytest.mark.parametrize("operation", ["stack", "truncate", "inner", "gram", "distance"])
def test_where_ranks_may_differ_they_are_not_what_an_error_names(operation: str) -> None:
    other = layout_of(ranks=3, scalings=0.5, head=None)
    with pytest.raises(LayoutError) as caught:
        OPERATIONS[operation](Adapter.zeros(EXPECTED), Adapter.zeros(other))
    assert "no tensor 'classifier.weight'" in str(caught.value)


@pytest.mark.parametrize("difference", ["rank 3 for 'v_proj', expected 2", "scaling 1.0 for 'q_proj', expected 2.0"])
def test_factor_sums_need_equal_ranks_and_scalings(difference: str) -> None:
    other = {
        "rank 3 for 'v_proj', expected 2": layout_of(ranks={"q_proj": 2, "v_proj": 3}),
        "scaling 1.0 for 'q_proj', expected 2.0": layout_of(scalings={"q_proj": 1.0, "v_proj": 2.0}),
    }[difference]
    for coefficient in (1.0, PER_MODULE[0]):
        with pytest.raises(LayoutError, match=difference):
            weighted_sum([Adapter.zeros(EXPECTED), Adapter.zeros(other)], [1.0, coefficient])


@pytest.mark.parametrize("operation", ["stack", "inner", "distance"])
@pytest.mark.parametrize("factor", [Factor.A, Factor.B])
def test_half_an_adapter_has_no_delta(operation: str, factor: Factor) -> None:
    half = Adapter.zeros(EXPECTED.select([factor]))
    with pytest.raises(LayoutError, match=r"'q_proj' .*both"):
        OPERATIONS[operation](half, half)


def test_half_adapters_add_in_factor_space() -> None:
    half = random_adapter(EXPECTED.select([Factor.B]), 0)
    assert torch.equal(weighted_sum([half, half], [0.25, 0.75]).vector, half.vector)


def test_coefficients_that_do_not_fit_are_refused() -> None:
    adapter = Adapter.zeros(EXPECTED)
    for merge in (stack, weighted_sum):
        with pytest.raises(LayoutError, match="2 adapters and 1 coefficients"):
            merge([adapter, adapter], [1.0])
        with pytest.raises(LayoutError, match="0 adapters"):
            merge([], [])
        with pytest.raises(LayoutError, match="no coefficient for module 'v_proj'"):
            merge([adapter], [{"q_proj": 1.0, "classifier": 1.0}])
        for bad in (math.nan, math.inf):
            with pytest.raises(LayoutError, match="coefficient"):
                merge([adapter], [bad])
            with pytest.raises(LayoutError, match="'v_proj'"):
                merge([adapter], [{"q_proj": 1.0, "v_proj": bad, "classifier": 1.0}])
    for weights in (torch.ones(2), torch.ones(1, 3)):
        with pytest.raises(LayoutError, match=r"got weights.shape="):
            combine_factors([adapter, adapter], weights)
    assert coefficient_of(2, "anything") == 2.0


def test_modules_with_one_dimension_of_size_one() -> None:
    layout = layout_of(2, 2.0, {"q": (1, 1), "v": (1, 6)}, head=None)
    adapter = random_adapter(layout, 0, torch.float64)
    assert norm(adapter) == pytest.approx(float(flat(dense(adapter)).norm()), rel=1e-14)
    assert_close(dense(truncate(adapter, layout)), dense(adapter), 1e-12)
    entry = Entry("v", Factor.A, (2, 1))
    assert adapter.layout.by_name["v.A"] == entry


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_lie_where_the_arguments_lie(device: str) -> None:
    """Device "meta" has shapes and devices but no numbers: an operation that mixes devices fails there as on a GPU."""
    found = [Adapter(LAYOUTS[0], random_adapter(LAYOUTS[0], seed).vector.to(device)) for seed in range(2)]
    for total in (
        weighted_sum(found, [1.0, 2.0]),
        weighted_sum(found, [1.0, PER_MODULE[0]]),
        stack(found, [1.0, PER_MODULE[0]]),
        truncate(stack(found, [1.0, 2.0]), LAYOUTS[0]),
    ):
        assert total.vector.device.type == device


@pytest.mark.gpu
def test_closed_forms_agree_on_gpu_and_cpu() -> None:
    on_gpu = [Adapter(adapter.layout, adapter.vector.cuda()) for adapter in ADAPTERS]
    assert torch.allclose(gram(on_gpu), gram(ADAPTERS), rtol=1e-12)
    assert distance(on_gpu[0], on_gpu[1]) == pytest.approx(distance(ADAPTERS[0], ADAPTERS[1]), rel=1e-12)
    found, expected = (dense(truncate(stack(adapters, PER_MODULE), LAYOUTS[0])) for adapters in (on_gpu, ADAPTERS))
    assert_close({name: matrix.cpu() for name, matrix in found.items()}, expected, 1e-10)
