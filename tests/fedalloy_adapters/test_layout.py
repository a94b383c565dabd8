from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalloy_adapters.layout import (
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    MAX_SIZE,
    Entry,
    Factor,
    Layout,
    LayoutError,
    factor_from_proto,
    factor_to_proto,
)
from fedalloy_adapters.parts import layout_of_part, layouts_of_plan
from proto.fedalloy.v1 import adapter_pb2, plan_pb2
from tests.fedalloy_adapters.samples import examples, layout_of, layouts


@examples(100)
@given(layouts())
def test_every_layout_survives_the_wire(layout: Layout) -> None:
    message = adapter_pb2.Layout.FromString(layout.to_proto().SerializeToString())
    assert Layout.from_proto(message) == layout
    assert Layout.from_proto(message).digest == layout.digest


@examples(50)
@given(layouts(), st.randoms(use_true_random=False))
def test_digest_does_not_depend_on_the_order_of_scalings(layout: Layout, random: Any) -> None:
    message = layout.to_proto()
    scalings = list(message.scalings)
    random.shuffle(scalings)
    del message.scalings[:]
    message.scalings.extend(scalings)
    shuffled = Layout.from_proto(message)
    assert shuffled.digest == layout.digest
    assert shuffled == layout
    assert hash(shuffled) == hash(layout)


@examples(50)
@given(layouts())
def test_slices_tile_the_vector_in_the_order_of_entries(layout: Layout) -> None:
    position = 0
    for entry in layout.entries:
        found = layout.slice_of(entry.name)
        assert (found.start, found.stop) == (position, position + math.prod(entry.shape))
        position = found.stop
    assert position == layout.size


def test_facts_about_a_layout() -> None:
    layout = layout_of(ranks={"q_proj": 2, "v_proj": 3}, scalings={"q_proj": 2.0, "v_proj": 0.5})
    assert layout.size == 2 * 4 + 5 * 2 + 3 * 6 + 3 * 3 + 15 + 3
    assert layout.modules == ("q_proj", "v_proj", "classifier")
    assert layout.lora_modules == ("q_proj", "v_proj")
    assert layout.ranks == {"q_proj": 2, "v_proj": 3}
    assert layout.by_name["v_proj.B"] == Entry("v_proj", Factor.B, (3, 3))


REFERENCE = layout_of()
A, B = Entry("q", Factor.A, (2, 4)), Entry("q", Factor.B, (5, 2))

