"""Alignment of A and B: group 12 of the specification's invariants, and the file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from client_app.data.dataset import Base, Dataset, LazyDataset, Read
from client_app.model import alignment
from client_app.model.alignment import (
    AlignmentError,
    AlignOptions,
    align,
    basis_of,
    column_penalty,
    fit_a,
    load_alignment,
    recolouring,
)
from client_app.model.personal import ModelError, PersonalModel
from fedalloy_adapters.adapter import Adapter, polar
from fedalloy_adapters.layout import Factor

QUICK = AlignOptions(steps=60, batch_size=4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model_of(width: int, depth: int, seed: int = 0, blocks: int = 2, rank: int = 3) -> PersonalModel:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=2 * width,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    module = LlamaForSequenceClassification(config).eval()
    targets = tuple(
        n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith(("q_proj", "up_proj"))
    )
    return PersonalModel(Base(f"llama-{width}", module, f"{width:02d}" * 32, targets, ()), rank, 6.0, blocks=blocks)


def text(count: int = 12) -> Dataset:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 20, (count, 5), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 3:] = 0
    return Dataset({"input_ids": tokens, "attention_mask": mask}, torch.zeros(count, dtype=torch.long))


def dense_form(z_t: Tensor, z_p: Tensor, b_t: Tensor, b_p: Tensor, ridge: float) -> Tensor:
    """The authors' ``d x d`` computation, from outputs instead of activations."""

    def root(matrix: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values**power @ vectors.T

    x_t, x_p = z_t @ b_t.T, z_p @ b_p.T
    s_tt = x_t.T @ x_t + ridge * torch.eye(len(b_t), dtype=torch.float64)
    s_pp = x_p.T @ x_p + ridge * torch.eye(len(b_p), dtype=torch.float64)
    u, _, v_t = torch.linalg.svd(root(s_tt, -0.5) @ x_t.T @ x_p @ root(s_pp, -0.5))
    rank = z_t.shape[1]
    return root(s_tt, 0.5) @ u[:, :rank] @ v_t[:rank] @ root(s_pp, -0.5) @ b_p


def test_the_small_form_of_stage_b_is_the_dense_one() -> None:
    z_p = draw(50, 3)
    z_t = 0.5 * z_p + draw(50, 3, seed=1)
    z_p, z_t = z_p - z_p.mean(dim=0), z_t - z_t.mean(dim=0)
    b_t, b_p = polar(draw(9, 3, seed=2)), polar(draw(7, 3, seed=3))
    expected = dense_form(z_t, z_p, b_t, b_p, 1e-4)
    found = b_t @ recolouring(z_t.T @ z_t, z_p.T @ z_p, z_t.T @ z_p, 1e-4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_equal_activations_need_no_recolouring() -> None:
    z = draw(40, 4)
    gram = z.T @ z
    torch.testing.assert_close(
        recolouring(gram, gram, gram, 1e-4), torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0
    )


def test_an_identical_model_that_starts_at_the_pivots_a_stays_there() -> None:
    a, x = polar(draw(3, 8)), draw(100, 8, seed=1)
    z = x @ a.T
    found = fit_a(a, x.T @ x / 100, x.T @ z / 100, AlignOptions(penalty=0.0, steps=50))
    torch.testing.assert_close(found, a, atol=1e-3, rtol=0)  # Adam's steps do not get smaller with the gradient
    assert float((x @ found.T - z).square().mean()) < 1e-6


def test_the_column_penalty_is_the_mean_squared_cosine_and_has_welchs_floor() -> None:
    a = draw(3, 7)
    unit = a / a.norm(dim=0)
    pairs = [float(unit[:, i] @ unit[:, j]) ** 2 for i in range(7) for j in range(7) if i != j]
    assert float(column_penalty(a)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    floor = (6 - 3) / (3 * 5)
    tight = torch.cat([torch.eye(3), torch.eye(3)], dim=1).double()
    assert float(column_penalty(tight)) == pytest.approx(floor)
    assert all(float(column_penalty(draw(3, 6, seed=seed))) >= floor for seed in range(20))


def test_stage_a_finds_the_map_that_explains_the_pivot() -> None:
    truth = polar(draw(3, 8))
    x = draw(400, 8, seed=1)
    found = fit_a(polar(draw(3, 8, seed=2)), x.T @ x / 400, x.T @ (x @ truth.T) / 400, AlignOptions(penalty=0.0))
    torch.testing.assert_close(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found, truth, atol=1e-2, rtol=0)


def test_aligned_models_start_from_the_file_and_the_pivot_is_orthonormal(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 5)
    said: list[tuple[str, int, int]] = []
    path = align(pivot, [target], [text()] * 2, tmp_path, QUICK, lambda *news: said.append(news))
    assert {what for what, _, _ in said} == {"reading for llama-24", "fitting llama-24"}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    for model in (pivot, target):
        basis = load_alignment(tmp_path, path.stem, model.layout)
        for module in basis.layout.lora_modules:
            a = basis[module, Factor.A]
            torch.testing.assert_close(a @ a.T, torch.eye(3), atol=1e-5, rtol=0)
            if model is pivot:
                b = basis[module, Factor.B]
                torch.testing.assert_close(b.T @ b, torch.eye(3), atol=1e-5, rtol=0)
        model.align(basis)
        start = model.initial(77)
        assert torch.equal(basis_of(start).vector, basis.vector)
        assert start["model.layers.0.self_attn.q_proj", Factor.A].any()
    with pytest.raises(ModelError, match="the alignment does not fit 'llama-16'"):
        pivot.align(load_alignment(tmp_path, path.stem, target.layout))


def test_alignment_brings_the_activations_of_the_models_together(tmp_path: Path) -> None:
    """Its purpose: afterwards, A x is more alike in both models than before."""
    pivot, target = model_of(16, 2), model_of(24, 4)
    data = text(60)
    path = align(pivot, [target], [data] * 2, tmp_path, AlignOptions(steps=300, batch_size=16))

    def correlation(bases: dict[str, Adapter]) -> float:
        ours, theirs = (alignment._inputs(model, data) for model in (target, pivot))
        found = []
        for name in ours:
            z_t, z_p = (
                inputs[name] @ bases[model.base.name][module_of(model, name), Factor.A].double().T
                for inputs, model in ((ours, target), (theirs, pivot))
            )
            z_t, z_p = z_t - z_t.mean(dim=0), z_p - z_p.mean(dim=0)
            found.append(float((z_t * z_p).sum() / (z_t.norm() * z_p.norm())))
        return sum(found) / len(found)

    random = {model.base.name: basis_of(model.initial(0)) for model in (pivot, target)}
    aligned = {model.base.name: load_alignment(tmp_path, path.stem, model.layout) for model in (pivot, target)}
    assert correlation(aligned) > correlation(random) + 0.2


def module_of(model: PersonalModel, name: str) -> str:
    return {shared: module for module, shared in model.layout.shared_names.items()}[name]


def test_a_stopped_alignment_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pivot, target, data = model_of(16, 2), model_of(24, 3), text(20)
    whole = align(pivot, [target], [data] * 2, tmp_path / "whole", QUICK)
    monkeypatch.setattr(alignment, "_SAVE_EVERY", 2)
    read: list[int] = []

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("reading") and done == 12:
            raise Stop

    with pytest.raises(Stop):
        align(pivot, [target], [data] * 2, tmp_path / "stopped", QUICK, stop)
    assert [path.name.startswith(".partial-") for path in (tmp_path / "stopped").iterdir()] == [True]
    again = align(pivot, [target], [data] * 2, tmp_path / "stopped", QUICK, lambda what, done, total: read.append(done))
    assert read[0] == 8
    assert again.name == whole.name
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [whole.name]


def test_a_missing_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 2)
    path = align(pivot, [target], [text()] * 2, tmp_path, QUICK)
    with pytest.raises(AlignmentError, match="no alignment 'abc' in"):
        load_alignment(tmp_path, "abc", pivot.layout)
    with pytest.raises(AlignmentError, match=r"nothing for '.*' of base model 3232"):
        load_alignment(tmp_path, path.stem, model_of(32, 2).layout)
    with pytest.raises(AlignmentError, match=r"has shape \(3, 16\) for .*expected \(2, 16\)"):
        load_alignment(tmp_path, path.stem, model_of(16, 2, rank=2).layout)
    for content, message in (
        (save(load_file(path), metadata={"fedalloy": '{"format": "fedalloy.alignment.v2"}'}), "has format .*v2'"),
        (save(load_file(path)), "has format None, expected 'fedalloy.alignment.v1'"),
        (path.read_bytes()[:100], "is damaged"),
    ):
        digest = hashlib.sha256(content).hexdigest()
        (tmp_path / f"{digest}.safetensors").write_bytes(content)
        with pytest.raises(AlignmentError, match=message):
            load_alignment(tmp_path, digest, pivot.layout)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(AlignmentError, match="has the hash"):
        load_alignment(tmp_path, path.stem, pivot.layout)
    with pytest.raises(AlignmentError, match="'llama-24' shares"):
        align(pivot, [model_of(24, 2, blocks=1)], [text()] * 2, tmp_path, QUICK)


def test_models_with_other_tokens_cannot_be_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pivot, target = model_of(16, 2), model_of(24, 2)
    inputs = alignment._inputs

    def halved(model: PersonalModel, batch: Dataset) -> Any:
        found = inputs(model, batch)
        return {name: x[::2] for name, x in found.items()} if model is pivot else found

    monkeypatch.setattr(alignment, "_inputs", halved)
    with pytest.raises(AlignmentError, match="divide their inputs differently"):
        align(pivot, [target], [text()] * 2, tmp_path, QUICK)


def test_texts_of_other_lengths_cannot_be_aligned(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 2)
    longer = text()
    mask = longer.inputs["attention_mask"].clone()
    mask[2, 4] = 0
    mask[0, 3] = 1  # as many in all
    other = Dataset({**longer.inputs, "attention_mask": mask}, longer.labels)
    with pytest.raises(AlignmentError, match="a text has 3 tokens for one model and 4 for the other"):
        align(pivot, [target], [text(), other], tmp_path, QUICK)


def test_what_was_kept_of_other_images_is_not_gone_on_from(tmp_path: Path) -> None:
    pivot, target = model_of(16, 2), model_of(24, 2)
    labels = torch.zeros(3, dtype=torch.long)
    names = set()
    for value in (0.0, 1.0):
        images = LazyDataset(
            {}, labels, read=lambda at, value=value: Read({"pixel_values": torch.full((len(at), 2), value)})
        )
        names.add(alignment._partial(tmp_path, pivot, target, QUICK, [images] * 2))
    assert len(names) == 2
