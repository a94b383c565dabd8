"""Examples to tensors: the base model's own tokenizer, chat template and image processor."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from client_app.data.dataset import MASK, Dataset, LazyDataset
from client_app.data.example import Example
from client_app.data.targets import IGNORED
from client_app.kinds import Kind
from client_app.model.bases.model_folders import BaseModelError, FoundModel, load_config, longest_input
from client_app.own.chat import ChatTemplate, Span, common_start
from client_app.own.messages import PLACEHOLDER, Turn, with_parts
from client_app.own.reading.images import ImageReader, read_image
from client_app.own.reading.text_files import DataError


@dataclass
class Encoder:
    """Turns examples into a :class:`Dataset`; ``truncated`` counts texts that were cut to ``max_length`` tokens.

    ``chat`` is the model's chat template; ``ask_by_chat`` says whether prompts and completions go through it, too.
    ``between`` is put between a prompt and its completion if no template does that. ``image_names`` are what the
    model's processor says of images and texts, as far as it was asked: its part for images may say more, for itself.
    """

    kind: Kind
    max_length: int
    tokenizer: Any = None
    images: Any = None
    joint: Any = None
    truncated: int = 0
    chat: ChatTemplate | None = None
    ask_by_chat: bool = True
    between: str = ""
    findings: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    image_names: set[str] = field(default_factory=set)

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the model's processor wants an answer apart from its prompt (PaliGemma)."""
        return self.joint is not None and "suffix" in inspect.signature(type(self.joint).__call__).parameters

    @property
    def padding_id(self) -> int | None:
        """The token that pads texts."""
        return None if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    def decode(self, ids: Tensor) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def encode(self, examples: Sequence[Example], labels: Sequence[str]) -> Dataset:
        """One split.

        Args:
            examples: of this encoder's kind.
            labels: names of the classes, in order; unused if texts are generated.

        Raises:
            DataError: an image cannot be read, or a chat template refuses a conversation; names the row.
        """
        return self.kind.encode(self, examples, labels)

    def padded(self, items: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Inputs ``[n, longest]`` by name, padded on the right; labels with -100."""
        plain = [{name: numbers for name, numbers in item.items() if name != "labels"} for item in items]
        found = _padded(plain, self.padding_id)
        if items and "labels" in items[0]:
            found |= _padded([{"labels": item["labels"]} for item in items], IGNORED)
        return found

    def dataset(self, inputs: Mapping[str, Tensor], labels: Tensor, examples: Sequence[Example]) -> Dataset:
        """A split of these inputs; images are read when a batch needs them."""
        if not self.kind.has_image:
            return Dataset(inputs, labels, self.kind.name)
        read = ImageReader(
            self.images, lambda at: _opened(examples[at]), nested=self.kind.generative, names=self.image_names
        )
        return LazyDataset(inputs, labels, self.kind.name, read=read)

    def refuse(self, example: Example, message: str) -> NoReturn:
        """Raise the error of an example's row."""
        raise DataError(f"{example.place}: {message}")

    def text_item(self, example: Example) -> dict[str, list[int]]:
        """One text, or two, cut to ``max_length``."""
        # The spelling of a special token in a text is text, too: T5 and BART count end tokens.
        options: dict[str, Any] = {"split_special_tokens": True}
        told = f"{example.text} {example.pair or ''}"
        if any(token in told for token in self.tokenizer.all_special_tokens):
            self.findings["texts spell special tokens of the tokenizer, which are read as plain text"] += 1
        encoded = self.tokenizer(example.text, example.pair, **options)
        length = len(encoded["input_ids"])
        if length > self.max_length:
            self.truncated += 1
            encoded = self.tokenizer(example.text, example.pair, truncation=True, max_length=self.max_length, **options)
        found = {name: list(encoded[name]) for name in self.tokenizer.model_input_names if name in encoded}
        return found | {MASK: [1] * len(found["input_ids"])}  # some tokenizers give none

    def written_item(self, example: Example) -> dict[str, list[int]]:
        """A text for generation, and ``labels``: its tokens where they are learnt, else -100."""
        turns = self._turns(example)
        if turns:
            assert self.chat is not None
            text, spans = self.chat.render(turns, example.context, example.first, example.place)
        else:
            asked = f"{self._with_tokens(example)}{self.between if example.prompt else ''}"
            text = f"{asked}{example.completion}"
            spans = [(len(asked), len(text))]
        if self.takes_suffix and not turns:
            ids, learnt, beside = self._with_suffix(example, asked)
        else:
            ids, learnt, beside = self._tokens(example, text, spans, templated=bool(turns))
        labels: list[int] = np.where(learnt, ids, IGNORED).tolist()
        if not turns and self.tokenizer.eos_token_id is not None and ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
            beside = {name: [*values, 0] for name, values in beside.items()}
        if set(labels[1:]) <= {IGNORED}:
            raise DataError(f"{example.place}: there is nothing to learn in this conversation")
        if len(ids) > self.max_length:
            ids, labels = self._cut(example, ids, labels)
        if set(labels[1:]) <= {IGNORED}:
            raise DataError(f"{example.place}: nothing is left to learn within {self.max_length} tokens (max-length)")
        return {"input_ids": ids, MASK: [1] * len(ids), **beside, "labels": labels}

    def _with_tokens(self, example: Example) -> str:
        """An example's prompt with the tokens for its images: where it has places for them, else before it."""
        prompt, token = example.prompt or "", str(getattr(self.joint, "image_token", None) or "")
        if not token:
            return prompt
        prompt = prompt if token in prompt else prompt.replace(PLACEHOLDER, token)
        there = prompt.count(token)
        if there not in (0, len(example.images)):
            raise DataError(f"{example.place}: {there} times {token} in the prompt, and {len(example.images)} images")
        # One on each line: Qwen-VL reads neighbours with nothing between them as one image.
        return prompt if there else "\n".join([token] * len(example.images)) + prompt

    def _turns(self, example: Example) -> Sequence[Turn]:
        """An example as a conversation for this model; empty if its texts are read as they are."""
        turns: Sequence[Turn] = example.messages
        if example.prompt is not None and not (self.chat and self.ask_by_chat):
            return ()
        if example.prompt is not None and not turns:
            turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
        if example.prompt is not None:
            self.findings["prompts are read through the model's chat template (prompt-template = 'auto')"] += 1
        return with_parts(turns, len(example.images), example.place) if self.kind.has_image else turns

    def _tokens(
        self, example: Example, text: str, spans: Sequence[Span], *, templated: bool
    ) -> tuple[list[int], list[bool], dict[str, list[int]]]:
        """A text's tokens, tokenised as a whole, and whether each is learnt, which means: has a character of a span.

        With images, the processor may say more about each token, such as which ones are an image's.
        """
        special = not templated
        if self.kind.has_image:
            special = self.tokenizer.bos_token is None or not text.startswith(self.tokenizer.bos_token)
        if not getattr(self.tokenizer, "is_fast", False):
            ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
            learnt = [False] * len(ids)
            for span in spans:
                starts = [self.tokenizer(text[:end], add_special_tokens=special)["input_ids"] for end in span]
                start, end = (common_start(ids, found) for found in starts)
                learnt[start:end] = [True] * (end - start)
        else:
            found = self.tokenizer(
                text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
            )
            ids = list(found["input_ids"])
            added = found["special_tokens_mask"] if special else [0] * len(ids)
            learnt = _touched(found["offset_mapping"], added, spans)
            if not templated and added[-1] and ids[-1] == self.tokenizer.eos_token_id:
                ids, learnt = ids[:-1], learnt[:-1]
        if len(ids) > 1 and special and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            ids, learnt = ids[1:], learnt[1:]  # the text has one of its own
        if self.kind.has_image:
            told = self._with_images(example, text, add_special_tokens=special)
            found, wanted = _expanded(ids, learnt, told.pop("input_ids"), example, self.tokenizer.eos_token_id)
            return found, wanted, {name: values for name, values in told.items() if len(values) == len(found)}
        return ids, learnt, {}

    def _cut(self, example: Example, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Cut the beginning of the prompt (except the first token), then the end of the completion."""
        self.truncated += 1
        if self.kind.has_image:
            raise DataError(
                f"{example.place}: {len(ids)} tokens with its image, expected at most {self.max_length} (max-length)"
            )
        first = next(position for position, label in enumerate(labels) if label != IGNORED)
        surplus = min(len(ids) - self.max_length, max(first - 1, 0))
        ids, labels = ids[:1] + ids[1 + surplus :], labels[:1] + labels[1 + surplus :]
        return ids[: self.max_length], labels[: self.max_length]

    def _with_suffix(self, example: Example, asked: str) -> tuple[list[int], list[bool], dict[str, list[int]]]:
        """Like :meth:`_tokens`, with a prompt whose tokens see each other both ways and an answer that they do not see.

        Where one begins and the other ends is in the token types; read as one text, the prompt would see the answer.
        """
        told = self._with_images(example, asked, suffix=[example.completion])
        ids, types = told.pop("input_ids"), told["token_type_ids"]
        return ids, [kind == 1 for kind in types], told

    def _with_images(self, example: Example, text: str, **options: Any) -> dict[str, list[int]]:
        """The processor's tokens, and the other fields that have a number for each token."""
        try:
            encoded = self.joint(images=_opened(example), text=[text], **options)
        except DataError:
            raise
        except Exception as error:  # processors may raise any error
            raise DataError(f"{example.place}: the model's processor refuses this image and text: {error}") from None
        self.image_names.update(encoded)
        fields = ["input_ids", *(name for name in encoded if name.endswith("token_type_ids"))]
        return {name: [int(number) for number in encoded[name][0]] for name in fields}


def _touched(places: Sequence[Span], added: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    """Whether each token has a character of a span; a token without characters: whether it begins there.

    Args:
        places: where the tokens' characters begin and end.
        added: whether a token is not part of the text.
        spans: the spans of characters.
    """
    begins, ends = np.array(places, np.int64).reshape(-1, 2).T
    found = np.zeros(len(begins), bool)
    for start, end in spans:
        found |= np.maximum(begins, start) < np.minimum(np.maximum(ends, begins + 1), end)
    learnt: list[bool] = (found & (np.array(added) == 0)).tolist()
    return learnt


def _expanded(
    ids: Sequence[int], learnt: Sequence[bool], with_image: list[int], example: Example, end: int | None
) -> tuple[list[int], list[bool]]:
    """The processor's tokens, with those that it has added for the image, and whether each is learnt.

    An ``end`` token that it has put behind the text is left to the caller.
    """
    found, at = [], 0
    if with_image[-1] == end and ids[-1] != end:
        with_image = with_image[:-1]
    for token in with_image:
        same = at < len(ids) and token == ids[at]
        found.append(same and learnt[at])
        at += same
    if at != len(ids) or with_image[-1] != ids[-1]:
        raise DataError(f"{example.place}: the model's processor does not keep this text beside its image")
    return with_image, found


def load_encoder(
    found: FoundModel, kind: Kind, max_length: int, *, chat: bool = False, prompt_template: str = "none"
) -> Encoder:
    """The encoder of a base model.

    Args:
        found: the model.
        kind: the kind of task.
        max_length: most tokens of one example.
        chat: whether examples are conversations, which need a chat template.
        prompt_template: whether prompts and completions go through it, too (``auto``), or not (``none``).

    Raises:
        BaseModelError: the model's folder lacks a tokenizer, an image processor, or a chat template.
    """
    import transformers

    encoder = Encoder(kind, max_length)
    if kind.has_text:
        encoder.tokenizer = _load(transformers.AutoTokenizer, found, "tokenizer", "tokenizer.json")
        _require_padding(encoder.tokenizer, load_config(found))
    if kind.has_image and kind.has_text:
        encoder.joint = _load(transformers.AutoProcessor, found, "processor", "processor_config.json")
        missing = [part for part in ("image_processor", "tokenizer") if not hasattr(encoder.joint, part)]
        if missing:  # transformers returns the tokenizer for a model of texts alone
            raise BaseModelError(
                f"base-model {found.name!r} has no processor of images and texts (task {kind.name!r}): what it has "
                f"lacks {' and '.join(missing)}"
            )
        encoder.images = encoder.joint.image_processor
        encoder.tokenizer = encoder.joint.tokenizer
        _require_padding(encoder.tokenizer, load_config(found))
    elif kind.has_image:
        encoder.images = _image_processor(found, encoder)
    if encoder.tokenizer is not None:
        limits = (max_length, getattr(encoder.tokenizer, "model_max_length", None), longest_input(load_config(found)))
        encoder.max_length = min(int(limit) for limit in limits if limit)
    speaker = encoder.joint if getattr(encoder.joint, "chat_template", None) else encoder.tokenizer
    if getattr(speaker, "chat_template", None):
        added = [str(token) for token in encoder.tokenizer.added_tokens_decoder.values()]
        encoder.chat = ChatTemplate(speaker, encoder.tokenizer, [*encoder.tokenizer.all_special_tokens, *added])
        encoder.ask_by_chat = prompt_template == "auto"
    if encoder.takes_suffix:
        encoder.chat = None
    if chat and encoder.chat is None:
        raise BaseModelError(
            f"base-model {found.name!r} has no chat template, which messages need; use an instruction-tuned model, or "
            "prompt and completion columns"
        )
    return encoder


def _image_processor(found: FoundModel, encoder: Encoder) -> Any:
    """The model's own; if it has no file, its architecture's default at the model's image size, with a remark."""
    import transformers
    from transformers.models.auto import image_processing_auto

    names: Mapping[str, Any] = getattr(image_processing_auto, "IMAGE_PROCESSOR_MAPPING_NAMES", {})
    try:
        return _load(transformers.AutoImageProcessor, found, "image processor", "preprocessor_config.json")
    except BaseModelError:
        config = load_config(found)
        known = names.get(config.model_type)
        side = getattr(config, "image_size", None)
        if known is None or not side or (found.folder / "preprocessor_config.json").exists():
            raise
    name = str(known.get("torchvision") or known.get("pil") if isinstance(known, Mapping) else known[0])
    height, width = (side, side) if isinstance(side, int) else side
    processor = getattr(transformers, name)(size={"height": height, "width": width})
    encoder.remarks.append(
        f"base-model {found.name!r} has no preprocessor_config.json: images are prepared by {config.model_type}'s "
        f"default, at {height} x {width}"
    )
    return processor


def _load(auto: Any, found: FoundModel, what: str, file: str) -> Any:
    try:
        return auto.from_pretrained(found.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many classes for a missing file
        reason = str(error).strip().splitlines()
        raise BaseModelError(
            f"base-model {found.name!r}: {found.folder} has no {what} that can be loaded (expected {file}): "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None


def _require_padding(tokenizer: Any, config: Any) -> None:
    """Choose some padding token that the model can embed; which one does not matter, because the mask hides it."""
    rows = getattr(config.get_text_config(), "vocab_size", None) or len(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows:
        return
    others = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id, 0)
    chosen = next(token for token in others if token is not None and token < rows)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)


def _padded(items: Sequence[Mapping[str, list[int]]], padding: int | None) -> dict[str, Tensor]:
    """Lists of one length per item to tensors ``[n, longest]``, padded on the right."""
    if not items:
        return {}
    longest = max(len(next(iter(item.values()))) for item in items)
    result = {}
    for name in items[0]:
        fill = padding if name in ("input_ids", "labels") and padding is not None else 0
        numbers = np.full((len(items), longest), fill, np.int64)
        for row, item in enumerate(items):
            numbers[row, : len(item[name])] = item[name]
        result[name] = torch.from_numpy(numbers)
    return result


def _opened(example: Example) -> list[Any]:
    return [read_image(image, example.place) for image in example.images]
