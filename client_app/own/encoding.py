"""Examples to tensors: the base model's own tokenizer, chat template and image processor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from client_app.data.dataset import MASK, Dataset, LazyDataset
from client_app.data.task_kinds import IGNORED, Kind
from client_app.model.base_models import BaseModelError, FoundModel, load_config, longest_input
from client_app.own.examples import Example
from client_app.own.images import ImageReader, read_image
from client_app.own.readers import DataError

Segment = tuple[str, bool]
"""A piece of text, and whether it is to be learnt."""


@dataclass
class Encoder:
    """Turns examples into a :class:`Dataset`; ``truncated`` counts texts that were cut to ``max_length`` tokens."""

    kind: Kind
    max_length: int
    tokenizer: Any = None
    images: Any = None
    joint: Any = None
    truncated: int = 0

    @property
    def padding_id(self) -> int | None:
        """The token that fills texts up."""
        return None if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    def decode(self, ids: Tensor) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def encode(self, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """One split.

        Args:
            examples: of this encoder's kind.
            labels: names of the classes, in order; unused where texts are generated.

        Raises:
            DataError: an image cannot be read, or a chat template refuses a conversation; names the row.
        """
        if self.kind.generative:
            tokens = [self._generative(example) for example in examples]
            inputs = _padded([{k: v for k, v in item.items() if k != "labels"} for item in tokens], self.padding_id)
            targets = _padded([{"labels": item["labels"]} for item in tokens], IGNORED)["labels"]
        else:
            numbers = {name: number for number, name in enumerate(labels)}
            targets = torch.tensor([numbers[str(example.label)] for example in examples], dtype=torch.long)
            items = [self._text(example) for example in examples] if self.kind.has_text else []
            inputs = _padded(items, self.padding_id) if items else {}
        if not self.kind.has_image:
            return Dataset(inputs, targets, self.kind.name)
        return LazyDataset(
            inputs, targets, self.kind.name, read=ImageReader(self.images, lambda at: _opened(examples[at]))
        )

    def _text(self, example: Example) -> dict[str, list[int]]:
        encoded = self.tokenizer(example.text, example.pair)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            self.truncated += 1
            encoded = self.tokenizer(example.text, example.pair, truncation=True, max_length=self.max_length)
        return {name: encoded[name] for name in self.tokenizer.model_input_names if name in encoded}

    def _generative(self, example: Example) -> dict[str, list[int]]:
        segments, templated = self._segments(example)
        ids: list[int] = []
        labels: list[int] = []
        for number, (text, learnt) in enumerate(segments):
            if number == 0 and self.kind.has_image and not learnt:
                piece = self._with_image(example, text)
            else:
                piece = self.tokenizer(text, add_special_tokens=number == 0 and not templated)["input_ids"]
                if number == 0 and not templated and piece and piece[-1] == self.tokenizer.eos_token_id:
                    piece = piece[:-1]
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        if not templated and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        if len(ids) > self.max_length:
            ids, labels = self._cut(example, ids, labels)
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(f"{example.place}: nothing is left to learn within {self.max_length} tokens (max-length)")
        return {"input_ids": ids, MASK: [1] * len(ids), "labels": labels}

    def _cut(self, example: Example, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """The prompt loses its beginning (but for the first token), then the completion its end."""
        self.truncated += 1
        if self.kind.has_image:
            raise DataError(
                f"{example.place}: {len(ids)} tokens with its image, expected at most {self.max_length} (max-length)"
            )
        first = next(position for position, label in enumerate(labels) if label != IGNORED)
        surplus = min(len(ids) - self.max_length, max(first - 1, 0))
        ids, labels = ids[:1] + ids[1 + surplus :], labels[:1] + labels[1 + surplus :]
        return ids[: self.max_length], labels[: self.max_length]

    def _segments(self, example: Example) -> tuple[list[Segment], bool]:
        """What is read and what is learnt, and whether a chat template has put the special tokens in."""
        if example.messages:
            return self._conversation(example), True
        if self.kind.has_image and getattr(self.joint, "chat_template", None):
            user = [{"type": "image"}, {"type": "text", "text": example.prompt or ""}]
            turns = [{"role": "user", "content": user}]
            prompt = self.joint.apply_chat_template(turns, add_generation_prompt=True)
            return [(prompt, False), (f"{example.completion}{self.tokenizer.eos_token or ''}", True)], True
        if self.kind.has_image:
            token = getattr(self.joint, "image_token", None) or ""
            return [(f"{token}{example.prompt or ''}", False), (str(example.completion), True)], False
        if example.prompt is None:
            return [(str(example.completion), True)], False
        return [(example.prompt, False), (str(example.completion), True)], False

    def _conversation(self, example: Example) -> list[Segment]:
        """Learn what the assistant says; where the template rewrites earlier turns, only the last of it."""
        segments: list[Segment] = []
        done = ""
        for number, turn in enumerate(example.messages):
            if turn["role"] != "assistant":
                continue
            before, after = self._around(example, number)
            if not before.startswith(done):
                last = len(example.messages) - 1
                before, after = self._around(example, last)
                return [(before, False), (after[len(before) :], True)]
            segments += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return segments

    def _around(self, example: Example, number: int) -> tuple[str, str]:
        """The conversation up to an assistant's turn, and up to the end of it."""
        template = functools.partial(self.tokenizer.apply_chat_template, tokenize=False)
        turns = [dict(turn) for turn in example.messages]
        try:
            after = str(template(turns[: number + 1]))
            for options in ({"add_generation_prompt": True}, {}):
                before = str(template(turns[:number], **options)) if number else ""
                if after.startswith(before):
                    return before, after
        except Exception as error:  # a template raises what it likes
            raise DataError(f"{example.place}: the model's chat template refuses this conversation: {error}") from None
        raise DataError(f"{example.place}: the model's chat template does not put this conversation in order")

    def _with_image(self, example: Example, prompt: str) -> list[int]:
        try:
            encoded = self.joint(images=[_opened(example)], text=[prompt])
        except DataError:
            raise
        except Exception as error:  # processors raise what they like
            raise DataError(f"{example.place}: the model's processor refuses this image and text: {error}") from None
        return [int(token) for token in encoded["input_ids"][0]]


