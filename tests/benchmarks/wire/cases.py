"""Real base models and real tasks for ``wire_bytes.py``: the same examples for FedAlloy and for the stock app."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client_app.model.bases.model_folders import find_model
from client_app.scenarios.cifar import MODEL
from client_app.scenarios.files import load_files
from client_app.scenarios.instruct import DEFAULT_BASE
from client_app.settings import DataSettings, ModelSettings, Settings
from tests.benchmarks.round_overhead import ALPHA, LINEAR, Case, save_examples

TOKENS = 64


@dataclass(frozen=True)
class Real:
    """A scenario with its base model, and how much is trained in a round."""

    scenario: str
    of: int
    model: str
    rank: int
    rate: float
    targets: tuple[str, ...]
    training: Mapping[str, int]
    kind: str
    dtype: str = "float32"
    trained: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


REAL = {
    "smollm2": Real(
        *("instruct-6", 6, DEFAULT_BASE, 16, 1e-3, LINEAR, {"steps": 4, "batch-size": 4}),
        kind="AutoModelForCausalLM",
        dtype="bfloat16",
        config={"max-length": TOKENS},
    ),
    "vit": Real(
        *("cifar100-20", 20, str(MODEL), 8, 5e-3, (), {"steps": 8, "batch-size": 16}),
        kind="AutoModelForImageClassification",
        trained=("classifier",),
    ),
}
"""SmolLM2-135M with LoRA on all linear layers, texts cut to 64 tokens; and the ViT pre-trained on 60 classes of
CIFAR-100 with PEFT's choice of layers and a head that everybody trains."""


@dataclass(frozen=True)
class RealCase(Case):
    """A case on real data; ``base`` is one of :data:`REAL`, ``data`` the scenarios' folder."""

    data: Path = Path()

    @property
    def real(self) -> Real:
        """What is trained."""
        return REAL[self.base]

    @property
    def training(self) -> dict[str, int]:
        """See :class:`Case`."""
        return dict(self.real.training)

    @property
    def rate(self) -> float:
        """See :class:`Case`."""
        return self.real.rate

    def prepare(self, folder: Path) -> dict[str, dict[str, Any]]:
        """See :class:`Case`."""
        folder.mkdir(parents=True)
        self.draw(folder, 0)
        return {
            f"client-{number}": {"partition-id": number, "num-partitions": self.real.of}
            for number in range(self.clients)
        }

    def draw(self, folder: Path, seed: int) -> None:
        """See :class:`Case`; all examples of a client, padded to the longest of their split."""
        real, facts = self.real, dict[str, Any]()
        name = str(self.data / real.model) if (self.data / real.model).is_dir() else real.model
        folder_of_base = str(find_model(name, folder / ".cache").folder)
        for number in range(self.clients):
            model = ModelSettings(
                base_model=folder_of_base,
                max_length=TOKENS,
                model_dtype=real.dtype,
                target_modules=",".join(real.targets),
            )
            data = DataSettings(data_root=str(self.data))
            given = Settings(
                f"client-{number}", folder, real.scenario, number, real.of, seed, real.rank, ALPHA, 0.0, model, data
            )
            base, found = load_files(real.scenario, given)
            save_examples(folder / f"{number}.npz", {split: found.splits[split] for split in ("train", "test")})
            facts = {"base": folder_of_base, "targets": base.targets}
            if real.trained:
                facts["labels"] = int(base.model.get_parameter(f"{base.heads[0]}.weight").shape[0])
        facts |= {"class": real.kind, "rank": real.rank, "alpha": ALPHA, "dtype": real.dtype, "trained": real.trained}
        (folder / "facts.json").write_text(json.dumps(facts))

    def config(self, folder: Path) -> dict[str, Any]:
        """See :class:`Case`."""
        real, facts = self.real, json.loads((folder / "facts.json").read_text())
        return {
            "scenario": real.scenario,
            "data-root": str(self.data),
            "local-steps": real.training["steps"],
            "batch-size": real.training["batch-size"],
            "base-model": facts["base"],
            "model-dtype": real.dtype,
            "target-modules": ",".join(real.targets),
            "lora-r": real.rank,
            "lora-alpha": ALPHA,
            **real.config,
        }
