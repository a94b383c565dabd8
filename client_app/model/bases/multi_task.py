"""One frozen model for several tasks: towers, a trunk that every task goes through, and parameter groups on top.

A task reads some modalities and has a head. What is trained for it lies in the groups R(o) of
:mod:`fedalloy_adapters.groups`:

=================  =====================================================================================
``shared``         LoRA in the trunk, for every task
``mod/<m>``        LoRA in the encoder of modality m
``task/<c>``       LoRA in the trunk, for the tasks of one expert c
``pair/<m>/<c>``   LoRA in the projection of modality m to the trunk, for the tasks of one expert
``head/<o>``       the linear head of task o
=================  =====================================================================================

Which groups act is decided by the task's declaration, never by what a batch contains. Several groups may adapt one
linear module: its output is ``W x`` plus the sum of their updates. For that, every group has a module of its own at
every place (``shared::multimodal_model.encoder.layer.0...``), a linear map without weights that LoRA is attached to.

:class:`RoutedModel` is what all such models share. :class:`MultiTaskModel` is a FLAVA, whose trunk is its multimodal
encoder; :mod:`client_app.model.bases.multi_task_any` has other architectures. A FLAVA classifies by the mean of the
trunk's outputs. Texts are generated as in a decoder: in the text tower and the trunk, text tokens see the image, the
prompt and the text so far, never what follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from client_app.data.dataset import Base, mean_of_tokens
from client_app.kinds import kind_of
from fedalloy_adapters.groups import GROUP_ID, SEPARATOR

MODALITIES = ("image", "text")
_TOWERS = {"image": "image_model", "text": "text_model"}
_PROJECTIONS = {"image": "image_to_mm_projection", "text": "text_to_mm_projection"}
_TRUNK = "multimodal_model"
_ADAPTED = ("query", "value")
_HEAD = "output"
_HEAD_STD = 0.02


class MultiTaskError(ValueError):
    """A task's declaration is not valid, or the model lacks the parts that it needs."""


@dataclass(frozen=True)
class TaskSpec:
    """The declaration of one task of a client.

    Attributes:
        name: unique at the client; clients whose tasks have the same name share its head.
        kind: a key of :data:`client_app.kinds.KINDS`.
        modalities: those of the input, and ``"text"`` if a text is generated: the model reads what it has written.
        expert: c(o); tasks with the same expert share its groups.
        outputs: number of classes, or size of the vocabulary.
        pairs: whether the task has ``pair/*`` groups.
    """

    name: str
    kind: str
    modalities: tuple[str, ...]
    expert: str
    outputs: int
    pairs: bool = True

    def __post_init__(self) -> None:
        odd = [modality for modality in self.modalities if modality not in MODALITIES]
        if odd or not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise MultiTaskError(f"task {self.name!r} has modalities {self.modalities}, expected some of {MODALITIES}")
        if kind_of(self.kind).generative and "text" not in self.modalities:
            raise MultiTaskError(f"task {self.name!r} writes texts, so 'text' is one of its modalities")
        for group in self.groups:
            if not GROUP_ID.fullmatch(group):
                raise MultiTaskError(f"task {self.name!r} of expert {self.expert!r}: {group!r} is not a group's id")

    @property
    def groups(self) -> tuple[str, ...]:
        """R(o)."""
        pairs = [f"pair/{m}/{self.expert}" for m in self.modalities] if self.pairs else []
        modalities = [f"mod/{m}" for m in self.modalities]
        return ("shared", *modalities, f"task/{self.expert}", *pairs, f"head/{self.name}")


class _Branch(nn.Linear):
    """A zero linear map without numbers, to which a group's LoRA is attached."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        zero = torch.zeros(1, 1, device=like.weight.device, dtype=like.weight.dtype)
        self.weight = nn.Parameter(zero.expand(like.out_features, like.in_features), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Zeros ``[..., d_out]``."""
        return input.new_zeros(*input.shape[:-1], self.out_features)


class _Routed(nn.Module):
    """A frozen linear module, plus the updates of the active groups; ``weight`` is for code that asks for its type."""

    def __init__(self, base: nn.Linear, branches: Sequence[tuple[str, nn.Module, str]], active: set[str]) -> None:
        super().__init__()
        self.base = base
        self.branches = branches  # group, and where its LoRA layer will be: PEFT puts it in the branch's place
        self.active = active

    @property
    def weight(self) -> Tensor:
        """The frozen module's."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d_in]`` to ``[..., d_out]``."""
        y: Tensor = self.base(x)
        for group, parent, name in self.branches:
            if group in self.active:
                y = y + getattr(parent, name)(x)
        return y


