"""Forms for programs that serve models: vLLM's LoRA adapters, and llama.cpp's GGUF."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from server_app.tools.handover.personal import FILES, ExportError, Personal, require_one

CONVERTER = "convert_hf_to_gguf.py"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that ``vllm serve --max-lora-rank`` accepts."""


def folded(state: Mapping[str, Tensor], scalings: Mapping[str, float], rank: int) -> dict[str, Tensor]:
    """A PEFT state dict with its scalings in B, and every rank padded to one with zeros: the products are the same.

    Args:
        state: ``...<module>.lora_A.weight`` ``[r_m, d_in]`` and ``...<module>.lora_B.weight`` ``[d_out, r_m]``.
        scalings: scalings by module name as in the keys, without ``.lora_A.weight``.
        rank: at least every r_m.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, factor = key.rsplit(".lora_", 1)
        missing = rank - (tensor.shape[0] if factor == "A.weight" else tensor.shape[1])
        if factor == "A.weight":
            padded = tensor.new_zeros(rank, tensor.shape[1])
            padded[: rank - missing] = tensor
        else:
            padded = tensor.new_zeros(tensor.shape[0], rank)
            padded[:, : rank - missing] = tensor * scalings[module]
        found[key] = padded.contiguous()
    return found


def write_vllm(personal: Personal, folder: Path) -> int:
    """Write a PEFT directory that vLLM loads (alpha folded into B, one rank, no patterns); returns the rank.

    Raises:
        ExportError: it has heads or biases, which vLLM's adapters cannot hold; or it is in parts.
    """
    import json

    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file, save_file

    require_one(personal, "vllm")
    config = personal.config
    state = load_file(personal.folder / "adapter_model.safetensors")
    beside = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if beside:
        raise ExportError(
            f"client {personal.about.get('client', '?')!r} cannot be exported as vllm: it has {beside[0]!r}, and "
            "vLLM's adapters have no heads and no biases; --as merged writes a whole model, which vLLM serves by itself"
        )
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    ranks, scalings = {}, {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            full = key.removesuffix(".lora_A.weight")
            name = full.removeprefix("base_model.model.")
            ranks[full] = int(state[key].shape[0])
            alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
            scalings[full] = alpha / (ranks[full] ** 0.5 if config.get("use_rslora") else ranks[full])
    rank = max(ranks.values())
    save_file(folded(state, scalings, rank), folder / FILES[1], metadata={"format": "pt"})
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config |= {"modules_to_save": None, "task_type": "CAUSAL_LM" if personal.task == "causal-lm" else None}
    (folder / FILES[0]).write_text(json.dumps(config, indent=2) + "\n")
    return rank


def max_lora_rank(rank: int) -> int:
    """The ``--max-lora-rank`` for adapters of a rank.

    Raises:
        ExportError: vLLM has no such ranks.
    """
    if rank > RANKS[-1]:
        raise ExportError(f"rank {rank}: vLLM takes at most {RANKS[-1]}; --as merged writes a whole model")
    return next(most for most in RANKS if most >= rank)


def converter() -> list[str]:
    """The command that starts llama.cpp's converter, from ``$LLAMA_CPP`` or ``PATH``.

    Raises:
        ExportError: it is not installed.
    """
    checkout = os.environ.get("LLAMA_CPP", "")
    script = Path(checkout) / CONVERTER if checkout else None
    if script is not None and script.is_file():
        return [sys.executable, str(script)]
    for name in (CONVERTER, CONVERTER.removesuffix(".py")):
        if found := shutil.which(name):
            return [sys.executable, found] if found.endswith(".py") else [found]
    raise ExportError(
        f"--as gguf needs llama.cpp's {CONVERTER}, found neither in $LLAMA_CPP nor in PATH: git clone "
        "https://github.com/ggml-org/llama.cpp, pip install -r llama.cpp/requirements.txt, export LLAMA_CPP=llama.cpp"
    )


def write_gguf(merge: Callable[[Path], Any], folder: Path) -> None:
    """Write ``model.gguf`` of a merged model, in float32 like the merge; llama.cpp's own programs make smaller files.

    Args:
        merge: writes the merged model to a folder.
        folder: the export's folder.

    Raises:
        ExportError: there is no converter, or it failed.
    """
    command = converter()
    with tempfile.TemporaryDirectory(prefix="fedalloy-gguf-") as merged:
        merge(Path(merged))
        asked = [*command, merged, "--outfile", str(folder / "model.gguf"), "--outtype", "f32"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / "model.gguf").is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ExportError(f"{CONVERTER} failed: {said[-1][:300] if said else f'exit code {done.returncode}'}")
