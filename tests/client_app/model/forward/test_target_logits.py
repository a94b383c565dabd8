"""Logits where there are targets: the same losses and gradients as from all positions, of every kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from client_app.data.targets import IGNORED, at_targets, target_mask
from client_app.kinds import example_losses, mean_loss
from client_app.model.forward.target_logits import TargetLogits

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama, tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2, soft-capped": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "granite, scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere, scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.5),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and labels ``[3, 9]``: an answer in the middle, one at the end, and a row without any."""
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3:6], labels[1, 7:] = ids[0, 3:6], ids[1, 7:]
    return ids, labels


def head_rows(module: Any) -> list[int]:
    """For how many positions the head computes logits at each call from now on."""
    rows: list[int] = []
    module.get_output_embeddings().register_forward_hook(lambda _, given, found: rows.append(found[..., 0].numel()))
    return rows


@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_and_gradients_are_those_of_all_positions(name: str) -> None:
    ids, labels = batch()
    found = {}
    for kind in ("targets", "everywhere"):
        module = built(name)
        module.requires_grad_(True)
        if kind == "targets":
            picked = TargetLogits(module)
            logits = picked(lambda module=module: module(input_ids=ids).logits, labels)  # type: ignore[misc]
            assert logits.shape == (5, 50)
            rows = head_rows(module)
            picked(lambda module=module: module(input_ids=ids).logits, labels)  # type: ignore[misc]
            assert rows == [5], picked.reason
        else:
            logits = module(input_ids=ids).logits
        loss = mean_loss("causal-lm", logits, labels)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        found[kind] = (loss.detach(), example_losses("causal-lm", logits, labels).detach(), gradients)
    for at_some, at_all in zip(found["targets"], found["everywhere"], strict=True):
        torch.testing.assert_close(at_some, at_all, rtol=1e-4, atol=1e-6)
    plain = functional.cross_entropy(
        built(name)(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    torch.testing.assert_close(found["targets"][0], plain.detach())


def test_a_prefix_of_images_shifts_nothing() -> None:
    _, labels = batch()
    with_prefix = torch.randn(3, 4 + 9, 6)
    expected = with_prefix[:, 4:][:, :-1][target_mask(labels)]
    assert torch.equal(at_targets(with_prefix, labels), expected)


def test_a_batch_without_targets_has_no_logits_and_no_loss() -> None:
    ids, labels = batch()
    labels = torch.full_like(labels, IGNORED)
    module = built("llama")
    logits = TargetLogits(module)(lambda: module(input_ids=ids).logits, labels)
    assert logits.shape == (0, 50)
    assert mean_loss("causal-lm", logits, labels).item() == 0


class Twice(nn.Module):
    """Calls its head for each half of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.head(half) for half in self.embed(ids).split(2)])


class Hidden(Twice):
    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "reason"), [(Twice, "calls its head 2 times"), (Hidden, "names no output embeddings")]
)
def test_a_model_that_hides_its_head_computes_logits_everywhere(kind: type[Twice], reason: str) -> None:
    ids, labels = batch()
    module = kind()
    picked = TargetLogits(module)
    for _ in range(2):
        assert torch.equal(picked(lambda: module(ids), labels), at_targets(module(ids), labels))
    assert reason in picked.reason
    assert not module.head._forward_pre_hooks
