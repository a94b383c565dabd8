"""Evaluations cost what they must: batches of similar lengths, the same few examples in every round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from client_app.data.dataset import MASK, ClientData, Dataset, MixedDataset
from client_app.data.targets import IGNORED
from client_app.model.personal import PersonalModel
from client_app.own.files import load_own
from client_app.plan.evaluation import evaluate, write
from client_app.plan.workbench import Workbench
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.own_clients import loaded, settings_of
from tests.client_app.test_model_settings import writer
from tests.toys.tiny_models import save_llama
from tests.toys.toy_data import write_jsonl


def texts(count: int = 90) -> Dataset:
    """Texts of 1 to 10 tokens in no order; a text's class is its last token."""
    lengths = torch.randint(1, 11, (count,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(10) < lengths[:, None]).long()
    ids = torch.randint(0, 3, (count, 10), generator=torch.Generator().manual_seed(1)) * mask
    labels = ids.gather(1, lengths[:, None] - 1)[:, 0]
    return Dataset({"input_ids": ids, MASK: mask}, labels, "text-classification")


class Reader(nn.Module):
    """Answers with the last token of a text, or for an odd first token with the next class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokens = 0

    def logits(self, inputs: dict[str, Any], task: str = "", *_: Any, **__: Any) -> torch.Tensor:
        ids, mask = inputs["input_ids"], inputs[MASK]
        self.tokens += ids.numel()
        last = ids.gather(1, mask.sum(dim=1, keepdim=True) - 1)[:, 0]
        return torch.nn.functional.one_hot((last + (ids[:, 0] == 1)) % 3, 3).float()


def test_scores_are_those_of_any_order_and_little_is_padded() -> None:
    reader = Reader()
    model: Any = SimpleNamespace(
        module=reader, device=torch.device("cpu"), micro_batch=8, inputs=dict, logits=reader.logits
    )
    data = texts()
    client = ClientData("texts", data.kind, {"test": data}, metrics=("f1",))
    found = evaluate(model, data, client)
    answers = reader.logits(dict(data.inputs)).argmax(dim=1)
    assert found["accuracy"] == pytest.approx(float((answers == data.labels).float().mean()))
    f1 = [
        2 * float(((answers == c) & (data.labels == c)).sum()) / float((answers == c).sum() + (data.labels == c).sum())
        for c in range(3)
    ]
    assert found["f1"] == pytest.approx(sum(f1) / 3)
    tokens = int(data.inputs[MASK].sum())
    assert reader.tokens - data.inputs[MASK].numel() < 1.15 * tokens  # in the split's own order 1.6 times


def bench(data: Dataset, round_: int, client: str = "ada") -> Workbench:
    plan = plan_pb2.Plan(client_id=client, round=round_, seed=3)
    model: Any = None
    slots: Any = None
    return Workbench(plan, model, ClientData("texts", data.kind, {"test": data}), slots)


def test_the_same_examples_are_evaluated_in_every_round() -> None:
    data = texts()
    first, second, other = (bench(data, *who).shown("test", 7) for who in ((1, "ada"), (2, "ada"), (1, "bob")))
    assert len(first) == 7
    assert torch.equal(first.inputs["input_ids"], second.inputs["input_ids"])
    assert not torch.equal(first.labels, other.labels) or first.inputs["input_ids"].shape != other.inputs[MASK].shape
    assert bench(data, 1).shown("test", 0) is data
    assert bench(data, 1).shown("test", 90) is data


def test_every_task_is_evaluated_on_as_many() -> None:
    mixed = MixedDataset.of({"long": texts(60), "short": texts(4)})
    found = bench(mixed, 1).shown("test", 10)
    assert isinstance(found, MixedDataset)
    assert {name: len(part) for name, part in found.parts.items()} == {"long": 10, "short": 4}


def test_a_model_stops_writing_where_its_texts_end(tmp_path: Path) -> None:
    """The checkpoint names no end; the tokenizer's is that of all training texts."""
    settings = writer(tmp_path, save_llama(tmp_path / "llama"), generate_examples=4, max_new_tokens=40)
    base, data = load_own(settings)
    train = data.splits["train"]
    (end,) = {int(labels[labels != -100][-1]) for labels in train.labels}
    module: Any = base.model
    assert end in module.generation_config.eos_token_id
    model, data = loaded(settings)
    steps = 0
    with torch.no_grad():
        model.module.lm_head.weight.zero_()  # type: ignore[union-attr]
        model.module.lm_head.weight[end] = 1.0  # type: ignore[union-attr,index]
        model.module.lm_head.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, given: (given[0].abs(),)
        )

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    evaluate(model, data.splits["test"])
    before = steps
    handle = model.module.register_forward_hook(count)
    evaluate(model, data.splits["test"], data)
    handle.remove()
    assert steps - before <= 4


PROMPTS = ("a>", "bcd>", "efghij>")
LENGTH = 6


def written(model: PersonalModel, data: Dataset, client: ClientData, size: int) -> set[tuple[int, ...]]:
    """Token ids of each text that the model writes, in batches of ``size``."""
    found: set[tuple[int, ...]] = set()
    targets = {tuple(labels[labels != IGNORED].tolist()) for labels in data.labels}

    def decode(ids: torch.Tensor) -> str:
        found.add(tuple(ids.tolist()))
        return ""

    write(model, data, replace(client, decode=decode, max_new_tokens=LENGTH), size)
    return found - targets


@pytest.mark.parametrize("padding", [0, 2, 40])
def test_a_text_is_cut_at_its_own_end_whatever_fills_it_up(padding: int, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "completion": "x", "set": "train"} for prompt in PROMPTS]
    rows += [{"prompt": f"{n}>", "completion": "y", "set": split} for n, split in enumerate(("validation", "test"))]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    settings = settings_of(path, tmp_path, save_llama(tmp_path / "base"), {"split_column": "set"})
    model, client = loaded(settings)
    data, module = client.splits["train"], cast(Any, model.module)
    module.generation_config.eos_token_id = None
    free = sorted(written(model, data, client, 1))
    assert [len(ids) for ids in free] == [LENGTH] * len(PROMPTS)
    end = next(token for ids in free for token in ids[:2] if not all(token in other for other in free))
    wanted = {ids[: ids.index(end) + 1] if end in ids else ids for ids in free}
    assert len({len(ids) for ids in wanted}) > 1
    module.generation_config.eos_token_id = [end]
    module.generation_config.pad_token_id = padding
    for size in (1, 2, 3):
        assert written(model, data, client, size) == wanted