class RoutedModel(nn.Module):
    """A backbone with the groups of a client's tasks; called with a task's name and its inputs.

    Args:
        backbone: a model of transformers; it is changed in place.
        tasks: the client's.
        places: paths in the backbone of the linear modules that a group adapts; none, if it has no place there.
        width: of the hidden states that heads read.
        with_head: tasks that have a head of their own.

    Raises:
        MultiTaskError: there is no task, or two have one name.
    """

    def __init__(
        self,
        backbone: Any,
        tasks: Sequence[TaskSpec],
        places: Callable[[str], Sequence[str]],
        width: int,
        with_head: Sequence[TaskSpec],
    ) -> None:
        super().__init__()
        if not tasks or len({task.name for task in tasks}) != len(tasks):
            raise MultiTaskError(f"tasks {[task.name for task in tasks]}, expected at least one, and names that differ")
        self.backbone = backbone
        self.tasks = {task.name: task for task in tasks}
        self.active: set[str] = set()
        self.targets: list[str] = []
        found = {group: places(group) for group in dict.fromkeys(group for task in tasks for group in task.groups)}
        heads = {f"head/{task.name}" for task in with_head}
        self.groups = {
            task.name: tuple(group for group in task.groups if found[group] or group in heads) for task in tasks
        }
        at: dict[str, list[str]] = {}
        for group, paths in found.items():
            for path in paths:
                at.setdefault(path, []).append(group)
        for path, groups in at.items():
            self._route(path, groups)
        self.heads = [f"head/{task.name}{SEPARATOR}{_HEAD}" for task in with_head]
        for task, name in zip(with_head, self.heads, strict=True):
            self.add_module(name, _head(name, width, task.outputs))

    def begin(self, task: str) -> TaskSpec:
        """Let the groups of a task act.

        Raises:
            MultiTaskError: the client has no such task.
        """
        if task not in self.tasks:
            raise MultiTaskError(f"no task {task!r}; this client has {', '.join(self.tasks)}")
        self.active.clear()
        self.active.update(self.groups[task])
        return self.tasks[task]

    def head_of(self, spec: TaskSpec) -> nn.Linear:
        """A task's own head."""
        head: nn.Linear = getattr(self, f"head/{spec.name}{SEPARATOR}{_HEAD}")
        return head

    def _route(self, path: str, groups: Sequence[str]) -> None:
        """Put a routed module in a linear one's place, with a branch for each group."""
        base = self.backbone.get_submodule(path)
        branches = []
        for group in groups:
            parent: nn.Module = self
            *above, last = f"{group}{SEPARATOR}{path}".split(".")
            for name in above:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(last, _Branch(base))
            branches.append((group, parent, last))
            self.targets.append(f"{group}{SEPARATOR}{path}")
        self.backbone.set_submodule(path, _Routed(base, branches, self.active))


