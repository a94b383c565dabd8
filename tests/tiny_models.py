"""More tiny models than :mod:`examples.tiny_models` has: several architectures, built offline in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from examples.tiny_models import (
    character_tokenizer,
    llama_config,
    save_flava,
    save_llama,
    save_model,
    save_vit,
    word_tokenizer,
)

__all__ = [
    "character_tokenizer",
    "save_bert",
    "save_flava",
    "save_llama",
    "save_llama_reader",
    "save_llava",
    "save_vilt",
    "save_vit",
    "word_tokenizer",
]


def save_llama_reader(folder: Path, words: Sequence[str], width: int = 32, layers: int = 2) -> Path:
    """A Llama-style causal LM over the same words as :func:`save_bert`, so that texts have as many tokens in both."""
    tokenizer = word_tokenizer(words)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return save_model(folder, lambda: transformers.LlamaForCausalLM(llama_config(tokenizer, width, layers)), tokenizer)


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
    return save_model(folder, lambda: transformers.BertModel(config), tokenizer)


def save_llava(folder: Path, size: int = 16, vision_layers: int = 2) -> Path:
    """A LLaVA: CLIP's vision tower before a Llama of two layers, with its processor."""
    tokenizer = character_tokenizer()
    vision = transformers.CLIPVisionConfig(
        image_size=size,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=vision_layers,
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
    return save_model(folder, lambda: transformers.LlavaForConditionalGeneration(config), processor)


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
    return save_model(folder, lambda: transformers.ViltModel(config), processor)
