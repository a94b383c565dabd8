"""Tokenizers of the usual kinds, and chat templates that are written like those of known models."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["The answer is four. The sky is blue. What is two plus two? Why? Because. user assistant system\n\n"] * 20
MARKS = ["<|user|>", "<|assistant|>", "<|system|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]

ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role']=='user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # reasoning of the last answer only, as Qwen3 has it
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
OPENED = (  # a generation prompt that opens what answers in a conversation do not have, as DeepSeek-R1's does
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|system|>' + (tools | tojson) }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ (m.content or '') + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {"zephyr": ZEPHYR, "mistral": MISTRAL, "chatml": CHATML, "marked": CHATML_MARKED} | {
    "thinking": THINKING, "opened": OPENED, "tools": TOOLS
}  # fmt: skip


def sentencepiece(*, first: bool, marks: Sequence[str] = (), ends: str = "<s> $A") -> Any:
    """Llama 2's way: U+2581 for a space, and before each segment, or before the first only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    alphabet = sorted(
        {letter for text in CORPUS for letter in text} | set(string.ascii_letters) | set("\u2581<|>[]/_{}\":,'")
    )
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _finished(tokenizer, marks, ends, unk_token="<unk>", pad_token="</s>")


def unigram(marks: Sequence[str] = (), ends: str = "$A </s>") -> Any:
    """SentencePiece's other way, of T5 and XLM-R: likely pieces, blanks joined, and no token for what is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer: Any = trainers.UnigramTrainer
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(CORPUS, trainer(vocab_size=120, special_tokens=special, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return _finished(tokenizer, marks, ends, unk_token="<unk>", pad_token="<pad>")


def wordpiece(marks: Sequence[str] = (), ends: str = "<s> $A </s>") -> Any:
    """BERT's way: lower case, accents gone, words in pieces, blanks forgotten."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, marks, ends, unk_token="<unk>", pad_token="<pad>")


def byte_level(*, marks: bool | Sequence[str] = True, ends: str = "$A") -> Any:
    """GPT-2's way: bytes, a space belongs to the word after it; ``marks``: what templates write are tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.decoder = decoders.ByteLevel()
    chosen = (MARKS if marks else ()) if isinstance(marks, bool) else marks
    return _finished(tokenizer, chosen, ends, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _finished(tokenizer: Tokenizer, marks: Sequence[str], ends: str, **tokens: str) -> Any:
    """As transformers has it, with ``marks`` as tokens, and what it puts around a text (``ends``)."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | tokens
    if marks:
        tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    around = [(token, tokenizer.token_to_id(token)) for token in ends.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=around)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


TOKENIZERS = {
    "sentencepiece": lambda: sentencepiece(first=False),
    "metaspace": lambda: sentencepiece(first=True),
    "bytes": byte_level,
    "bytes without marks": lambda: byte_level(marks=False),
}
FAMILIES: dict[str, Callable[[Sequence[str]], Any]] = {
    "bytes": lambda marks: byte_level(marks=marks),
    "bytes, both ends": lambda marks: byte_level(marks=marks, ends="<s> $A <|endoftext|>"),
    "sentencepiece": lambda marks: sentencepiece(first=False, marks=marks),
    "metaspace, no ends": lambda marks: sentencepiece(first=True, marks=marks, ends="$A"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}
"""By kind, with given tokens of a chat template; a tokenizer puts both ends around a plain text, one, or none."""
