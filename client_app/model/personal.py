"""A frozen base model with a client's slots inside it: PEFT's LoRA layers, and heads as base plus differences."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from client_app.data.dataset import Base
from client_app.model.bases.heads import Differences, head_entries
from client_app.model.co_lora import SHARED_FACTORS, Gate, GateContext, ModuleGate, TermVariant, add_factor
from client_app.model.forward.narrow_input import keep_narrow
from client_app.model.forward.padding import (
    ALONE,
    MASK,
    RIGHT,
    Read,
    arranged,
    inputs_taken,
    logits_in,
    one_by_one,
    set_training,
)
from client_app.model.forward.target_logits import TargetLogits
from client_app.model.forward.target_losses import AtTargets, TargetLosses
from client_app.model.linear_modules import features_of
from client_app.model.module_roles import RoleError, shared_names
from fedalloy_adapters.adapter import Adapter, scalings_from
from fedalloy_adapters.algebra import Coefficient, coefficient_of
from fedalloy_adapters.files.peft_format import module_pattern
from fedalloy_adapters.layout import Entry, Factor, Layout

Mixture = Mapping[str, Coefficient | Gate]
"""Coefficient by slot; the model is the base plus their sum."""


class ModelError(ValueError):
    """The base model lacks a module, an adapter does not fit it, or a mixture names a slot that is not loaded."""


class PersonalModel:
    """The base model, and the adapters that are loaded into it by slot name.

    LoRA layers are PEFT's own, one PEFT adapter per slot; a mixture sets which are active and scales them, so several
    slots act at once and can be trained inside the mixture. A slot may have ranks and scalings of its own. A slot of
    gates holds a mixture's learned coefficients. ``micro_batch`` bounds how many examples are computed at once (0: no
    bound). ``packing`` lets training texts share rows, ``label_weights`` says how much each class of a task ``[C]``
    counts in training, ``preference_beta`` is the beta of preferences.

    If the client's labels are its own, so are its heads: ``own_layout`` is the heads' layout, ``layout`` the one that
    the federation knows, and ``whole_layout`` both together. Every slot has its own heads, and a mixture's coefficients
    apply to them, too.

    Args:
        base: the frozen model, and the parts of it that adapters change.
        rank: that of every LoRA module.
        alpha: LoRA's; the scaling is alpha / rank.
        dropout: at the input of A.
        blocks: Co-LoRA's number of blocks: at the last layer of each, the modules get P and Q. 0: plain LoRA.
    """

    micro_batch: int = 0
    group_by_length: bool = False
    packing: bool = False
    preference_beta: float = 0.1
    label_weights: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, base: Base, rank: int, alpha: float, dropout: float = 0.0, blocks: int = 0) -> None:
        self.base = base
        self.blocks = blocks
        self.basis: Adapter | None = None
        self.module = base.model
        self.module.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        modules = dict(self.module.named_modules())
        for name in (*base.targets, *base.heads, *base.own_heads):
            if name not in modules or features_of(modules[name]) is None:
                raise ModelError(f"{base.name!r} has no linear module {name!r} to adapt")
            if name in base.targets and name in base.heads:
                raise ModelError(f"{base.name!r}: module {name!r} is a target and a head, expected only one of them")
        self.layout = self._layout(modules)
        own = tuple(head_entries(modules, base.own_heads))
        self.own_layout = Layout(own, {}, base.fingerprint) if own else None
        self.whole_layout = self.layout.joined(self.own_layout) if self.own_layout else self.layout
        self._gates: dict[str, dict[str, nn.Parameter]] = {}
        self._context = GateContext()
        self._context.attach(self.module)
        self.heads = {
            f"{name}.{kind}": parameter.detach().clone()
            for name in (*base.heads, *base.own_heads)
            for kind, parameter in modules[name].named_parameters(recurse=False)
        }
        self._target_logits = TargetLogits(self.module)
        self.target_losses = TargetLosses(self._target_logits)
        self.drawn = {name: self.module.get_parameter(name).detach().clone() for name in base.drawn}
        self._loaded: dict[str, Layout] = {}
        self._mixture: Mixture = {}
        self._differences: dict[str, Differences] = {}
        for key in self.heads:
            name, kind = key.rsplit(".", 1)
            self._differences[key] = Differences()
            parametrize.register_parametrization(modules[name], kind, self._differences[key], unsafe=True)

    @property
    def looks_at_whole_texts(self) -> bool:
        """Whether an active gate is one number for a whole input, so that texts cannot share rows."""
        used = [self._gates[chosen.slot] for chosen in self._mixture.values() if isinstance(chosen, Gate)]
        return any(gate.ndim == 1 and len(gate) > 1 for gates in used for gate in gates.values())

    @property
    def device(self) -> torch.device:
        """The base model's device."""
        return next(self.module.parameters()).device

    def align(self, basis: Adapter) -> None:
        """Start from these A and B in modules with P; without this they are drawn from the seed.

        Raises:
            ModelError: they are not those of this model's layout.
        """
        if not self.layout.contains(basis.layout):
            difference = self.layout.describe_difference(basis.layout, part=True)
            raise ModelError(f"the alignment does not fit {self.base.name!r}: found {difference}")
        self.basis = basis

    def initial(self, seed: int) -> Adapter:
        """The starting adapter of a seed, with the aligned basis if there is one; the model still equals the base."""
        adapter = Adapter.initial(self.layout, seed)
        return adapter if self.basis is None else adapter.with_part(self.basis)

    def gate_layout(self, *, looks_at_input: bool, per_token: bool = False) -> Layout:
        """A slot of gates: one number for each module, or (also ``per_token``) one for each input of a LoRA module."""
        looking = [e for e in self.layout.entries if e.factor is Factor.A and looks_at_input]
        shapes = {e.module: (1, e.shape[1]) if per_token else e.shape[1:] for e in looking}
        entries = tuple(Entry(name, Factor.GATE, shapes.get(name, (1,))) for name in self.whole_layout.modules)
        return Layout(entries, {}, self.base.fingerprint)

    def load(self, slot: str, adapter: Adapter) -> None:
        """Put an adapter into a slot of the model; its ranks and scalings may differ from the client's own layout.

        A slot that is new, or whose layout changes, is not active until :meth:`activate`.

        Raises:
            ModelError: the adapter has another base, or a tensor that this base has no place for.
        """
        difference = self._place_of(adapter.layout).difference(adapter.layout, part=True, any_rank=True)
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
        uses = {other: c.slot if isinstance(c, Gate) else None for other, c in self._mixture.items()}
        self.activate({other: c for other, c in self._mixture.items() if slot not in (other, uses[other])})
        del self._loaded[slot]
        self._gates.pop(slot, None)
        for name, layer in self._lora_layers().items():
            if name in layout.scalings:
                layer.delete_adapter(_inner(slot))
        for key, differences in self._differences.items():
            if key in layout.by_name:
                differences.by_slot.pop(_inner(slot))

    def unload_all(self) -> None:
        """Leave the base model alone, as it was before the first :meth:`load`."""
        for slot in list(self._loaded):
            self._mixture = {}  # what it named may have been unloaded already
            self.unload(slot)
        self.activate({})
        self.module.eval()

    def read(self, slot: str) -> Adapter:
        """A copy of a slot's numbers, float32 on the CPU."""
        adapter = Adapter.zeros(self._layout_of(slot))
        with torch.no_grad():
            for entry, tensor in adapter.items():
                tensor.copy_(self._parameter(slot, entry))
        return adapter

    def activate(self, mixture: Mixture) -> None:
        """Make the model the base plus this mixture; nothing is trainable then.

        Raises:
            ModelError: a slot is not loaded.
            LayoutError: a coefficient is not finite, or missing for a module of its slot.
        """
        layouts = {slot: self._layout_of(slot) for slot in mixture}
        coefficients: dict[str, dict[str, float | ModuleGate]] = {}
        for slot, layout in layouts.items():
            chosen = mixture[slot]
            if isinstance(chosen, Gate):
                coefficients[slot] = {module: self._module_gate(chosen, module) for module in layout.modules}
            else:
                known = self.for_own_heads(chosen)
                coefficients[slot] = {module: coefficient_of(known, module) for module in layout.modules}
        for name, layer in self._lora_layers().items():
            active = [slot for slot in mixture if name in layouts[slot].scalings]
            layer.set_adapter([_inner(slot) for slot in active], inference_mode=True)
            for slot in active:
                coefficient, scaling = coefficients[slot][name], layouts[slot].scalings[name]
                gate = coefficient if isinstance(coefficient, ModuleGate) else None
                layer.scaling[_inner(slot)] = scaling if isinstance(coefficient, ModuleGate) else scaling * coefficient
                layer.lora_variant.pop(_inner(slot), None)
                if gate is not None or any(f"{name}.{factor}" in layouts[slot].by_name for factor in SHARED_FACTORS):
                    layer.lora_variant[_inner(slot)] = TermVariant(gate)
        for key, differences in self._differences.items():
            module = key.rsplit(".", 1)[0]
            differences.coefficients = {
                _inner(slot): coefficients[slot][module] for slot in mixture if key in layouts[slot].by_name
            }
        self.module.requires_grad_(False)
        for gates in self._gates.values():
            for parameter in gates.values():
                parameter.requires_grad_(False)
        self._mixture = mixture

    def for_own_heads(self, coefficient: Coefficient) -> Coefficient:
        """The same, with coefficients for heads that only this client knows: the mean of those given for modules."""
        if self.own_layout is None or not isinstance(coefficient, Mapping) or not coefficient:
            return coefficient
        mean = sum(coefficient.values()) / len(coefficient)
        return dict.fromkeys(self.own_layout.modules, mean) | dict(coefficient)

    def trainable(self, slot: str, part: Layout) -> dict[str, nn.Parameter]:
        """Let the tensors of ``part`` in ``slot`` be trained; returns them by entry name."""
        found = {}
        for entry in part.entries:
            parameter = self._parameter(slot, entry)
            parameter.requires_grad_(True)
            found[entry.name] = parameter
        return found

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch's inputs on the base model's device; those that are not integers are in its dtype."""
        return {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }

    def logits(
        self, inputs: Mapping[str, Tensor], task: str = "", read: Read = logits_in, *, per_token: bool = False
    ) -> Tensor:
        """The model's logits for a batch of inputs.

        Args:
            inputs: by argument's name.
            task: the name of the task, for a model for several tasks.
            read: takes the wanted part of the model's output on some inputs; by default its logits.
            per_token: whether that part has a row for each token, ``[b, L, ...]``, in the tokens' places.
        """
        chosen = {"task": task} if task else {}

        def forward(inputs: Mapping[str, Tensor]) -> Tensor:
            inputs = self._context.take(inputs)
            return read(self.module(**inputs_taken(self.module, inputs), **chosen), inputs)

        if MASK in inputs and (self.base.padding == ALONE or (per_token and self.base.padding != RIGHT)):
            return one_by_one(forward, inputs)
        return forward(arranged(inputs, self.base.padding))

    def target_logits(self, inputs: Mapping[str, Tensor], labels: Tensor, task: str = "") -> Tensor:
        """Logits ``[n, V]`` of the n targets in ``labels [b, L]``, row by row; no others are computed."""
        return self._target_logits(lambda: self.logits(self._context.with_prompts(inputs, labels), task), labels)

    def at_targets(self, inputs: Mapping[str, Tensor], labels: Tensor, task: str = "") -> AtTargets:
        """Losses of the targets in ``labels [b, L]``, and logits on request, a few at a time."""
        return self.target_losses(lambda: self.logits(self._context.with_prompts(inputs, labels), task), labels)

    @contextmanager
    def switched(self, mixture: Mixture) -> Iterator[None]:
        """Inside the block use another mixture, without dropout; trainable parameters stay the same."""
        before, was_training = self._mixture, self.module.training
        gates = [parameter for found in self._gates.values() for parameter in found.values()]
        trained = [p for p in (*self.module.parameters(), *gates) if p.requires_grad]
        self.module.eval()
        self.activate(mixture)
        yield
        self.activate(before)
        set_training(self.module, was_training)
        for parameter in trained:
            parameter.requires_grad_(True)

    def _layout(self, modules: Mapping[str, nn.Module]) -> Layout:
        entries: list[Entry] = []
        names = self._shared_names(modules)
        for name in self.base.targets:
            features = features_of(modules[name])
            assert features is not None
            entries.append(Entry(name, Factor.A, (self.rank, features[0])))
            entries.append(Entry(name, Factor.B, (features[1], self.rank)))
            if name in names:
                entries.append(Entry(name, Factor.P, (self.rank, self.rank)))
                entries.append(Entry(name, Factor.Q, (self.rank,)))
        entries.extend(head_entries(modules, self.base.heads))
        scalings = scalings_from(dict.fromkeys(self.base.targets, self.rank), self.alpha)
        return Layout(tuple(entries), scalings, self.base.fingerprint, names)

    def _shared_names(self, modules: Iterable[str]) -> dict[str, str]:
        if not self.blocks:
            return {}
        try:
            return shared_names(self.base.targets, modules, self.blocks)
        except RoleError as error:
            raise ModelError(f"{self.base.name!r} cannot have Co-LoRA adapters: {error}") from None

    def _place_of(self, found: Layout) -> Layout:
        """The layout that an adapter has to fit into: the client's own with its heads, or that of its gates."""
        shapes = {entry.shape for entry in found.entries if entry.factor is Factor.GATE}
        looks, per_token = shapes != {(1,)}, any(len(shape) > 1 for shape in shapes)
        return self.gate_layout(looks_at_input=looks, per_token=per_token) if shapes else self.whole_layout

    def _module_gate(self, gate: Gate, module: str) -> ModuleGate:
        self._layout_of(gate.slot)
        parameter = self._gates.get(gate.slot, {}).get(module)
        if parameter is None:
            raise ModelError(f"slot {gate.slot!r} has no gate for module {module!r}")
        return ModuleGate(module, parameter, gate.complement, self._context)

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
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are the point here
                warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # PEFT corrects it for GPT-2's Conv1D
                inject_adapter_in_model(config, self.module, adapter_name=_inner(slot))
            for parameter in self._lora_parameters(slot):
                parameter.data = parameter.data.float()  # adapters are float32 over a base of any dtype
            layers = self._lora_layers()
            for name in layout.lora_modules if self.dtype != torch.float32 else ():
                keep_narrow(layers[name], _inner(slot))
            for entry in layout.entries:
                if entry.factor in SHARED_FACTORS:
                    add_factor(layers[entry.module], _inner(slot), entry.factor, entry.shape)
            set_training(self.module, self.module.training)  # PEFT's new dropout is always in training mode
        for key, differences in self._differences.items():
            if key in layout.by_name:
                zeros = torch.zeros_like(self.heads[key], device=self.device, dtype=torch.float32)
                differences.by_slot[_inner(slot)] = nn.Parameter(zeros)
        if gates := [entry for entry in layout.entries if entry.factor is Factor.GATE]:
            self._gates[slot] = {e.module: nn.Parameter(torch.zeros(e.shape, device=self.device)) for e in gates}
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
        if entry.factor is Factor.GATE:
            return self._gates[slot][entry.module]
        if entry.factor.is_lora:
            layer = self.module.get_submodule(entry.module)
            assert isinstance(layer, LoraLayer)
            if entry.factor in SHARED_FACTORS:
                shared = getattr(layer, SHARED_FACTORS[entry.factor])[_inner(slot)]
                assert isinstance(shared, nn.Parameter)
                return shared
            parameter = (layer.lora_A if entry.factor is Factor.A else layer.lora_B)[_inner(slot)].weight
        else:
            parameter = self._differences[entry.name].by_slot[_inner(slot)]
        assert isinstance(parameter, nn.Parameter)
        return parameter


def _inner(slot: str) -> str:
    """A slot's name inside PyTorch's containers, where names of their methods ("train", "float", "keys") are taken."""
    return f"slot-{slot}"