def load_encoder(found: FoundModel, kind: Kind, max_length: int, *, chat: bool = False) -> Encoder:
    """The encoder of a base model.

    Args:
        found: the model.
        kind: of the task.
        max_length: tokens of one example, at most.
        chat: whether examples are conversations, which need a chat template.

    Raises:
        BaseModelError: the model's folder lacks a tokenizer, an image processor, or a chat template.
    """
    import transformers

    encoder = Encoder(kind, max_length)
    if kind.has_text:
        encoder.tokenizer = _load(transformers.AutoTokenizer, found, "tokenizer", "tokenizer.json")
        _require_padding(encoder.tokenizer, found)
    if kind.has_image and kind.has_text:
        encoder.joint = _load(transformers.AutoProcessor, found, "processor", "processor_config.json")
        missing = [part for part in ("image_processor", "tokenizer") if not hasattr(encoder.joint, part)]
        if missing:  # transformers' answer for a model of texts alone is its tokenizer
            raise BaseModelError(
                f"base-model {found.name!r} has no processor of images and texts (task {kind.name!r}): what it has "
                f"lacks {' and '.join(missing)}"
            )
        encoder.images = encoder.joint.image_processor
        encoder.tokenizer = encoder.joint.tokenizer
        _require_padding(encoder.tokenizer, found)
    elif kind.has_image:
        encoder.images = _load(transformers.AutoImageProcessor, found, "image processor", "preprocessor_config.json")
    if encoder.tokenizer is not None:
        limits = (max_length, getattr(encoder.tokenizer, "model_max_length", None), longest_input(load_config(found)))
        encoder.max_length = min(int(limit) for limit in limits if limit)
    if chat and not getattr(encoder.tokenizer, "chat_template", None):
        raise BaseModelError(
            f"base-model {found.name!r} has no chat template, which messages need; use an instruction-tuned model, or "
            "prompt and completion columns"
        )
    return encoder


def _load(auto: Any, found: FoundModel, what: str, file: str) -> Any:
    try:
        return auto.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' answers to a missing file are of many classes
        reason = str(error).strip().splitlines()
        raise BaseModelError(
            f"base-model {found.name!r}: {found.folder} has no {what} that can be loaded (expected {file}): "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None


def _require_padding(tokenizer: Any, found: FoundModel) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise BaseModelError(f"base-model {found.name!r}: its tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token


def _padded(items: Sequence[Mapping[str, list[int]]], padding: int | None) -> dict[str, Tensor]:
    """Lists of one length per item to tensors ``[n, longest]``, padded on the right."""
    if not items:
        return {}
    longest = max(len(next(iter(item.values()))) for item in items)
    result = {}
    for name in items[0]:
        fill = padding if name in ("input_ids", "labels") and padding is not None else 0
        tensor = torch.full((len(items), longest), fill, dtype=torch.long)
        for row, item in enumerate(items):
            tensor[row, : len(item[name])] = torch.tensor(item[name], dtype=torch.long)
        result[name] = tensor
    return result


def _opened(example: Example) -> Any:
    assert example.image is not None
    return read_image(example.image, example.place)
