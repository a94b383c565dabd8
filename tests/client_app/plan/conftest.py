"""What tests of plans share."""

from __future__ import annotations

import pytest

from client_app.model.personal import PersonalModel
from tests.fedalloy_adapters.tiny_vit import base_of


@pytest.fixture(scope="module")
def model() -> PersonalModel:
    return PersonalModel(base_of(), 2, 4.0)