class MultiTaskModel(RoutedModel):
    """A FLAVA with the groups of a client's tasks.

    Args:
        backbone: ``transformers.FlavaModel``; it is changed in place.
        tasks: the client's tasks.
        ends: tokens that end a generated text, and the padding token.

    Raises:
        MultiTaskError: there is no task, two have the same name, or the backbone lacks a module.
    """

    def __init__(self, backbone: Any, tasks: Sequence[TaskSpec], ends: tuple[int, int] = (0, 0)) -> None:
        def places(group: str) -> list[str]:
            return _places_in_flava(backbone, group)

        super().__init__(backbone, tasks, places, int(backbone.config.multimodal_config.hidden_size), tasks)
        self.ends = ends

    def forward(
        self,
        task: str,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """``logits`` ``[b, C]``, or ``[b, L, V]`` where texts are generated.

        Args:
            task: its name.
            pixel_values: ``[b, channels, H, W]``, for tasks that read images.
            input_ids: ``[b, L]``, for tasks that read or write texts.
            attention_mask: ``[b, L]``, one where there is a token.
            _: everything else that tokenizers and processors make (token types) is not used.
        """
        spec = self.begin(task)
        image = self._image(pixel_values) if "image" in spec.modalities else None
        return SimpleNamespace(logits=self._logits(spec, image, input_ids, attention_mask))

    @torch.no_grad()
    def generate(
        self,
        task: str,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The prompts, padded on the left, with what the model writes after them, greedily: ``[b, L + new]``."""
        spec = self.begin(task)
        image = self._image(pixel_values) if "image" in spec.modalities else None
        end, padding = self.ends
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _step in range(max_new_tokens):
            best = self._logits(spec, image, input_ids, attention_mask)[:, -1].argmax(dim=-1)
            best = torch.where(done, torch.full_like(best, padding), best)
            input_ids = torch.cat([input_ids, best[:, None]], dim=1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(best[:, None])], dim=1)
            done |= best == end
            if bool(done.all()):
                break
        return input_ids

    def _image(self, pixel_values: Tensor | None) -> Tensor:
        """The trunk's image tokens ``[b, patches + 1, d]``."""
        found: Tensor = self.backbone.image_to_mm_projection(
            self.backbone.image_model(pixel_values=pixel_values).last_hidden_state
        )
        return found

    def _logits(
        self, spec: TaskSpec, image: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        streams = [] if image is None else [image]
        before = 0 if image is None else image.shape[1]  # tokens that are there for everybody
        before += int(self.backbone.multimodal_model.use_cls_token)
        writes = kind_of(spec.kind).generative
        tokens = 0
        if "text" in spec.modalities:
            assert input_ids is not None
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            tokens = input_ids.shape[1]
            hidden = self.backbone.text_model(
                input_ids=input_ids,
                attention_mask=_additive(_visible(mask, 0, writes), self._dtype),
                position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
            ).last_hidden_state
            streams.append(self.backbone.text_to_mm_projection(hidden))
        else:
            mask = torch.ones(len(streams[0]), 0, device=streams[0].device)
        visible = _visible(mask, before, writes)
        hidden = self.backbone.multimodal_model(
            torch.cat(streams, dim=1), attention_mask=_additive(visible, self._dtype)
        ).last_hidden_state
        head = self.head_of(spec)
        if writes:
            return head(hidden[:, -tokens:])  # type: ignore[no-any-return]
        there = torch.cat([mask.new_ones(len(mask), before), mask], dim=1)
        return head(mean_of_tokens(hidden, there))  # type: ignore[no-any-return]

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.backbone.dtype
        return dtype


def _places_in_flava(backbone: Any, group: str) -> list[str]:
    """Paths in the backbone of the linear modules that a group adapts."""
    family, *rest = group.split("/")
    if family == "head":
        return []
    if family == "pair":
        paths = [_PROJECTIONS[rest[0]]]
    else:
        root = _TOWERS[rest[0]] if family == "mod" else _TRUNK
        paths = [
            f"{root}.{name}"
            for name, module in backbone.get_submodule(root).named_modules()
            if name.rsplit(".", 1)[-1] in _ADAPTED and isinstance(module, nn.Linear)
        ]
    if not paths:
        raise MultiTaskError(f"the model has no {' or '.join(_ADAPTED)} for group {group!r}")
    return paths


def multi_task_base(
    name: str, fingerprint: str, backbone: Any, tasks: Sequence[TaskSpec], ends: tuple[int, int] = (0, 0)
) -> Base:
    """A FLAVA as the frozen base of a client with these tasks; see :class:`MultiTaskModel`."""
    model = MultiTaskModel(backbone, tasks, ends)
    model.requires_grad_(False).eval()
    return Base(name, model, fingerprint, targets=tuple(sorted(model.targets)), heads=tuple(sorted(model.heads)))


def _head(name: str, width: int, outputs: int) -> nn.Linear:
    """A head that is drawn from its name alone, so that all owners agree."""
    head = nn.Linear(width, outputs)
    seed = int.from_bytes(hashlib.sha256(f"{name}:{outputs}x{width}".encode()).digest()[:7], "little")
    with torch.no_grad():
        head.weight.copy_(_HEAD_STD * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
        head.bias.zero_()
    return head


def _visible(mask: Tensor, before: int, causal: bool) -> Tensor:
    """Whether one token sees another, booleans ``[b, T, T]``; ``before`` tokens are always there, the text's follow.

    If texts are generated (``causal``), a text token sees itself and what is before it, and the tokens before the text
    see no text.
    """
    batch, tokens = mask.shape
    keys = torch.cat([mask.new_ones(batch, before), mask], dim=1).bool()
    visible = keys[:, None, :].expand(batch, before + tokens, before + tokens)
    if causal:
        order = torch.arange(before + tokens, device=mask.device).clamp_min(before - 1)
        visible = visible & (order[None, :, None] >= order[None, None, :])
        itself = torch.eye(before + tokens, dtype=torch.bool, device=mask.device)
        visible = visible | itself  # padding on the left sees nothing else, and a softmax over nothing is NaN
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that is added to the scores, ``[b, 1, T, T]``."""
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return hidden.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
