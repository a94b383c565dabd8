"""Every kind of task from its rows to an exported model: read, trained, scored, and loaded by PEFT and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from client_app.data.dataset import ClientData, Dataset
from client_app.kinds import KINDS, TaskError, guess_kind, kind_of
from client_app.model.personal import PersonalModel
from client_app.own.files import read_own
from client_app.own.reading.text_files import DataError
from client_app.plan import evaluation, training
from client_app.session import _load
from client_app.settings import DataSettings
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.peft_format import write_peft_directory
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.kinds import kind_data
from tests.client_app.own_clients import loaded, settings_of
from tests.toys import tiny_models, toy_data

NEW: dict[str, tuple[Callable[[], kind_data.Rows], str, float]] = {
    "multi-label-classification": (kind_data.several_labels, "auroc", 0.9),
    "regression": (kind_data.numbers, "pearson", 0.9),
    "token-classification": (kind_data.tagged_words, "f1", 0.9),
    "question-answering": (kind_data.questions, "exact_match", 0.9),
    "preferences": (kind_data.preferred, "accuracy", 1.0),
    "sentence-pairs": (kind_data.pairs, "accuracy", 0.7),
}
"""Rows, and what a model has of which score after a few steps."""


def taught(
    kind: str, folder: Path, steps: int = 40, **model: Any
) -> tuple[PersonalModel, ClientData, dict[str, float], Path]:
    """A tiny model of this kind after some steps; its data, and its loss before."""
    path = toy_data.write_jsonl(folder / "data.jsonl", NEW[kind][0]())
    writes = kind_of(kind).auto_model == "AutoModelForCausalLM"
    base = tiny_models.save_llama(folder / "base") if writes else tiny_models.save_bert(folder / "base", WORDS)
    learner, data = loaded(settings_of(path, folder / "state", base, target_modules="all-linear", **model))
    before = evaluation.evaluate(learner, data.splits["train"], data)
    step = plan_pb2.TrainStep(steps=steps, batch_size=8, learning_rate=1e-2, max_grad_norm=1.0)
    training.train(learner, step, learner.trainable("local", learner.whole_layout), data.splits["train"], 0)
    return learner, data, before, base


WORDS = toy_data.VOCABULARY


@pytest.mark.parametrize("kind", NEW)
def test_a_new_kind_is_learnt_scored_and_exported(kind: str, tmp_path: Path) -> None:
    rows, score, least = NEW[kind]
    found = guess_kind(rows()[0], DataSettings())
    assert found is not None
    assert found.name == kind
    model, data, before, base = taught(kind, tmp_path)
    assert data.kind == kind
    after = evaluation.evaluate(model, data.splits["train"], data)
    assert after["loss"] < before["loss"] * 0.7
    assert after[score] >= max(least, before.get(score, 0.0))
    assert set(kind_of(kind).scores) <= set(after)
    batch = data.splits["test"].batch(torch.arange(2))
    with torch.no_grad():
        wanted = training.logits_of(model, batch)
    assert torch.allclose(_exported(model, data, batch, base, tmp_path / "adapter"), wanted, atol=1e-5)


def _exported(model: PersonalModel, data: ClientData, batch: Dataset, base: Path, folder: Path) -> torch.Tensor:
    """What plain PEFT and transformers say about a batch, with the adapter as it is saved."""
    kind = kind_of(data.kind)
    write_peft_directory(folder, model.read("local"), str(base), model.heads, model.drawn)
    options: dict[str, Any] = {"num_labels": len(data.labels)} if data.labels else {}
    options |= {"num_labels": 1} if data.kind == "regression" else {}
    fresh = getattr(transformers, kind.auto_model).from_pretrained(base, **options)
    plain = peft.PeftModel.from_pretrained(fresh, str(folder)).eval()

    class Plain:
        """The exported model in the place of a personal one: nothing of the project's own is in its forward pass."""

        device = torch.device("cpu")
        preference_beta = 0.1

        def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return dict(batch)

        def logits(self, inputs: Any, task: str, read: Any, *, per_token: bool = False) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = read(plain(**inputs), inputs)
            return found

        def at_targets(self, inputs: Any, labels: torch.Tensor, task: str) -> Any:
            from client_app.data.targets import at_targets, target_mask, token_losses

            with torch.no_grad():
                logits = at_targets(plain(**inputs).logits, labels)
            losses = token_losses(logits, labels[:, 1:][target_mask(labels)])
            return type("Said", (), {"losses": staticmethod(lambda: losses)})

        def switched(self, mixture: object) -> Any:
            return plain.disable_adapter()

    return kind.outputs(Plain(), batch)  # type: ignore[arg-type]


def test_every_kind_says_what_it_is() -> None:
    for name, kind in KINDS.items():
        assert hasattr(transformers, kind.auto_model), name
        assert kind.about.columns
        assert kind.about.scores
        assert kind.peft_task is None or kind.peft_task in peft.TaskType.__members__.values()


