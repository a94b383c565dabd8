"""Tiny models with tokenizers and processors, made in milliseconds without a network, to try things out.

They are random and know nothing: they show that everything works, and nothing about quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>", "<system>")


def character_tokenizer(*, bos: bool = True) -> Any:
    """One token for each printable ASCII character; texts begin with ``<s>`` where ``bos``."""
    letters = [*SPECIAL, *(chr(code) for code in range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
    )


def word_tokenizer(words: Sequence[str]) -> Any:
    """BERT's way: ``[CLS] words [SEP]``, with token types for pairs."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def llama_config(tokenizer: Any, width: int = 32, layers: int = 2) -> Any:
    """A Llama of two heads over a tokenizer's tokens."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )


def save_model(folder: Path, build: Any, *others: Any, seed: int = 0) -> Path:
    """Build a model from a seed and save it, with its tokenizer and processors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, chat: bool = False, width: int = 32, layers: int = 2) -> Path:
    """A Llama-style causal language model over characters, where ``chat`` with a template for messages."""
    tokenizer = character_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return save_model(folder, lambda: transformers.LlamaForCausalLM(llama_config(tokenizer, width, layers)), tokenizer)


def save_vit(folder: Path, size: int = 16) -> Path:
    """A ViT with its image processor."""
    config = transformers.ViTConfig(
        image_size=size,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    processor = transformers.ViTImageProcessor(size={"height": size, "width": size})
    return save_model(folder, lambda: transformers.ViTModel(config), processor)


def save_flava(folder: Path, words: Sequence[str], size: int = 16) -> Path:
    """A FLAVA: towers for images and texts and an encoder over both, with its processor."""
    tokenizer = word_tokenizer(words)
    common: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.2,
    }
    config = transformers.FlavaConfig(
        image_config={**common, "image_size": size, "patch_size": 8},
        text_config={**common, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
        multimodal_config=common,
        hidden_size=16,
        projection_dim=16,
        init_codebook=False,
    )
    images = transformers.FlavaImageProcessor(
        size={"height": size, "width": size}, crop_size={"height": size, "width": size}
    )
    processor = transformers.FlavaProcessor(image_processor=images, tokenizer=tokenizer)
    return save_model(folder, lambda: transformers.FlavaModel(config), processor)
