"""A client with a file of its own, in process, for the tests of base models and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client_app.data.dataset import Base, ClientData
from client_app.model.personal import PersonalModel
from client_app.own.files import load_own
from client_app.settings import DataSettings, ModelSettings, Settings
from fedalloy_adapters.adapter import Adapter


def settings_of(
    path: Path | str, state: Path, base: Path | str = "", data: Mapping[str, Any] | None = None, **model: Any
) -> Settings:
    """Rank 4, alpha 8; what else the client is told about its data and its model."""
    return Settings(
        client_id="berlin",
        state_dir=state,
        scenario="",
        partition_id=0,
        num_partitions=1,
        seed=0,
        rank=4,
        alpha=8.0,
        dropout=0.0,
        model=ModelSettings(base_model=str(base), **model),
        data=DataSettings(data_path=str(path), **(data or {})),
    )


def loaded(settings: Settings) -> tuple[PersonalModel, ClientData]:
    """Its model with the initial adapter active, and its data."""
    base, data = load_own(settings)
    return personal(base, settings.rank, settings.alpha), data


def personal(base: Base, rank: int = 2, alpha: float = 4.0) -> PersonalModel:
    """A model over this base with the initial adapter active."""
    model = PersonalModel(base, rank, alpha)
    model.load("local", Adapter.initial(model.whole_layout, 0))
    model.activate({"local": 1.0})
    return model
