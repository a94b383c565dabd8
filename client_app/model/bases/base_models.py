"""Any Hugging Face model as a frozen base: found on disk or in the cache, loaded for a kind of task, fingerprinted.

A model in the cache is not downloaded again, and with ``HF_HUB_OFFLINE=1`` nothing is downloaded. Only safetensors are
read, and code that comes with a model is never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError

from client_app.data.dataset import Base
from client_app.kinds import Kind
from client_app.model.bases.heads import (
    draw_missing,
    head_modules,
    label_parameters,
    labels_of,
    name_labels,
    rename_rows,
    rows_by_name,
)
from client_app.model.bases.model_folders import HERE, BaseModelError, FoundModel, first_line, load_config
from client_app.model.forward.block_attention import use_blocks
from client_app.model.linear_modules import features_of
from client_app.model.module_roles import outside_towers
from client_app.settings import ModelSettings

_IN_A_LAYER = re.compile(r"\.\d+\.")
"""In names of parameters: they belong to one of several equal layers, not to a head."""
_MOST_DRAWN = 0.25
"""Largest share of a model's numbers that may be drawn beside its heads (a pooler, tokens of an image)."""
_USUAL_TARGETS = (
    *(("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v")),
    *(("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",)),
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
    where the labels are the client's own, the heads are the client's own. A head that the checkpoint has keeps its rows
    by the names of their labels. Modules that the checkpoint lacks are drawn from their names, the same at every
    client, and saved with every personal model.

    Args:
        found: the model.
        kind: the kind of task.
        settings: dtype, quantization, targets.
        labels: names of the classes, in order; empty where texts are generated.
        padding_id: the tokenizer's padding token.

    Raises:
        BaseModelError: the model is not for this kind, or lacks modules that should be adapted.
    """
    model, missing, notes = _loaded(found, kind, settings, labels)
    _set_texts(model, padding_id)
    heads = head_modules(model) if kind.head else ()
    drawn = _drawn(model, missing, heads, found)
    _set_up(model, found, settings)
    drawn_modules = {name.rsplit(".", 1)[0] for name in drawn}
    wanted = _targets(model, found.name, settings.target_modules, heads)
    targets = tuple(name for name in wanted if name not in drawn_modules)
    _require_within_adapters(drawn_modules, targets, found)
    if drawn:
        notes.append(
            f"the checkpoint lacks {', '.join(sorted(drawn_modules))}: drawn, frozen, and saved with personal models"
        )
    shared = bool(settings.label_names) or not kind.has_labels
    return Base(
        name=found.name,
        model=model,
        fingerprint=found.fingerprint,
        targets=targets,
        heads=heads if shared else (),
        own_heads=() if shared else heads,
        drawn=drawn,
        notes=tuple(notes),
    )


def _loaded(
    found: FoundModel, kind: Kind, settings: ModelSettings, labels: Sequence[str]
) -> tuple[Any, list[str], list[str]]:
    """The model with a value for every parameter, the parameters that the checkpoint lacked, and notes."""
    import transformers

    config = load_config(found)
    auto_model = getattr(transformers, kind.auto_model)
    options: dict[str, Any] = {"dtype": dtype_of(settings), **_attention(settings)}
    if settings.quantization == "4bit":
        options |= four_bit()
    kind.configure(config)
    renamed = kind.has_labels and labels_of(config) != list(labels)
    rows = rows_by_name(labels_of(config), labels) if renamed else []
    if renamed:
        options["ignore_mismatched_sizes"] = True
        if not any(row is not None for row in rows):
            name_labels(config, labels)
    model, info = _from_pretrained(auto_model, found, kind, config, options)
    missing = [*_names(info["missing_keys"]), *_names(info["mismatched_keys"])]
    notes = list(found.notes)
    layers = [name for name in _names(info["unexpected_keys"]) if _IN_A_LAYER.search(name)]
    if layers:
        notes.append(f"{len(layers)} parameters of the checkpoint have no place in this model ({min(layers)}, ...)")
    if renamed:
        notes += _fit_head(model, label_parameters(auto_model, config), missing, rows, labels)
    else:
        draw_missing(model, missing)
    return model, missing, notes


def _fit_head(
    model: Any, by_label: Iterable[str], missing: Sequence[str], rows: Sequence[int | None], labels: Sequence[str]
) -> list[str]:
    """Give the head one row for each label: the checkpoint's row of that name, or a drawn one; draw what is missing."""
    has_head = not set(by_label) & set(missing)
    if has_head and any(row is not None for row in rows):
        draw_missing(model, missing)
        rename_rows(model, by_label, rows, labels)
        kept = sum(row is not None for row in rows)
        return [f"{kept} of {len(labels)} labels have the base model's own row of its head, by their names"]
    rename_rows(model, by_label, [None] * len(labels), labels)
    draw_missing(model, missing)
    return ["the base model's head is for labels of other names: all its rows are drawn anew"] if has_head else []


def _set_up(model: Any, found: FoundModel, settings: ModelSettings) -> None:
    """Freeze the model in evaluation mode, and make it compute as the client's settings say."""
    if settings.gradient_checkpointing:
        _checkpoint_gradients(model, found)
    if settings.quantization == "4bit":
        keep_trainable(model)
    if settings.attention == "auto":
        use_blocks(model)
    model.requires_grad_(False).eval()


def _set_texts(model: Any, padding_id: int | None) -> None:
    """Switch off the cache of keys and values, and set the padding token, by which the model finds where texts end."""
    for part in {id(item): item for item in (model.config, model.config.get_text_config())}.values():
        part.use_cache = False
        if padding_id is not None:
            part.pad_token_id = padding_id


def _checkpoint_gradients(model: Any, found: FoundModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise BaseModelError(f"base-model {found.name!r} ({model.config.model_type}) has no gradient checkpointing")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _require_within_adapters(drawn_modules: Iterable[str], targets: Sequence[str], found: FoundModel) -> None:
    """Refuse a drawn parameter in a module that contains adapted modules."""
    around = [m for m in drawn_modules if any(target.startswith(f"{m}.") for target in targets)]
    if around:
        raise BaseModelError(
            f"base-model {found.name!r}: the checkpoint lacks a parameter of {around[0]!r}, around modules that are "
            "adapted: no PEFT adapter can bring it along. Save the whole model with save_pretrained"
        )


def _from_pretrained(
    auto_model: Any, found: FoundModel, kind: Kind, config: Any, options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    try:
        with _quiet():
            model, info = auto_model.from_pretrained(
                found.folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **HERE,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise BaseModelError(
                f"base-model {found.name!r} is a {config.model_type!r}, for which transformers has no "
                f"{kind.auto_model} (task {kind.name!r})"
            ) from None
        raise BaseModelError(
            f"base-model {found.name!r}: {found.folder} cannot be loaded: {first_line(error)}"
        ) from None
    output = model.get_output_embeddings() if kind.generative else None
    if output is not None and any(model.get_parameter(name) is output.weight for name in _names(info["missing_keys"])):
        raise BaseModelError(
            f"base-model {found.name!r}: {found.folder} has no output layer, which {kind.auto_model} needs to write "
            "texts (the model was saved without its head)"
        )
    return model, info


def _drawn(model: Any, missing: Sequence[str], heads: Sequence[str], found: FoundModel) -> tuple[str, ...]:
    """Parameters that are neither the checkpoint's nor a head's, as long as they are few.

    Raises:
        BaseModelError: the weights are those of another architecture.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = sorted(n for n in set(missing) if n in sizes and n.rsplit(".", 1)[0] not in heads)
    if sum(sizes[name] for name in names) > _MOST_DRAWN * sum(sizes.values()):
        raise BaseModelError(
            f"base-model {found.name!r}: the weights in {found.folder} lack {len(names)} of {len(sizes)} parameters "
            f"of a {model.config.model_type!r} ({names[0]!r}, ...), expected all but a pooler or a head; are "
            "config and weights of one model?"
        )
    return tuple(names)


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """The number type of the frozen base.

    ``auto`` is bfloat16 on a GPU that has it: autocast computes in it there anyway, so that only memory changes. CPUs
    stay at float32: whether bfloat16 is faster depends on their instructions, and so a run gives the same numbers on
    all of them.
    """
    if settings.model_dtype != "auto":
        found: torch.dtype = getattr(torch, settings.model_dtype)
        return found
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _attention(settings: ModelSettings) -> dict[str, str]:
    if settings.attention == "auto":
        return {}
    return {"attn_implementation": {"flash": "flash_attention_2"}.get(settings.attention, settings.attention)}


def load_flava(found: FoundModel, settings: ModelSettings) -> Any:
    """A FLAVA's two towers and its multimodal encoder (``transformers.FlavaModel``), frozen, in evaluation mode."""
    import transformers

    flava: Any = transformers.FlavaModel
    with _quiet():
        model, info = flava.from_pretrained(
            found.folder,
            use_safetensors=True,
            output_loading_info=True,
            **HERE,
            dtype=dtype_of(settings),
            **_attention(settings),
        )
    draw_missing(model, [*_names(info["missing_keys"]), *_names(info["mismatched_keys"])])
    return model.requires_grad_(False).eval()


def load_backbone(found: FoundModel, kinds: Sequence[Kind], settings: ModelSettings, padding_id: int | None) -> Any:
    """A model for several tasks, frozen, in evaluation mode: one that writes if a task does, else one without head.

    Raises:
        BaseModelError: the model cannot write texts, or is to be quantised.
    """
    if settings.quantization != "none":
        raise BaseModelError(f"base-model {found.name!r}: with several tasks, quantization = 'none' is expected")
    writing = [kind for kind in kinds if kind.generative]
    if not writing:
        model = load_body(found)
    else:
        sees = next((kind for kind in writing if kind.has_image), writing[0])
        model, _, _ = _loaded(found, sees, settings, ())
        _set_texts(model, padding_id)
        _set_up(model, found, settings)
    return model


def load_body(found: FoundModel) -> Any:
    """A model without any head (``transformers.AutoModel``), frozen, in evaluation mode, in float32."""
    import transformers

    with _quiet():
        model = transformers.AutoModel.from_pretrained(found.folder, use_safetensors=True, **HERE, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def _names(keys: Iterable[Any]) -> list[str]:
    return [key if isinstance(key, str) else key[0] for key in keys]


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
    if wanted.strip() == "language-model":
        return tuple(name for name in outside_towers(key for key, _ in model.named_modules()) if name in linear)

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


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from packing a model's weights for evaluation on CPUs.

    It does so for good the first time that a layer is evaluated, if the CPU has AVX512-BF16. The packed form has no
    backward pass: everything below it would be trained with gradients of zero, without any warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def four_bit() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a base in 4 bits.

    Raises:
        BaseModelError: bitsandbytes is not installed.
    """
    import importlib.util

    import transformers

    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError("quantization = '4bit' needs bitsandbytes: pip install 'fedalloy[quantization]'")
    config = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}


class _quiet:
    """Silences transformers' report on every new head, because ours are meant to be new. Errors still come."""

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
