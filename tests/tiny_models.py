"""Tiny Hugging Face models of several architectures with tokenizers and processors, built offline in milliseconds."""

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
    """One token for each printable ASCII character; begins with ``<s>`` where ``bos``."""
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


def _save(folder: Path, build: Any, *others: Any, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder


def llama_config(tokenizer: Any, width: int = 32, layers: int = 2) -> Any:
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


def save_llama(folder: Path, *, chat: bool = False) -> Path:
    """A Llama-style causal LM over characters."""
    tokenizer = character_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return _save(folder, lambda: transformers.LlamaForCausalLM(llama_config(tokenizer)), tokenizer)


def save_llama_reader(folder: Path, words: Sequence[str], width: int = 32, layers: int = 2) -> Path:
    """A Llama-style causal LM over the same words as :func:`save_bert`, so that texts have as many tokens in both."""
    tokenizer = word_tokenizer(words)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return _save(folder, lambda: transformers.LlamaForCausalLM(llama_config(tokenizer, width, layers)), tokenizer)


def save_bert(folder: Path, words: Sequence[str]) -> Path:
    """A BERT-style encoder without a head, as most checkpoints are."""
    tokenizer = word_tokenizer(words)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return _save(folder, lambda: transformers.BertModel(config), tokenizer)


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
    return _save(folder, lambda: transformers.ViTModel(config), processor)


def save_llava(folder: Path, size: int = 16) -> Path:
    """A LLaVA: CLIP's vision tower before a Llama, with its processor."""
    tokenizer = character_tokenizer()
    vision = transformers.CLIPVisionConfig(
        image_size=size,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=llama_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    images = transformers.CLIPImageProcessor(
        size={"height": size, "width": size}, crop_size={"height": size, "width": size}
    )
    processor = transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return _save(folder, lambda: transformers.LlavaForConditionalGeneration(config), processor)


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
    return _save(folder, lambda: transformers.FlavaModel(config), processor)


def save_vilt(folder: Path, words: Sequence[str], size: int = 16) -> Path:
    """A ViLT: one encoder over words and patches, without a head."""
    tokenizer = word_tokenizer(words)
    config = transformers.ViltConfig(
        vocab_size=len(tokenizer),
        image_size=size,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    images = transformers.ViltImageProcessor(size={"shortest_edge": size}, size_divisor=8)
    processor = transformers.ViltProcessor(image_processor=images, tokenizer=tokenizer)
    return _save(folder, lambda: transformers.ViltModel(config), processor)
