"""Base models in GGUF files and in packages: a tiny Llama written with llama.cpp's own library, and what it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from client_app.model.bases import gguf_models
from client_app.model.bases.gguf_models import GGUFError, dequantised, model_in_package
from client_app.model.bases.model_folders import BaseModelError, find_model

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra gguf)")

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = ["<s>", "</s>", *LETTERS, "Ġ", "ab", "cd"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: Any, quantisation: Any) -> Path:
    """The file that llama.cpp's converter would write for this Llama; matrices as ``quantisation`` stores them."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")

    def add(name: str, tensor: torch.Tensor, heads: int = 0) -> None:
        numbers = tensor.detach().numpy()
        if heads:  # llama.cpp pairs rotary dimensions the other way round
            numbers = numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        kind = quantisation if numbers.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    for key, tensor in model.state_dict().items():
        if key.startswith("model.layers."):
            _, _, layer, *rest, leaf = key.split(".")
            heads = config.num_attention_heads if rest[-1] in ("q_proj", "k_proj") else 0
            add(f"blk.{layer}.{NAMES['.'.join(rest)]}.{leaf}", tensor, heads)
    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[0, 5, 9, 28, 3, 7, 2]])
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "dtype", "tolerance"), [("F32", "float32", 1e-5), ("Q8_0", "bfloat16", 0.02)])
def test_a_gguf_file_is_the_model_that_was_written(
    llama: Any, tmp_path: Path, kind: str, dtype: str, tolerance: float
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType[kind])
    found = find_model(str(file), tmp_path / "cache")
    model = transformers.AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    assert model.config.dtype is torch.float32
    assert str(transformers.AutoConfig.from_pretrained(found.folder).dtype) == f"torch.{dtype}"
    assert not hasattr(model.config, "quantization_config")
    expected = logits(llama)
    assert (logits(model) - expected).abs().max() < tolerance * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("abcd", add_special_tokens=False).input_ids == [TOKENS.index("ab"), TOKENS.index("cd")]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab</s>"


def test_a_file_is_dequantised_once_and_a_changed_file_again(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    convert = gguf_models._convert
    monkeypatch.setattr(gguf_models, "_convert", lambda *given: (calls.append(given), convert(*given)))
    file = write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    first = find_model(str(file), tmp_path / "cache")
    assert find_model(str(file), tmp_path / "cache") == first
    assert len(calls) == 1
    with torch.no_grad():
        llama.model.norm.weight[0] += 1
    write_gguf(file, llama, gguf.GGMLQuantizationType.F32)
    second = find_model(str(file), tmp_path / "cache")
    assert second.folder != first.folder
    assert second.fingerprint != first.fingerprint
    assert len(calls) == 2


def test_a_conversion_that_fails_leaves_nothing_behind(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)

    def half(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_models, "_convert", half)
        with pytest.raises(BaseModelError, match="disk full"):
            find_model(str(file), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()] == []
    assert (find_model(str(file), tmp_path / "cache").folder / "config.json").exists()


@pytest.mark.parametrize(
    ("content", "expected"), [(b"PK\x03\x04", "not a GGUF file"), (b"GGUF" + bytes(60), "cannot be read")]
)
def test_what_is_no_gguf_file_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "strange.gguf"
    file.write_bytes(content)
    with pytest.raises(GGUFError, match=rf"strange\.gguf .*{expected}"):
        dequantised(file, tmp_path / "cache")


def fake_package(root: Path, name: str, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    info = root / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def test_a_package_that_carries_a_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "tiny-folder", {"tiny/model/config.json": b"{}", "tiny/model/model.safetensors": b""})
    fake_package(tmp_path, "tiny-gguf", {"other/tiny.gguf": b"GGUF", "other/__init__.py": b"raise SystemExit"})
    fake_package(tmp_path, "no-model", {"plain/config.json": b"{}"})
    fake_package(tmp_path, "two-models", {"two/a.gguf": b"GGUF", "two/b.gguf": b"GGUF"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_in_package("tiny-folder") == tmp_path / "tiny" / "model"
    assert model_in_package("tiny-gguf") == tmp_path / "other" / "tiny.gguf"
    assert model_in_package("no-model") is None
    assert model_in_package("not-installed") is None
    assert model_in_package("org/name") is None
    with pytest.raises(GGUFError, match=r"'two-models' carries 2 models \(.*a\.gguf, .*b\.gguf\)"):
        model_in_package("two-models")
