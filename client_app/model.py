"""A frozen base model with a client's slots inside it: PEFT's LoRA layers, and heads as base plus differences."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.adapter import Adapter, scalings_from
from adapters.algebra import Coefficient, coefficient_of
from adapters.layout import Entry, Factor, Layout
from adapters.peft_format import module_pattern
from client_app.data import Base

Mixture = Mapping[str, Coefficient]
"""Coefficient by slot; the model is the base plus their sum."""
OWN_HEAD = "own-head"
"""The slot of heads that never leave the client: in every mixture, trained in every train step, in no plan."""


class ModelError(ValueError):
    """The base model lacks a module, an adapter does not fit it, or a mixture names a slot that is not loaded."""


class _Differences(nn.Module):
    """Parametrization of a head's parameter: base + sum of coefficient x difference over the active slots."""

    def __init__(self) -> None:
        super().__init__()
        self.by_slot = nn.ParameterDict()
        self.coefficients: dict[str, float] = {}

    def forward(self, base: Tensor) -> Tensor:
        for slot, coefficient in self.coefficients.items():
            base = base + (coefficient * self.by_slot[slot]).to(base.dtype)
        return base


class PersonalModel:
    """The base model, and the adapters that are loaded into it by slot name.

    LoRA layers are PEFT's own, one PEFT adapter per slot; a mixture sets which are active and scales them, so several
    slots act at once and can be trained inside the mixture. A slot may have ranks and scalings of its own.
    ``micro_batch`` bounds how many examples are computed at once (0: no bound); ``own_layout`` is that of the slot
    :data:`OWN_HEAD`, where the client's labels are its own.
    """

    micro_batch: int = 0

    def __init__(self, base: Base, rank: int, alpha: float, dropout: float = 0.0) -> None:
        self.base = base
        self.module = base.model
        self.module.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        modules = dict(self.module.named_modules())
        for name in (*base.targets, *base.heads, *base.own_heads):
            if not isinstance(modules.get(name), nn.Linear):
                raise ModelError(f"{base.name!r} has no linear module {name!r} to adapt")
            if name in base.targets and name in base.heads:
                raise ModelError(f"{base.name!r}: module {name!r} is a target and a head, expected only one of them")
        self.layout = self._layout(modules)
        own = tuple(_head_entries(modules, base.own_heads))
        self.own_layout = Layout(own, {}, base.fingerprint) if own else None
        self.heads = {
            f"{name}.{kind}": parameter.detach().clone()
            for name in (*base.heads, *base.own_heads)
            for kind, parameter in modules[name].named_parameters(recurse=False)
        }
        self._loaded: dict[str, Layout] = {}
        self._mixture: Mixture = {}
        self._differences: dict[str, _Differences] = {}
        for key in self.heads:
            name, kind = key.rsplit(".", 1)
            self._differences[key] = _Differences()
            parametrize.register_parametrization(modules[name], kind, self._differences[key], unsafe=True)

    @property
    def device(self) -> torch.device:
        """Where the base model lies."""
        return next(self.module.parameters()).device

    def load(self, slot: str, adapter: Adapter) -> None:
        """Put an adapter into a slot of the model; its ranks and scalings may differ from the client's own layout.

        A slot that is new, or whose layout changes, is not active until :meth:`activate`.

        Raises:
            ModelError: the adapter has another base, or a tensor that this base has no place for.
        """
        place = self.own_layout if slot == OWN_HEAD and self.own_layout is not None else self.layout
        difference = place.difference(adapter.layout, part=True, any_rank=True)
        if difference:
            raise ModelError(f"an adapter for slot {slot!r} does not fit {self.base.name!r}: found {difference}")
        if slot in self._loaded and self._loaded[slot].digest != adapter.layout.digest:
            self.unload(slot)
        if slot not in self._loaded:
            self._add(slot, adapter.layout)
        with torch.no_grad():
            for entry, tensor in adapter.items():
                self._parameter(slot, entry).copy_(tensor)

    def unload(self, slot: str) -> None:
        """Take a slot out of the model, and out of the mixture if it is active."""
        layout = self._layout_of(slot)
        self.activate({other: coefficient for other, coefficient in self._mixture.items() if other != slot})
        del self._loaded[slot]
        if slot == OWN_HEAD:
            self.activate(self._mixture)
        for name, layer in self._lora_layers().items():
            if name in layout.scalings:
                layer.delete_adapter(_inner(slot))
        for key, differences in self._differences.items():
            if key in layout.by_name:
                differences.by_slot.pop(_inner(slot))

    def unload_all(self) -> None:
        """Leave the base model alone, as it was before the first :meth:`load`."""
        for slot in list(self._loaded):
            self.unload(slot)
        self.module.eval()

    def read(self, slot: str) -> Adapter:
        """A copy of a slot's numbers, float32 on the CPU."""
        adapter = Adapter.zeros(self._layout_of(slot))
        with torch.no_grad():
            for entry, tensor in adapter.items():
                tensor.copy_(self._parameter(slot, entry))
        return adapter

    def activate(self, mixture: Mixture) -> None:
        """Make the model the base plus this mixture; nothing is trainable afterwards.

        Raises:
            ModelError: a slot is not loaded.
            LayoutError: a coefficient is not finite, or missing for a module of its slot.
        """
        if OWN_HEAD in self._loaded:
            mixture = {**mixture, OWN_HEAD: 1.0}
        layouts = {slot: self._layout_of(slot) for slot in mixture}
        coefficients = {
            slot: {module: coefficient_of(mixture[slot], module) for module in layout.modules}
            for slot, layout in layouts.items()
        }
        for name, layer in self._lora_layers().items():
            active = [slot for slot in mixture if name in layouts[slot].scalings]
            layer.set_adapter([_inner(slot) for slot in active], inference_mode=True)
            for slot in active:
                layer.scaling[_inner(slot)] = layouts[slot].scalings[name] * coefficients[slot][name]
        for key, differences in self._differences.items():
            module = key.rsplit(".", 1)[0]
            differences.coefficients = {
                _inner(slot): coefficients[slot][module] for slot in mixture if key in layouts[slot].by_name
            }
        self.module.requires_grad_(False)
        self._mixture = {slot: coefficient for slot, coefficient in mixture.items() if slot != OWN_HEAD}

    def trainable(self, slot: str, part: Layout) -> dict[str, nn.Parameter]:
        """Let the tensors of ``part`` in ``slot`` be trained; returns them by entry name."""
        found = {}
        for entry in part.entries:
            parameter = self._parameter(slot, entry)
            parameter.requires_grad_(True)
            found[entry.name] = parameter
        return found

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's logits for a batch of inputs."""
        output: Tensor = self.module(**inputs).logits
        return output

    def _layout(self, modules: Mapping[str, nn.Module]) -> Layout:
        entries: list[Entry] = []
        for name in self.base.targets:
            linear = modules[name]
            assert isinstance(linear, nn.Linear)
            entries.append(Entry(name, Factor.A, (self.rank, linear.in_features)))
            entries.append(Entry(name, Factor.B, (linear.out_features, self.rank)))
        entries.extend(_head_entries(modules, self.base.heads))
        scalings = scalings_from(dict.fromkeys(self.base.targets, self.rank), self.alpha)
        return Layout(tuple(entries), scalings, self.base.fingerprint)

    def _add(self, slot: str, layout: Layout) -> None:
        if layout.lora_modules:
            common = Counter(layout.ranks.values()).most_common(1)[0][0]
            config = LoraConfig(
                r=common,
                lora_alpha=common,  # an int for PEFT, and of no effect: activate() sets the scalings
                rank_pattern={module_pattern(name): rank for name, rank in layout.ranks.items() if rank != common},
                # A list would also match every module whose name ends in one of these.
                target_modules="|".join(module_pattern(name) for name in layout.lora_modules),
                lora_dropout=self.dropout,
            )
            with warnings.catch_warnings():
                # Several adapters are the point here.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(config, self.module, adapter_name=_inner(slot))
            for parameter in self._lora_parameters(slot):
                parameter.data = parameter.data.float()  # adapters are float32 over a base of any dtype
            self.module.train(self.module.training)  # PEFT's new dropout is in training mode whatever the model is in
        for key, differences in self._differences.items():
            if key in layout.by_name:
                zeros = torch.zeros_like(self.heads[key], device=self.device, dtype=torch.float32)
                differences.by_slot[_inner(slot)] = nn.Parameter(zeros)
        self._loaded[slot] = layout
        self.activate(self._mixture)

    def _lora_layers(self) -> dict[str, LoraLayer]:
        return {name: module for name, module in self.module.named_modules() if isinstance(module, LoraLayer)}

    def _lora_parameters(self, slot: str) -> list[nn.Parameter]:
        inner = _inner(slot)
        tables = [table for layer in self._lora_layers().values() for table in (layer.lora_A, layer.lora_B)]
        return [parameter for table in tables if inner in table for parameter in table[inner].parameters()]

    def _layout_of(self, slot: str) -> Layout:
        if slot not in self._loaded:
            raise ModelError(f"slot {slot!r} is not loaded; loaded: {', '.join(self._loaded) or 'none'}")
        return self._loaded[slot]

    def _parameter(self, slot: str, entry: Entry) -> nn.Parameter:
        if entry.factor.is_lora:
            layer = self.module.get_submodule(entry.module)
            assert isinstance(layer, LoraLayer)
            parameter = (layer.lora_A if entry.factor is Factor.A else layer.lora_B)[_inner(slot)].weight
        else:
            parameter = self._differences[entry.name].by_slot[_inner(slot)]
        assert isinstance(parameter, nn.Parameter)
        return parameter


def _head_entries(modules: Mapping[str, nn.Module], heads: Iterable[str]) -> list[Entry]:
    return [
        Entry(name, Factor(kind), tuple(parameter.shape))
        for name in heads
        for kind, parameter in modules[name].named_parameters(recurse=False)
    ]


def _inner(slot: str) -> str:
    """A slot's name inside PyTorch's containers, where names of their methods ("train", "float", "keys") are taken."""
    return f"slot-{slot}"


def modules_ending_with(model: nn.Module, suffixes: Iterable[str]) -> tuple[str, ...]:
    """Names of linear modules whose last part is one of ``suffixes``, in the model's order."""
    wanted = set(suffixes)
    return tuple(
        name
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in wanted and isinstance(module, nn.Linear)
    )
