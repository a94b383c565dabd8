"""One frozen model of any architecture for several tasks: what clients' own data are read with, but for FLAVAs.

A decoder, with a tower for images or without one (Llama, LLaVA, Qwen-VL), writes texts by its own frozen head. It
classifies texts by the mean of its last hidden states and a head of the task's. An encoder (BERT, ViT, ViLT) only
classifies. In the terms of :mod:`client_app.model.bases.multi_task` the trunk is the language model, or the only stack
of layers that there is. Groups without a place in the model are left out: a decoder reads texts itself, so there is no
``mod/text``, and a model without towers has ``shared``, ``task/<c>`` and heads.

LoRA is at the queries and values of attention, fused ones too, and at all linear modules of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from client_app.data.dataset import Base, ClientData, mean_of_tokens
from client_app.kinds import kind_of
from client_app.model.bases.model_folders import BaseModelError, FoundModel, first_line
from client_app.model.bases.multi_task import MultiTaskError, RoutedModel, TaskSpec
from client_app.model.forward.padding import MASK, inputs_taken
from client_app.model.module_roles import RoleError, outside_towers, projections, role_of

_ADAPTED = ("q", "v", "qkv")


class AnyMultiTaskModel(RoutedModel):
    """Any model of transformers with the groups of a client's tasks.

    Groups' modules have the names of the body's: so clients who write texts and clients who do not have the same.

    Args:
        whole: one that writes texts if a task does, else one without a head; it is changed in place.
        tasks: the client's.

    Raises:
        MultiTaskError: there is no task, two have one name, or the model has no attention by a known name.
    """

    def __init__(self, whole: Any, tasks: Sequence[TaskSpec]) -> None:
        body = _body_of(whole)
        found = _places(body)
        if not found["shared"]:
            raise MultiTaskError("the model has no linear queries and values by a known name")
        width = int(whole.config.get_text_config().hidden_size)
        labelled = [task for task in tasks if not kind_of(task.kind).generative]
        super().__init__(body, tasks, lambda group: _of(found, group), width, labelled)
        self.whole = whole  # after the body, whose modules keep their names

    # No property is called "config": PEFT would take this for a model of transformers.

    @property
    def generation_config(self) -> Any:
        """The model's, if it writes texts."""
        return getattr(self.whole, "generation_config", None)

    def get_output_embeddings(self) -> nn.Module | None:
        """The frozen head, if the model writes texts: logits are computed at targets only."""
        if self.whole is self.backbone:
            return None
        head: nn.Module | None = self.whole.get_output_embeddings()
        return head

    def forward(self, task: str, **inputs: Any) -> Any:
        """``logits`` ``[b, C]``, or ``[b, L, V]`` where texts are written; ``inputs`` as the model takes them."""
        spec = self.begin(task)
        if kind_of(spec.kind).generative:
            return self.whole(**inputs_taken(self.whole, inputs))
        hidden = self.backbone(**inputs_taken(self.backbone, inputs)).last_hidden_state
        head = self.head_of(spec)
        return SimpleNamespace(logits=head(_mean(hidden, inputs.get(MASK)).to(head.weight)))

    @torch.no_grad()
    def generate(self, task: str, **inputs: Any) -> Tensor:
        """As the model does, with the groups of a task."""
        self.begin(task)
        found: Tensor = self.whole.generate(**inputs)
        return found


def any_multi_task_base(found: FoundModel, whole: Any, tasks: Sequence[TaskSpec]) -> Base:
    """Any model as the frozen base of a client with these tasks; see :class:`AnyMultiTaskModel`.

    Raises:
        BaseModelError: it has not the modules that groups adapt.
    """
    try:
        model = AnyMultiTaskModel(whole, tasks)
    except MultiTaskError as error:
        raise BaseModelError(f"base-model {found.name!r} cannot serve several tasks: {error}") from None
    model.requires_grad_(False).eval()
    return Base(
        found.name, model, found.fingerprint, targets=tuple(sorted(model.targets)), heads=tuple(sorted(model.heads))
    )


def require_answers(base: Base, tasks: Sequence[ClientData]) -> None:
    """Let the model read one example of each task.

    Raises:
        BaseModelError: it does not read what a task has; names the task.
    """
    for task in tasks:
        one = task.splits["train"].batch(torch.tensor([0]))
        try:
            with torch.no_grad():
                base.model(task=task.task, **one.inputs)
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as error:
            raise BaseModelError(
                f"base-model {base.name!r} does not answer as the task {task.task!r} ({task.kind}) needs it: "
                f"{first_line(error)}"
            ) from None


def _body_of(whole: Any) -> Any:
    """The model without its head: itself, where it has none."""
    body = whole.base_model
    if body is whole and isinstance(getattr(body, "model", None), nn.Module):
        body = body.model  # some families do not say that they have a body
    return body


def _places(body: nn.Module) -> dict[str, list[str]]:
    """Linear modules of the trunk (``shared``), of a tower (``mod``), and of its projection (``pair``)."""
    modules = {name: module for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name, _ in body.named_modules()]
    trunk, between = set(outside_towers(names)), set(projections(names))
    attention = [name for name in modules if _role(name) in _ADAPTED]
    return {
        "shared": [name for name in attention if name in trunk],
        "mod": [name for name in attention if name not in trunk and name not in between],
        "pair": [name for name in modules if name in between and name not in trunk],
    }


def _of(places: Mapping[str, list[str]], group: str) -> list[str]:
    """Those of a group."""
    family, *rest = group.split("/")
    if family in ("mod", "pair"):
        return places[family] if rest[0] == "image" else []
    return [] if family == "head" else places["shared"]


def _role(module: str) -> str:
    try:
        return role_of(module)
    except RoleError:
        return ""


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean ``[b, d]`` over what there is: text tokens come first, and only they may be padding."""
    if mask is None or mask.shape[1] > hidden.shape[1]:
        return hidden.mean(dim=1)
    more = mask.new_ones(len(mask), hidden.shape[1] - mask.shape[1])
    return mean_of_tokens(hidden, torch.cat([mask, more], dim=1))
