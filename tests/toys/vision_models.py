"""Tiny models that read images and write text, one of each family, with processors of their own kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.tiny_models import character_tokenizer, llama_config, save_model
from tests.toys.tiny_models import QwenProcessor, qwen_vl, save_gemma3, save_llava

T: Any = transformers
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def save_llava_next(folder: Path, size: int = 16) -> Path:
    """A LLaVA-NeXT: an image in one to three tiles, as fits its shape, and a token at the end of each row."""
    tokenizer = character_tokenizer()
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(image_size=size, projection_dim=32, **_SEES),
        text_config=llama_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    images = T.LlavaNextImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
    )
    processor = T.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return save_model(folder, lambda: T.LlavaNextForConditionalGeneration(config), processor)


def save_idefics3(folder: Path, size: int = 16) -> Path:
    """An Idefics3: tiles in rows and columns with tokens that name their places, and the whole image once more."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)])
    names = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_tokens(names, special_tokens=True)
    config = T.Idefics3Config(
        vision_config={**_SEES, "image_size": size},
        text_config=T.LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = T.Idefics3ImageProcessor(size={"longest_edge": 2 * size}, max_image_size={"longest_edge": size})
    processor = T.Idefics3Processor(images, tokenizer, image_seq_len=1)
    return save_model(folder, lambda: T.Idefics3ForConditionalGeneration(config), processor)


def save_paligemma(folder: Path, size: int = 16) -> Path:
    """A PaliGemma: image and prompt see each other both ways, the answer after them does not."""
    tokenizer = character_tokenizer()
    images = T.SiglipImageProcessor(size={"height": size, "width": size})
    images.image_seq_length = (size // 8) ** 2
    processor = T.PaliGemmaProcessor(images, tokenizer)
    config = T.PaliGemmaConfig(
        vision_config=T.SiglipVisionConfig(image_size=size, **{k: v for k, v in _SEES.items() if k[:4] != "init"}),
        text_config=T.GemmaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16, **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return save_model(folder, lambda: T.PaliGemmaForConditionalGeneration(config), processor)


SAVED: dict[str, Callable[[Path], Path]] = {
    "llava": save_llava,
    "llava-next": save_llava_next,
    "idefics3": save_idefics3,
    "paligemma": save_paligemma,
    "gemma3": save_gemma3,
}
"""Those whose processor transformers loads without torchvision."""


def qwen2_vl(processor: QwenProcessor) -> Any:
    """A Qwen2-VL: patches in one long list, as its successor has them, without windows."""
    found = qwen_vl(processor).config.to_dict()
    text = {key: value for key, value in found["text_config"].items() if key in _TEXT or key == "rope_parameters"}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    text = {**text, "vocab_size": len(processor.tokenizer), "num_key_value_heads": 2}
    return _seeded(T.Qwen2VLForConditionalGeneration, T.Qwen2VLConfig, text, vision, found)


def qwen3_vl(processor: QwenProcessor) -> Any:
    """A Qwen3-VL: what its first layers see of an image goes into the text's first layers."""
    found = qwen_vl(processor).config.to_dict()
    text = {key: value for key, value in found["text_config"].items() if key in _TEXT or key == "rope_parameters"}
    text |= {"vocab_size": len(processor.tokenizer), "num_key_value_heads": 2, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "spatial_merge_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return _seeded(T.Qwen3VLForConditionalGeneration, T.Qwen3VLConfig, text, vision, found)


def _seeded(model: Any, config: Any, text: Any, vision: Any, like: Any) -> Any:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    return model(config(text_config=text, vision_config=vision, **{name: like[name] for name in names})).eval()


QWEN: dict[str, Callable[[QwenProcessor], Any]] = {"qwen2-vl": qwen2_vl, "qwen2.5-vl": qwen_vl, "qwen3-vl": qwen3_vl}
"""Those whose processor reads videos, too, for which transformers wants torchvision."""
