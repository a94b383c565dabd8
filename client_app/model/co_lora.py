"""What PEFT's LoRA layers lack, as a variant of them: P and Q between A and B, and learned gates.

One term of a mixture at one module adds ``g(x) s (drop(x) A^T P + Q) B^T`` to the module's output, where P, Q and the
gate g may each be absent. PEFT's ``LoraVariant`` is its extension point for such layers; A, B, dropout, scaling, which
adapters are active, and deletion stay PEFT's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers import Cache

from client_app.data.dataset import MASK, mean_of_tokens
from client_app.data.targets import IGNORED
from fedalloy_adapters.layout import Factor

SHARED_FACTORS = {Factor.P: "lora_P", Factor.Q: "lora_Q"}
_PROMPTS = "prompts"


@dataclass(frozen=True)
class Gate:
    """A learned coefficient in a mixture: ``sigmoid`` of the module's gate in a slot, or one minus it."""

    slot: str
    complement: bool = False


class GateError(ValueError):
    """A gate cannot be computed from the model's inputs."""


class GateContext:
    """What an input-dependent gate needs to know about the forward pass that it is part of.

    Attach it to a model: it sees which tokens are padding, and keeps the gates of the last pass over a whole input, so
    that token-by-token generation continues with the prompt's gates.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.decoding = False
        self._kept: dict[str, Tensor] = {}
        self._prompts: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Look at the keyword arguments of every forward pass of ``model``."""
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def with_prompts(self, inputs: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """A language model's inputs, with a mask ``[b, L]`` of the tokens before each text's first target.

        A gate that saw the whole text would see the answer that the loss asks for. A text without a prompt has its
        first token as one; nothing predicts that token.

        Args:
            inputs: texts, padded on the right.
            labels: ``[b, L]``; other shapes are not those of a language model's texts, and get no mask.
        """
        ids = inputs.get("input_ids")
        if ids is None or labels.shape != ids.shape:
            return dict(inputs)
        prompts = (labels != IGNORED).cumsum(dim=1) == 0
        prompts[:, 0] = True
        return {**inputs, _PROMPTS: prompts & inputs.get(MASK, torch.ones_like(labels)).bool()}

    def take(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's own inputs; the gates of its next pass see the prompts that :meth:`with_prompts` has marked."""
        others = dict(inputs)
        self._prompts = others.pop(_PROMPTS, None)
        return others

    def weights(self, module: str, x: Tensor, gate: Tensor) -> Tensor:
        """``sigmoid(mean over tokens of x . gate)``, one for each example: shape ``[b, 1, ..]`` to multiply ``x``.

        Where a text has targets, the mean is over the tokens of its prompt, as when the model writes.

        Args:
            module: the module that the gate belongs to.
            x: the module's input, ``[b, d_in]`` or ``[b, T, d_in]``.
            gate: ``[d_in]``; or ``[1, d_in]``: ``sigmoid(x . gate)``, one for each token, ``[b, T, 1]``.
        """
        if gate.ndim == 2:
            return torch.sigmoid(x @ gate.to(x.dtype).T)
        if self.decoding and module in self._kept:
            return self._kept[module]
        scores = (x @ gate.to(x.dtype)).reshape(x.shape[0], -1)  # [b, T], or [b, 1]
        if self.mask is not None and scores.shape[1] > 1:
            if self.mask.shape != scores.shape:
                raise GateError(
                    f"module {module!r} gets {tuple(scores.shape)} (examples, tokens), but the attention mask is "
                    f"{tuple(self.mask.shape)}"
                )
            mean = mean_of_tokens(scores[..., None], self.mask)[:, 0]
        else:
            mean = scores.mean(dim=1)
        found = torch.sigmoid(mean).reshape(-1, *[1] * (x.ndim - 1))
        self._kept[module] = found.detach()
        return found

    def _look(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self._prompts is not None:
            self.mask, self._prompts = self._prompts, None
        self.decoding = any(_holds_tokens(value) for value in (*arguments, *keywords.values()))
        if not self.decoding:
            self._kept = {}


def _holds_tokens(argument: Any) -> bool:
    """Whether this argument of a forward pass is a cache with earlier tokens, so that the pass continues a text.

    A cache is recognised by its type, because transformers has renamed the argument: it is ``past_key_values`` or
    ``cache_params`` up to 5.23, and ``cache`` from 5.24 on.
    """
    if not isinstance(argument, Cache):
        return False
    try:
        return int(argument.get_seq_length()) > 0
    except ValueError:  # no attention layers: the other layers keep a state and count no tokens
        return bool(argument.has_previous_state())


@dataclass(frozen=True)
class ModuleGate:
    """One module's gate in one term of the active mixture."""

    module: str
    parameter: nn.Parameter
    complement: bool
    context: GateContext

    def __call__(self, x: Tensor) -> Tensor:
        """The coefficient that multiplies the term's output; ``x`` is the module's input."""
        if self.parameter.shape == (1,):
            weight = torch.sigmoid(self.parameter)
        else:
            weight = self.context.weights(self.module, x, self.parameter)
        return 1 - weight if self.complement else weight


class TermVariant(LoraVariant):
    """One slot's term at one module: see the module's docstring."""

    def __init__(self, gate: ModuleGate | None = None) -> None:
        self.gate = gate

    # PEFT's own variants are static; it calls them on the instance, and this one has a gate to remember.
    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """``result`` plus this term."""
        hidden: Tensor = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        p, q = (getattr(module, name, {}) for name in SHARED_FACTORS.values())
        if active_adapter in p:
            hidden = hidden @ p[active_adapter]
        if active_adapter in q:
            hidden = hidden + q[active_adapter]
        update = module.lora_B[active_adapter](hidden) * module.scaling[active_adapter]
        # A gate's scores are means of products; bfloat16 has three digits for them.
        total: Tensor = result + (update if self.gate is None else self.gate(x.to(update.dtype)) * update)
        return total


def add_factor(layer: LoraLayer, slot: str, factor: Factor, shape: tuple[int, ...]) -> None:
    """Give a slot P or Q of zeros at one of PEFT's layers; PEFT's own bookkeeping then covers it."""
    name = SHARED_FACTORS[factor]
    if not hasattr(layer, name):
        setattr(layer, name, nn.ParameterDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, name)
    weight: Any = layer.lora_A[slot].weight
    getattr(layer, name)[slot] = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
