"""Architectures as they come: which modules are adapted, which are heads, and that a step of training moves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from client_app.data.dataset import Base, Dataset
from client_app.kinds import KINDS
from client_app.model.bases.base_models import load_base
from client_app.model.bases.model_folders import BaseModelError, find_model
from client_app.model.start_adapter import read_start_adapter
from client_app.own.encoding import load_encoder
from client_app.own.examples import Example
from client_app.own.files import load_own
from client_app.plan import training
from client_app.settings import ModelSettings
from fedalloy_adapters.adapter import Adapter
from fedalloy_adapters.files.peft_format import write_peft_directory
from proto.fedalloy.v1 import plan_pb2
from tests.client_app.own_clients import personal, settings_of
from tests.toys import tiny_models, toy_data

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 4}
GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "qwen3": lambda: transformers.Qwen3Config(**SIZE, **WORDS, num_key_value_heads=2, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZE, **WORDS, num_key_value_heads=2, head_dim=16),
    "phi3": lambda: transformers.Phi3Config(**SIZE, **WORDS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZE, **WORDS),
    "roberta": lambda: transformers.RobertaConfig(**SIZE, **WORDS),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=64, max_position_embeddings=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64
    ),
    "modernbert": lambda: transformers.ModernBertConfig(**SIZE, **WORDS, cls_token_id=1, sep_token_id=2),
    "vit": lambda: transformers.ViTConfig(**SIZE, **IMAGE),
    "swin": lambda: transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "clip": lambda: transformers.CLIPConfig(
        vision_config={**SIZE, **IMAGE}, text_config={**SIZE, "vocab_size": 64, "max_position_embeddings": 16}
    ),
}
CASES = [
    ("gpt2", "causal-lm", {"c_attn"}, ()),
    ("qwen3", "causal-lm", {"q_proj", "v_proj"}, ()),
    ("gemma3", "causal-lm", {"q_proj", "v_proj"}, ()),
    ("phi3", "causal-lm", {"qkv_proj"}, ()),
    ("gpt_neox", "causal-lm", {"query_key_value"}, ()),
    ("gpt2", "text-classification", {"c_attn"}, ("score",)),
    ("roberta", "text-classification", {"query", "value"}, ("classifier.dense", "classifier.out_proj")),
    ("distilbert", "text-classification", {"q_lin", "v_lin"}, ("pre_classifier", "classifier")),
    ("modernbert", "text-classification", {"Wqkv"}, ("head.dense", "classifier")),
    ("vit", "image-classification", {"q_proj", "v_proj"}, ("classifier",)),
    ("swin", "image-classification", {"q_proj", "v_proj"}, ("classifier",)),
    ("clip", "image-classification", {"q_proj", "v_proj"}, ("classifier",)),
]


def saved(folder: Path, architecture: str, kind: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, KINDS[kind].auto_model).from_config(CONFIGS[architecture]())
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def base_of(folder: Path, kind: str, **settings: Any) -> Base:
    labels = () if KINDS[kind].generative else ("a", "b", "c")
    return load_base(find_model(str(folder), folder / ".cache"), KINDS[kind], ModelSettings(**settings), labels, 0)


def some_data(kind: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6) % 3
    if kind == "image-classification":
        return Dataset({"pixel_values": torch.randn(6, 3, 16, 16, generator=generator)}, labels, kind)
    ids = torch.randint(3, 60, (6, 8), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Dataset(inputs, ids.clone() if KINDS[kind].generative else labels, kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "kind", "ends", "heads"), CASES)
def test_targets_and_heads_of_an_architecture(
    architecture: str, kind: str, ends: set[str], heads: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    base = base_of(saved(tmp_path, architecture, kind), kind, model_dtype=dtype)
    assert {name.rsplit(".", 1)[-1] for name in base.targets} == ends
    assert base.own_heads == heads
    model = personal(base)
    before = model.read("local").part(model.layout).vector
    parameters = model.trainable("local", model.layout)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    step = plan_pb2.TrainStep(steps=2, batch_size=3, learning_rate=1e-2)
    training.train(model, step, parameters, some_data(kind), 0)
    after = Adapter(model.layout, (model.read("local").part(model.layout).vector - before).abs())
    assert all(float(tensor.max()) > 0 for _, tensor in after.items())


def test_all_linear_finds_conv1d_and_says_when_there_is_nothing(tmp_path: Path) -> None:
    base = base_of(saved(tmp_path / "gpt2", "gpt2", "causal-lm"), "causal-lm", target_modules="all-linear")
    assert {name.rsplit(".", 1)[-1] for name in base.targets} == {"c_attn", "c_fc", "c_proj"}
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(BaseModelError, match=r"\(resnet\) has no linear module that LoRA could adapt"):
        base_of(tmp_path / "resnet", "image-classification", target_modules="all-linear")


def test_an_adapter_of_conv1d_goes_to_peft_and_comes_back(tmp_path: Path) -> None:
    """GPT-2 keeps weights the other way round; LoRA's A and B are as everywhere."""
    folder = saved(tmp_path / "gpt2", "gpt2", "causal-lm")
    model = personal(base_of(folder, "causal-lm"))
    ours = Adapter(model.layout, torch.randn(model.layout.size, generator=torch.Generator().manual_seed(0)))
    model.load("local", ours)
    inputs = dict(some_data("causal-lm").inputs)
    write_peft_directory(tmp_path / "ours", ours, str(folder), {})
    stranger = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model.logits(inputs)
        assert float((expected - stranger(**inputs).logits).abs().max()) > 0.1
        found = PeftModel.from_pretrained(stranger, str(tmp_path / "ours")).eval()(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-4)

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    peer: Any = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    peer.save_pretrained(tmp_path / "peer")
    model.load("local", read_start_adapter(str(tmp_path / "peer"), model.layout, {}))
    with torch.no_grad():
        assert torch.allclose(model.logits(inputs), peer(**inputs).logits, atol=1e-4)


