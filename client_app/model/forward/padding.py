"""Pads texts so that each gets the same answer in a batch as alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MASK = "attention_mask"
RIGHT, LEFT, ALONE = "right", "left", "alone"
_LONGEST_PROBE = 64
"""Tokens of the texts that are tried, if there are texts as short: a large model reads them on the CPU."""

Inputs = Mapping[str, Tensor]
Read = Callable[[Any, Inputs], Tensor]
"""Takes the wanted part of a model's output on some inputs."""


def logits_in(output: Any, _: Inputs) -> Tensor:
    """The part of a model's output that most tasks want."""
    logits: Tensor = output.logits
    return logits


def inputs_taken(module: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs that a model's forward pass has arguments for; a tokenizer may give more (token types, a mask)."""
    takes = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return inputs
    return {name: tensor for name, tensor in inputs.items() if name in takes}


def find_padding(
    forward: Callable[[Inputs], Tensor],
    inputs: Inputs,
    tolerance: float,
    *,
    per_token: bool = False,
    padding_id: int = 0,
) -> str:
    """Find where this architecture needs padding, by running two texts of unequal length together and alone.

    Most models ignore what is behind a text. Some read the last position (XLNet) and want padding before it; some mix
    positions whatever the mask says (FNet, Nystromformer), and need texts one by one.

    Args:
        forward: logits ``[b, C]`` of a batch, as the model computes them.
        inputs: texts by input's name ``[n, L]``, padded on the right, with their mask.
        tolerance: largest difference of logits that rounding explains, as a share of the largest logit.
        per_token: whether there are logits for each token, ``[b, L, C]``; padding before a text would move them.
        padding_id: the padding token, for texts that all have the same length: one of them is then shortened.
    """
    inputs = _of_two_lengths(inputs, padding_id)
    lengths = inputs[MASK].sum(dim=1)
    short = int(lengths.argmin())
    longer = [int(i) for i in lengths.argsort() if lengths[i] > lengths[short]]
    if not longer:  # no text has a second token
        return RIGHT
    within = [i for i in longer if lengths[i] <= _LONGEST_PROBE]
    rows = torch.tensor([short, within[-1] if within else longer[0]])
    pair = {name: tensor[rows, : int(lengths[rows].max())] for name, tensor in inputs.items()}
    with torch.no_grad():
        alone = one_by_one(forward, pair)
        for padding in (RIGHT,) if per_token else (RIGHT, LEFT):
            together = forward(arranged(pair, padding))
            if per_token:
                together = together.masked_fill(pair[MASK][..., None] == 0, 0.0)
            if float((together - alone).abs().max()) <= tolerance * float(alone.abs().max().clamp_min(1.0)):
                return padding
    return ALONE


def _of_two_lengths(inputs: Inputs, padding_id: int) -> Inputs:
    """Texts of more than one length; if all have the same, the first one, and its first half with its last token.

    Later texts may be longer or shorter, and what a model does with those depends on its architecture alone.
    """
    lengths = inputs[MASK].sum(dim=1)
    length = int(lengths[0])
    if bool((lengths != length).any()) or length < 2:
        return inputs
    width, half, found = inputs[MASK].shape[1], length // 2, {}
    for name, tensor in inputs.items():
        found[name] = tensor[:1].expand(2, *tensor.shape[1:]).clone()
        if tensor.shape[1:2] == (width,):
            found[name][1, half - 1] = tensor[0, length - 1]  # the end token, which some architectures look for
            found[name][1, half:length] = padding_id if name == "input_ids" else 0
    return found


def arranged(inputs: Inputs, padding: str) -> Inputs:
    """Move the padding of texts from the right to where the model needs it."""
    if padding != LEFT or MASK not in inputs:
        return inputs
    width = inputs[MASK].shape[1]
    ahead = width - inputs[MASK].sum(dim=1)
    columns = (torch.arange(width, device=ahead.device) - ahead[:, None]) % width
    return {
        name: tensor.gather(1, columns) if tensor.shape[:2] == columns.shape and tensor.dim() == 2 else tensor
        for name, tensor in inputs.items()
    }


def one_by_one(forward: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Logits of each text without any padding; if there are logits for each token, zeros after a text."""
    width, found = inputs[MASK].shape[1], []
    for row, length in enumerate(inputs[MASK].sum(dim=1).tolist()):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        found.append(forward({n: t[:, : int(length)] if t.shape[1:2] == (width,) else t for n, t in one.items()}))
    if found[0].dim() == 3:
        found = [functional.pad(logits, (0, 0, 0, width - logits.shape[1])) for logits in found]
    return torch.cat(found)


def set_training(module: nn.Module, training: bool = True) -> None:
    """Set training mode for everything except batch norms.

    Their running statistics belong to the frozen base; with a batch's own statistics an answer would depend on the
    others in its batch.
    """
    module.train(training)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            part.eval()
