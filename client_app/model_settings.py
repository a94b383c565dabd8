"""Settings of a client's base model: which one, how it is loaded, and how it computes."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_KEY = re.compile(r"(?:node-config |run-config )?([a-z][a-z0-9.-]{0,60})(?= = )")


class SettingsError(ValueError):
    """A node-config or run-config value is missing or not valid."""

    @property
    def told(self) -> str:
        """The key only: values of node-config belong to the owner, and the server does not see them."""
        named = _KEY.match(str(self))
        return named.group(1) if named else ""


@dataclass(frozen=True)
class ModelSettings:
    """The base model and how it is held; the field ``base_model`` is the key ``base-model``.

    Every key may be in run-config, for all clients, and in a client's node-config, which wins.
    """

    base_model: str = ""
    """Hugging Face id (``org/name`` or ``org/name@revision``) or folder; for clients with a ``data-path``."""
    reference_model: str = ""
    """For ``fedmosaic`` with different base models: a small model (hub id or folder) with which all clients compare
    their data. Empty: the base model itself."""
    task: str = ""
    """The kind of task, one of docs/data-and-models.md; empty: found from the columns."""
    labels: str = ""
    """Comma-separated class names that all clients share; the head is then part of the adapter. Empty: each client has
    its own labels and its own head, which never leaves it."""
    label_weights: str = "none"
    """Weight of each label in training: ``none`` (all examples count the same), ``balanced`` (all labels have the same
    total weight, by the client's own training examples), or a number for each label in the order of ``labels``."""
    preference_beta: float = 0.1
    """Beta of preferences: how closely the model is held to the base model (DPO)."""
    target_modules: str = ""
    """Modules that get LoRA factors: comma-separated ends of their names, ``all-linear``, or ``language-model`` (all
    linear modules outside vision and audio towers and projectors). Empty: PEFT's choice for the architecture."""
    model_dtype: str = "auto"
    """Number type of the frozen base: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on GPUs that have it, else
    float32. Adapters are always float32."""
    attention: str = "auto"
    """How attention is computed: ``sdpa``, ``eager``, ``flash`` (FlashAttention 2, a package of its own, for GPUs) or
    ``auto``: transformers' choice for the model, and in blocks for training in bfloat16 on CPUs."""
    quantization: str = "none"
    """``none`` or ``4bit`` (bitsandbytes NF4, on GPUs and CPUs; extra ``quantization``)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    micro_batch_size: int = 0
    """Largest number of examples at once; larger batches are accumulated from parts. 0: no bound."""
    logits_chunk_mb: int = 32
    """Largest amount of logits at once in training and evaluation, in MB of float32, if the model's head allows it; 0:
    no bound."""
    group_by_length: bool = False
    """Put texts of similar lengths together: the examples of every eight training batches are sorted by length."""
    packing: bool = False
    """Pack several training texts into one row, kept apart by their positions, so that no time goes into padding. Only
    for ``causal-lm`` and models that keep packed texts apart; otherwise refused."""
    max_length: int = 512
    """Largest number of tokens of one example; a longer prompt loses its beginning, a longer text its end."""
    max_new_tokens: int = 64
    """Largest number of tokens of each generated text in an evaluation."""
    generate_examples: int = 0
    """Number of texts to generate in each evaluation, for exact match and ROUGE-L."""

    def __post_init__(self) -> None:
        require_choice("model-dtype", self.model_dtype, ("auto", "float32", "bfloat16"))
        require_choice("attention", self.attention, ("auto", "sdpa", "eager", "flash"))
        require_choice("quantization", self.quantization, ("none", "4bit"))
        _ = self.weights_asked
        if not 0 < self.preference_beta < float("inf"):
            raise SettingsError(f"preference-beta = {self.preference_beta}, expected a number above 0")
        leasts = {
            "micro_batch_size": 0,
            "logits_chunk_mb": 0,
            "max_length": 2,
            "max_new_tokens": 1,
            "generate_examples": 0,
        }
        for key, least in leasts.items():
            if getattr(self, key) < least:
                raise SettingsError(f"{key_of(key)} = {getattr(self, key)}, expected at least {least}")
        if self.labels and len(set(self.label_names)) < max(2, len(self.label_names)):
            raise SettingsError(f"labels = {self.labels!r}, expected at least two names that differ, or none")

    @property
    def weights_asked(self) -> tuple[float, ...]:
        """The numbers of ``label-weights``; none if it is a word.

        Raises:
            SettingsError: it is neither.
        """
        if self.label_weights in ("none", "balanced"):
            return ()
        try:
            return tuple(float(part) for part in self.label_weights.split(","))
        except ValueError:
            raise SettingsError(
                f"label-weights = {self.label_weights!r}, expected none, balanced, or numbers like 1,5"
            ) from None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The labels that all clients share, in order; empty if each has its own."""
        return tuple(name for name in map(canonical_label, self.labels.split(",")) if name)


def canonical_label(name: str) -> str:
    """A label in the form for comparisons: in NFC (letters can be encoded in two ways), without surrounding space."""
    return unicodedata.normalize("NFC", name).strip().strip("\ufeff")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise SettingsError(f"{key} = {value!r}, expected one of {', '.join(choices)}")


def key_of(name: str) -> str:
    """The key of a field."""
    return name.replace("_", "-")
