"""More tiny models than :mod:`examples.tiny_models` has: several architectures, built offline in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    "QwenProcessor",
    "character_tokenizer",
    "llama_config",
    "qwen_vl",
    "save_bert",
    "save_flava",
    "save_gemma3",
    "save_llama",
    "save_llama_reader",
    "save_llava",
    "save_model",
    "save_qwen_vl",
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


def save_llava(folder: Path, size: int = 16, vision_layers: int = 2, layers: int = 2) -> Path:
    """A LLaVA: CLIP's vision tower before a Llama, with its processor."""
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
        text_config=llama_config(tokenizer, layers=layers),
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


def save_gemma3(folder: Path, size: int = 32) -> Path:
    """A Gemma 3 that sees: an image's four tokens attend to each other both ways, told apart by their token types."""
    tokenizer = character_tokenizer()
    image, begin, end = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
    tokenizer.add_tokens([image, begin, end], special_tokens=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: str(getattr(tokenizer, name)) for name in ("pad_token", "bos_token", "eos_token", "unk_token")},
        extra_special_tokens={"image_token": image, "boi_token": begin, "eoi_token": end},
    )
    text = llama_config(tokenizer).to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.Gemma3Config(
        text_config={
            **{name: text[name] for name in (*kept, "pad_token_id", "bos_token_id", "eos_token_id")},
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "sliding_window": 64,
            "initializer_range": 0.2,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": size,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids(image),
        boi_token_index=tokenizer.convert_tokens_to_ids(begin),
        eoi_token_index=tokenizer.convert_tokens_to_ids(end),
    )
    images = transformers.Gemma3ImageProcessor(size={"height": size, "width": size})
    processor = transformers.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4)
    return save_model(folder, lambda: transformers.Gemma3ForConditionalGeneration(config), processor)


class QwenProcessor(transformers.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which needs torchvision."""

    def __init__(self) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = character_tokenizer()
        tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
        self.image_processor: Any = Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=64 * 64
        )
        self.tokenizer, self.video_processor, self.chat_template = tokenizer, None, None
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)


def qwen_vl(processor: QwenProcessor, layers: int = 2, vision_layers: int = 1) -> Any:
    """A Qwen2.5-VL: its images are patches in one long list, their places a grid, and positions depend on both."""
    tokenizer = processor.tokenizer
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": list(range(vision_layers)),
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def save_qwen_vl(folder: Path, vision_layers: int = 1, layers: int = 2) -> Path:
    """A :func:`qwen_vl` with its tokenizer; :class:`QwenProcessor` has no part for videos, so tests make it."""
    processor = QwenProcessor()
    return save_model(folder, lambda: qwen_vl(processor, layers, vision_layers), processor.tokenizer)