def test_weights_of_labels_make_a_rare_one_count_as_much(tmp_path: Path) -> None:
    """Gradients of the loss are those of the same data with the rare label's examples repeated."""
    logits, labels = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1])
    kind = kind_of("text-classification")
    weights = kind.weigh(Dataset({}, labels, kind.name), (), 2)
    assert weights.tolist() == pytest.approx([2 / 3, 2.0])
    repeated = torch.tensor([0, 1, 2, 3, 3, 3])
    assert float(kind.mean_loss(logits, labels, weights)) == pytest.approx(
        float(kind.mean_loss(logits[repeated], labels[repeated])), abs=1e-6
    )
    asked = kind.weigh(Dataset({}, labels, kind.name), (1.0, 3.0), 2)
    assert torch.allclose(asked, weights)
    several = kind_of("multi-label-classification")
    assert several.weigh(Dataset({}, torch.eye(4), several.name), (), 4).tolist() == [3.0] * 4
    with pytest.raises(TaskError, match=r"label-weights: 1 numbers, expected 2"):
        kind.weigh(Dataset({}, labels, kind.name), (1.0,), 2)
    with pytest.raises(TaskError, match="no classes that could be weighed"):
        kind_of("regression").weigh(Dataset({}, labels, "regression"), (), 1)


def test_weights_of_labels_reach_training(tmp_path: Path) -> None:
    rows = toy_data.opinions(16, 0)[:9] + [row for row in toy_data.opinions(40, 1) if row["label"] == "pos"]
    path = toy_data.write_jsonl(tmp_path / "x.jsonl", rows)
    base = tiny_models.save_bert(tmp_path / "bert", WORDS)
    settings = settings_of(path, tmp_path / "state", base, label_weights="balanced")
    model, data = _load(settings)
    model.load("local", Adapter.initial(model.whole_layout, 0))
    model.activate({"local": 1.0})
    batch = data.splits["train"].batch(torch.arange(8))
    with torch.no_grad():
        logits = training.logits_of(model, batch)
        found = float(training.batch_loss(model, batch))
    each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    assert found == pytest.approx(float((each * model.label_weights[""][batch.labels]).mean()), abs=1e-6)
    assert found != pytest.approx(float(each.mean()), abs=1e-4)


def test_preferences_pull_from_the_base_model_and_not_from_nothing(tmp_path: Path) -> None:
    """An adapter that changes nothing has rewards of zero, and the loss of a fair coin."""
    model, data, before, _ = taught("preferences", tmp_path, steps=1)
    assert before["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert before["margin"] == pytest.approx(0.0, abs=1e-5)
    batch = data.splits["train"].batch(torch.arange(2))
    with torch.no_grad():
        once = training.logits_of(model, batch)
        model.preference_beta = 0.2
        assert torch.allclose(training.logits_of(model, batch), 2 * once, atol=1e-6)
    chosen = data.decode(batch.inputs["pair_ids"][0, 0][batch.inputs["pair_labels"][0, 0] > 0]) if data.decode else ""
    assert chosen == "yes yes"


def test_one_answer_may_be_the_beginning_of_the_other_and_messages_may_be_single(tmp_path: Path) -> None:
    """As in HH-RLHF and in LLaMA-Factory's files."""
    begun = {"chosen": "\n\nHuman: a?\n\nAssistant: I do", "rejected": "\n\nHuman: a?\n\nAssistant: I do not"}
    turns = {"conversations": [{"from": "human", "value": "a?"}]}
    single = {**turns, "chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    for name, row, expected in (("texts", begun, ("do", "do not")), ("messages", single, ("yes", "no"))):
        path = toy_data.write_jsonl(tmp_path / f"{name}.jsonl", [row] * 4)
        found = read_own(settings_of(path, tmp_path))
        example = found.splits["train"][0]
        told = [example.told[column] for column in ("chosen", "rejected")]
        assert tuple(text if isinstance(text, str) else text[-1]["content"] for text in told) == expected
        assert (example.prompt or example.told["chosen"][0]["content"]).endswith("I " if name == "texts" else "a?")
        assert found.findings == []


def test_conversations_that_begin_alike_are_a_preference_from_where_they_differ(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a?"}]
    better, worse = ([*turns, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    rows = [{"chosen": better, "rejected": worse}, {"prompt": turns, "chosen": better[1:], "rejected": worse[1:]}] * 3
    found = read_own(settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path))
    every = [example for split in found.splits.values() for example in split]
    for example in every:
        assert (example.first, list(example.told["chosen"]), list(example.told["rejected"])) == (1, better, worse)
    same = toy_data.write_jsonl(tmp_path / "y.jsonl", [*rows, {"chosen": better, "rejected": better}])
    with pytest.raises(DataError, match="line 7, column 'chosen': expected messages that end with the assistant's"):
        read_own(settings_of(same, tmp_path))