def test_a_model_of_texts_is_not_taken_for_one_of_images_and_texts(tmp_path: Path) -> None:
    llama = find_model(str(tiny_models.save_llama(tmp_path / "llama")), tmp_path)
    with pytest.raises(BaseModelError, match="has no processor of images and texts"):
        load_encoder(llama, KINDS["image-text-to-text"], 32)
    bert = find_model(str(tiny_models.save_bert(tmp_path / "bert", toy_data.VOCABULARY)), tmp_path)
    with pytest.raises(BaseModelError, match="has no processor of images and texts"):
        load_encoder(bert, KINDS["image-text-classification"], 32)


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def index(folder: Path, file: str) -> None:
    """Beside whole weights, an index that names a file which is there, too."""
    (folder.parent / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder.parent / "other")
    torch.save({}, folder / "weights.bin")
    weights = {"model.norm.weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json cannot be read"),
    "config is missing": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "unknown model type": (lambda f: set_config(f, model_type="gpt9"), "cannot be used: .*gpt9"),
    "needs code": (
        lambda f: set_config(
            f, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}
        ),
        "cannot be used",
    ),
    "weights cut off": (cut, "cannot be loaded: SafetensorError"),
    "weights of another format": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK" + bytes(500)),
        "cannot be load",
    ),
    "a shard missing": (
        lambda f: (
            (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors")
            and (f / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
            )
        ),
        "names 'model-00002-of-00002.safetensors', expected",
    ),
    "a shard elsewhere": (lambda f: index(f, "../other/model.safetensors"), "names '../other/model.safetensors'"),
    "a shard that is a pickle": (lambda f: index(f, "weights.bin"), "names 'weights.bin', expected"),
    "an index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        r"index\.json cannot be read",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    base_of(folder, "causal-lm")
    spoil, words = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(BaseModelError, match=f"base-model '.*llama'.*{words}"):
        base_of(folder, "causal-lm")


def test_the_fingerprint_is_of_everything_that_decides_what_the_model_computes(tmp_path: Path) -> None:
    """But not of how it was saved: another copy of a model is the same model."""
    folder = tiny_models.save_llama(tmp_path / "llama")
    found = [find_model(str(folder), tmp_path).fingerprint]
    set_config(folder, transformers_version="0.0.1", _name_or_path="/elsewhere")
    assert find_model(str(folder), tmp_path).fingerprint == found[0]
    set_config(folder, rms_norm_eps=0.5)
    found.append(find_model(str(folder), tmp_path).fingerprint)
    weights = {"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    found.append(find_model(str(folder), tmp_path).fingerprint)
    assert len(set(found)) == 3


def test_no_text_is_longer_than_the_model_has_positions(tmp_path: Path) -> None:
    """RoBERTa counts from behind the padding token, so two of its 66 positions are not for tokens."""
    words = tiny_models.word_tokenizer(toy_data.VOCABULARY)
    for architecture, positions, expected in (("bert", 40, 40), ("roberta", 66, 64)):
        folder = tmp_path / architecture
        size = SIZE | {"vocab_size": len(words), "max_position_embeddings": positions, "pad_token_id": 1}
        kind = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[architecture]
        transformers.AutoModelForSequenceClassification.from_config(kind(**size)).save_pretrained(folder)
        words.save_pretrained(folder)
        encoder = load_encoder(find_model(str(folder), tmp_path), KINDS["text-classification"], 512)
        assert encoder.max_length == expected
        split = encoder.encode([Example("here", text="good film " * 60, label="a")], ("a", "b"))
        assert split.inputs["input_ids"].shape == (1, expected)
        base = base_of(folder, "text-classification")
        with torch.no_grad():
            assert base.model(**split.inputs).logits.shape == (1, 3)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["~~~"])
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": f"{n}>", "completion": "~~~"} for n in range(4)]
    settings = settings_of(toy_data.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path, folder)
    with pytest.raises(BaseModelError, match=r"gives token 104, but it has embeddings of 104 tokens only"):
        load_own(settings)
