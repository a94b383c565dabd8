"""Embeddings of texts that belong together: search, matching, clustering.

A text's embedding is the mean of its tokens' last hidden states, of length one. In a batch, each anchor should be
nearest to its own positive, and far from all other positives and all negatives::

    loss_i = -log exp(s a_i p_i) / (sum_j exp(s a_i p_j) + sum_j exp(s a_i n_j)),   s = 20

(Henderson et al. 2017, section 4.4; van den Oord et al. 2018.) So an example's loss depends on its batch:
``micro-batch-size`` makes batches smaller here, and so gives each anchor fewer texts to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from client_app.data.dataset import MASK, ClientData, Dataset, mean_of_tokens
from client_app.data.example import Example
from client_app.kinds.contract import About, Cells, Encoding, Kind, Scorer
from client_app.settings import DataSettings

ANCHOR, POSITIVE, NEGATIVE = "anchor", "positive", "negative"
"""Columns with fixed names: those of sentence-transformers."""
SCALE = 20.0
_ROWS = 1024


class SentencePairs(Kind):
    """Outputs ``[b, K, d]``: embeddings of anchor, positive and, where there is one, negative (K is 2 or 3).

    Inputs are ``[n, K, L]``: token ids and mask. ``labels [n]`` are zero.
    """

    name = "sentence-pairs"
    about = About(
        "`anchor`, `positive`, and `negative` if there is one",
        "accuracy (the nearest of the split's positives is the right one), mean reciprocal rank",
    )
    order = 2
    columns = ("anchor", "positive")
    auto_model = "AutoModel"
    peft_task = "FEATURE_EXTRACTION"
    probabilities = False
    company = True
    scores = ("accuracy", "mrr")

    def fits(self, row: Mapping[str, Any], settings: DataSettings) -> bool:
        """See :meth:`Kind.fits`."""
        return ANCHOR in row and POSITIVE in row

    def read(self, cells: Cells) -> dict[str, Any]:
        """See :meth:`Kind.read`."""
        names = [ANCHOR, POSITIVE, *([NEGATIVE] if NEGATIVE in cells.values else [])]
        return {"told": {"texts": tuple(cells.text(name) for name in names)}}

    def columns_read(self, columns: set[str], settings: DataSettings) -> set[str]:
        """See :meth:`Kind.columns_read`."""
        return {ANCHOR, POSITIVE, NEGATIVE}

    def unlabelled_by(self, settings: DataSettings) -> tuple[str, ...]:
        """See :meth:`Kind.unlabelled_by`."""
        return (POSITIVE,)

    def encode(self, encoding: Encoding, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """See :meth:`Kind.encode`."""
        count = len(examples[0].told["texts"])
        odd = next((example for example in examples if len(example.told["texts"]) != count), None)
        if odd is not None:
            encoding.refuse(odd, f"{len(odd.told['texts'])} texts, expected {count} as in the first row")
        items = [
            encoding.text_item(replace(example, text=text, told={}))
            for example in examples
            for text in example.told["texts"]
        ]
        found = encoding.padded([{"input_ids": item["input_ids"], MASK: item[MASK]} for item in items])
        names = {"input_ids": "pair_ids", MASK: "pair_mask"}
        inputs = {names[name]: tensor.reshape(len(examples), count, -1) for name, tensor in found.items()}
        return encoding.dataset(inputs, torch.zeros(len(examples), dtype=torch.long), examples)

    def token_ids(self, data: Dataset) -> Sequence[Tensor]:
        """See :meth:`Kind.token_ids`."""
        return [data.inputs["pair_ids"]]

    def probe(self, data: Dataset) -> dict[str, Tensor] | None:
        """See :meth:`Kind.probe`."""
        return self._texts(data)

    def outputs(self, model: Scorer, batch: Dataset, *, everywhere: bool = False) -> Tensor:
        """``[b, K, d]``."""
        found = model.logits(model.inputs(self._texts(batch)), batch.task, self.read_output)
        return found.reshape(len(batch), -1, found.shape[-1])

    def read_output(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Kind.read_output`: embeddings ``[n, d]``."""
        return mean_embedding(output.last_hidden_state, inputs[MASK])

    def _texts(self, data: Dataset) -> dict[str, Tensor]:
        """All texts ``[n * K, L]``, without the columns that are padding in all of them."""
        used = max(1, int(data.inputs["pair_mask"].sum(dim=-1).max()))
        names = {"pair_ids": "input_ids", "pair_mask": MASK}
        return {names[name]: tensor.flatten(0, 1)[:, :used] for name, tensor in data.inputs.items()}

    def example_losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies of each anchor's choice ``[b]``."""
        outputs = outputs.float()
        candidates = outputs[:, 1:].transpose(0, 1).flatten(0, 1)  # all positives first
        right = torch.arange(len(outputs), device=outputs.device)
        parts = [
            functional.cross_entropy(SCALE * anchors @ candidates.T, own, reduction="none")
            for anchors, own in zip(torch.split(outputs[:, 0], _ROWS), torch.split(right, _ROWS), strict=True)
        ]
        return torch.cat(parts)

    def whole_loss(self, kept: Sequence[Any]) -> float:
        """The loss of the whole split as one batch."""
        outputs, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return float(self.example_losses(outputs, labels).double().mean())

    def metrics(self, kept: Sequence[Any], client: ClientData | None, *, loss_only: bool = False) -> dict[str, float]:
        """An anchor's rank counts the positives that are strictly nearer than its own."""
        outputs = torch.cat([found for found, _ in kept]).float()
        anchors, positives = outputs[:, 0], outputs[:, 1]
        own = (anchors * positives).sum(dim=-1)
        nearer = [
            (some @ positives.T > mine[:, None] + 1e-6).sum(dim=1)
            for some, mine in zip(torch.split(anchors, _ROWS), torch.split(own, _ROWS), strict=True)
        ]
        ranks = 1 + torch.cat(nearer).double()
        return {"accuracy": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}


def mean_embedding(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of hidden states ``[n, L, d]`` over tokens (``mask [n, L]``), scaled to length one: ``[n, d]``."""
    return functional.normalize(mean_of_tokens(hidden, mask), dim=-1)
