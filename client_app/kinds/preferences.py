"""Preferences between two answers: direct preference optimisation with the base model as the reference.

For a prompt x, the chosen answer y and the rejected answer z, and the model without any adapter as the reference::

    reward(y) = beta (log p(y | x) - log p_base(y | x))
    loss      = -log sigmoid(reward(y) - reward(z))

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023, equation 7.
The reference needs no memory: the adapters are switched off for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import MASK, ClientData, Dataset
from client_app.data.example import Example
from client_app.data.targets import IGNORED, by_example
from client_app.kinds.contract import About, Cells, Encoding, Kind, Scorer
from client_app.kinds.generation import CONVERSATIONS
from client_app.settings import DataSettings

CHOSEN, REJECTED = "chosen", "rejected"
"""Columns with fixed names: those of TRL."""
IDS, MASKS, LABELS = "pair_ids", "pair_mask", "pair_labels"


class Preferences(Kind):
    """Outputs ``[b, 2]``: rewards of the chosen and of the rejected answer.

    Inputs are ``[n, 2, L]``: token ids, mask, and labels as for generated texts. ``labels [n]`` are zero.
    """

    name = "preferences"
    about = About(
        "`chosen`, `rejected`, and `prompt` or `conversations` (texts or messages); without, what both begin with",
        "accuracy (the chosen answer has the larger reward), margin of rewards",
    )
    order = 3
    columns = ("prompt", "chosen", "rejected")
    auto_model = "AutoModelForCausalLM"
    peft_task = "CAUSAL_LM"
    probabilities = False
    evaluation_batch = 8
    scores = ("accuracy", "margin")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return CHOSEN in row and REJECTED in row

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        prompt = cells.settings.prompt_column
        if isinstance(cells.value(CHOSEN), str):
            chosen, rejected = cells.text(CHOSEN), cells.text(REJECTED)
            if prompt in cells.values:
                asked = cells.text(prompt)
            else:
                asked = chosen[: _common(chosen, rejected)]
                chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
            if not chosen or not rejected or chosen == rejected:
                cells.refuse(REJECTED, "the two answers are the same, or one is empty, expected two that differ")
            return {"prompt": asked or None, "told": {CHOSEN: chosen, REJECTED: rejected}}
        asked_in = next((column for column in (prompt, CONVERSATIONS) if column in cells.values), "")
        first = list(cells.turns(asked_in)) if asked_in else []
        better, worse = cells.turns(CHOSEN), cells.turns(REJECTED)
        if not first:
            shared = _common(better, worse)
            first, better, worse = list(better[:shared]), better[shared:], worse[shared:]
        for column, turns in ((CHOSEN, better), (REJECTED, worse)):
            if not turns or turns[-1]["role"] != "assistant":
                cells.refuse(column, "expected messages that end with the assistant's and differ from the other answer")
        return {"first": len(first), "told": {CHOSEN: (*first, *better), REJECTED: (*first, *worse)}}

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        return {CHOSEN, REJECTED, settings.prompt_column if settings.prompt_column in columns else CONVERSATIONS}

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return (REJECTED,)

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        items = []
        for example in examples:
            for answer in (example.told[CHOSEN], example.told[REJECTED]):
                one = {"completion": answer} if isinstance(answer, str) else {"messages": answer}
                items.append(encoding.written_item(replace(example, told={}, **one)))
        found = encoding.padded([{name: item[name] for name in ("input_ids", MASK, "labels")} for item in items])
        names = {"input_ids": IDS, MASK: MASKS, "labels": LABELS}
        inputs = {names[name]: tensor.reshape(len(examples), 2, -1) for name, tensor in found.items()}
        return encoding.dataset(inputs, torch.zeros(len(examples), dtype=torch.long), examples)

    def token_ids(self, data: Dataset) -> Sequence[Tensor]:
        """See :meth:`Kind.token_ids`."""
        return [data.inputs[IDS]]

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """``[b, 2]``."""
        given = model.inputs({name: tensor.flatten(0, 1) for name, tensor in batch.inputs.items()})
        used = max(1, int(given[MASKS].sum(dim=1).max()))
        inputs = {"input_ids": given[IDS][:, :used], MASK: given[MASKS][:, :used]}
        labels = given[LABELS][:, :used].masked_fill(inputs[MASK] == 0, IGNORED)

        def log_probability() -> Tensor:
            losses = model.at_targets(inputs, labels, batch.task).losses()
            return -by_example(losses, labels)[0]

        with model.switched({}), torch.no_grad():
            reference = log_probability()
        rewards: Tensor = model.preference_beta * (log_probability() - reference)
        return rewards.reshape(len(batch), 2)

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``-log sigmoid(margin)`` ``[b]``."""
        return -functional.logsigmoid(outputs[:, 0] - outputs[:, 1])

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """See :meth:`Kind.metrics`."""
        margins = torch.cat([outputs[:, 0] - outputs[:, 1] for outputs, _ in kept])
        return {"accuracy": float((margins > 0).double().mean()), "margin": float(margins.double().mean())}


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common start of two texts or conversations, without a space before the first different word.

    If one text is the beginning of the other, its last word is still its own: an answer of no words is none.
    """
    pairs = enumerate(zip(first, second, strict=False))
    at = next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))
    if not isinstance(first, str):
        return at
    if at == min(len(first), len(second)):
        return max(len(first[:at].rstrip()) - len(first[:at].split()[-1]), 0) if first[:at].strip() else 0
    return at - 1 if at and first[at - 1] == " " else at