DIFFERENT = {
    "base": layout_of(base="other"),
    "scaling": layout_of(scalings={"q_proj": 2.0, "v_proj": math.nextafter(2.0, 3.0)}),
    "rank": layout_of(ranks={"q_proj": 2, "v_proj": 3}),
    "shape": layout_of(sizes={"q_proj": (4, 5), "v_proj": (6, 4)}),
    "module": layout_of(sizes={"q_proj": (4, 5), "k_proj": (6, 3)}),
    "transposed head": layout_of(head=(5, 3)),
    "no head": layout_of(head=None),
    "order": Layout(REFERENCE.entries[::-1], REFERENCE.scalings, "base"),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_digest_changes_with_everything(change: str) -> None:
    assert DIFFERENT[change].digest != REFERENCE.digest
    assert DIFFERENT[change] != REFERENCE


DESCRIPTIONS = {
    "base": "base model other, expected base",
    "scaling": "scaling 2.0000000000000004 for 'v_proj', expected 2.0",
    "rank": "rank 3 for 'v_proj', expected 2",
    "shape": "shape (4, 2) for 'v_proj.B', expected (3, 2)",
    "module": "no tensor 'v_proj.A', expected one of shape (2, 6)",
    "transposed head": "shape (5, 3) for 'classifier.weight', expected (3, 5)",
    "no head": "no tensor 'classifier.weight', expected one of shape (3, 5)",
    "order": "the same tensors in another order",
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_difference_names_expectation_and_finding(change: str) -> None:
    assert DESCRIPTIONS[change] in REFERENCE.describe_difference(DIFFERENT[change])


def test_difference_of_equal_and_of_larger_layouts() -> None:
    assert REFERENCE.describe_difference(layout_of()) == "no difference"
    assert layout_of(head=None).describe_difference(REFERENCE) == "unknown tensor 'classifier.weight'"


def test_difference_of_bases_is_visible_though_fingerprints_begin_alike() -> None:
    first, second = layout_of(base="digits-vit-48x3-a"), layout_of(base="digits-vit-48x3-b")
    assert "digits-vit-48x3-b, expected digits-vit-48x3-a" in first.describe_difference(second)


MANY = tuple(Entry(f"m{i}", Factor.BIAS, (1,)) for i in range(3))
INVALID: dict[str, tuple[tuple[Entry, ...], dict[str, float], str, str]] = {
    "no entries": ((), {}, "base", "at least one"),
    "same tensor twice": ((A, A), {"q": 1.0}, "base", "'q.A' occurs twice"),
    "two ranks": ((A, Entry("q", Factor.B, (5, 3))), {"q": 1.0}, "base", "rank 2 in one factor, 3"),
    "no scaling": ((A, B), {}, "base", "'q'"),
    "scaling without module": ((A, B), {"q": 1.0, "k": 1.0}, "base", "'k'"),
    "scaling of a head": ((Entry("h", Factor.BIAS, (3,)),), {"h": 1.0}, "base", "'h'"),
    "scaling zero": ((A, B), {"q": 0.0}, "base", "scaling 0.0 for 'q'"),
    "scaling negative": ((A, B), {"q": -2.0}, "base", "scaling -2.0"),
    "scaling NaN": ((A, B), {"q": math.nan}, "base", "scaling nan"),
    "scaling infinite": ((A, B), {"q": math.inf}, "base", "scaling inf"),
    "LoRA with one dimension": ((Entry("q", Factor.A, (4,)),), {"q": 1.0}, "base", "two dimensions"),
    "LoRA with three dimensions": ((Entry("q", Factor.B, (4, 2, 1)),), {"q": 1.0}, "base", "two dimensions"),
    "no dimensions": ((Entry("h", Factor.WEIGHT, ()),), {}, "base", "0 dimensions"),
    "nine dimensions": ((Entry("h", Factor.WEIGHT, (1,) * 9),), {}, "base", "9 dimensions"),
    "size zero": ((Entry("h", Factor.WEIGHT, (3, 0)),), {}, "base", "(3, 0)"),
    "size negative": ((Entry("h", Factor.WEIGHT, (-3,)),), {}, "base", "(-3,)"),
    "size too large": ((Entry("h", Factor.WEIGHT, (MAX_SIZE + 1,)),), {}, "base", "2147483648"),
    "module without name": ((Entry("", Factor.BIAS, (1,)),), {}, "base", "module name ''"),
    "module with newline": ((Entry("a\nb", Factor.BIAS, (1,)),), {}, "base", r"'a\nb'"),
    "module with NUL": ((Entry("a\0", Factor.BIAS, (1,)),), {}, "base", "module name"),
    "module with direction mark": ((Entry("a\u202eb", Factor.BIAS, (1,)),), {}, "base", "module name"),
    "module with half a surrogate": ((Entry("a\ud800", Factor.BIAS, (1,)),), {}, "base", "module name"),
    "module too long": ((Entry("é" * 257, Factor.BIAS, (1,)),), {}, "base", "512 bytes"),
    "no base": (MANY, {}, "", "base fingerprint name ''"),
    "base with tab": (MANY, {}, "a\tb", "base fingerprint"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_layouts_are_refused(case: str) -> None:
    entries, scalings, base, text = INVALID[case]
    with pytest.raises(LayoutError) as caught:
        Layout(entries, scalings, base)
    assert text in str(caught.value)


def test_limits_themselves_are_allowed() -> None:
    name = "é" * (MAX_NAME_BYTES // 2)
    shape = (1,) * (MAX_DIMENSIONS - 1) + (MAX_SIZE,)
    assert Layout((Entry(name, Factor.WEIGHT, shape),), {}, name).size == MAX_SIZE
    assert Layout((A,), {"q": 5e-324}, "base").ranks == {"q": 2}


def test_a_stranger_cannot_make_errors_long() -> None:
    message = REFERENCE.to_proto()
    message.scalings.add(module="x\n" * 100_000, scaling=1.0)
    with pytest.raises(LayoutError) as caught:
        Layout.from_proto(message)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_wire_message_with_two_scalings_for_a_module_is_refused() -> None:
    message = REFERENCE.to_proto()
    message.scalings.add(module="q_proj", scaling=2.0)
    with pytest.raises(LayoutError, match="two scalings"):
        Layout.from_proto(message)


def test_factors_have_wire_numbers_and_others_are_refused() -> None:
    assert [factor_from_proto(factor_to_proto(factor)) for factor in Factor] == list(Factor)
    for number in (0, 9, -1, 2**31 - 1):
        with pytest.raises(LayoutError, match=str(number)):
            factor_from_proto(number)


def test_select_keeps_order_and_only_the_scalings_it_needs() -> None:
    part = REFERENCE.select([Factor.WEIGHT, Factor.B])
    assert [entry.name for entry in part.entries] == ["q_proj.B", "v_proj.B", "classifier.weight"]
    assert part.scalings == {"q_proj": 2.0, "v_proj": 2.0}
    assert REFERENCE.select(modules=["classifier"]).scalings == {}
    assert [entry.name for entry in REFERENCE.select([Factor.A], ["v_proj"]).entries] == ["v_proj.A"]
    assert REFERENCE.select() is REFERENCE
    assert REFERENCE.contains(part)
    assert not part.contains(REFERENCE)


def test_select_refuses_unknown_modules_and_empty_selections() -> None:
    with pytest.raises(LayoutError, match="no module 'k_proj'"):
        REFERENCE.select(modules=["q_proj", "k_proj"])
    with pytest.raises(LayoutError, match="select nothing"):
        REFERENCE.select([Factor.A], ["classifier"])
    with pytest.raises(LayoutError, match="select nothing"):
        layout_of(head=None).select([Factor.WEIGHT])


@pytest.mark.parametrize("change", ["base", "scaling", "rank", "shape", "module", "transposed head"])
def test_contains_compares_shapes_scalings_and_base(change: str) -> None:
    assert not REFERENCE.contains(DIFFERENT[change])


def test_parts_of_a_plan_are_known_by_digest() -> None:
    part = plan_pb2.Part(factors=[adapter_pb2.FACTOR_B], modules=["v_proj"])
    assert layout_of_part(REFERENCE, part) == REFERENCE.select([Factor.B], ["v_proj"])
    assert layout_of_part(REFERENCE, plan_pb2.Part()) == REFERENCE
    steps = [plan_pb2.Step(send=plan_pb2.SendStep(slot="a", part=part)), plan_pb2.Step(save=plan_pb2.SaveStep())]
    known = layouts_of_plan(REFERENCE, steps)
    assert set(known) == {REFERENCE.digest, REFERENCE.select([Factor.B], ["v_proj"]).digest}
    assert all(layout.digest == digest for digest, layout in known.items())
    with pytest.raises(LayoutError, match="unknown factor number 0"):
        layout_of_part(REFERENCE, plan_pb2.Part(factors=[adapter_pb2.FACTOR_UNSPECIFIED]))


def test_the_head_is_what_has_no_factors() -> None:
    entries = (Entry("score", Factor.WEIGHT, (2, 4)), Entry("q", Factor.A, (1, 4)), Entry("q", Factor.B, (4, 1)))
    layout = Layout(
        (*entries, Entry("score", Factor.BIAS, (2,)), Entry("norm", Factor.WEIGHT, (4, 4))), {"q": 1.0}, "b"
    )
    assert layout.head_modules == ("score", "norm")
    assert layout.select([Factor.A, Factor.B]).head_modules == ()
