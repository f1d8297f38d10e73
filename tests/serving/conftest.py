from __future__ import annotations

from pathlib import Path

import pytest

import dynnet


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, exported; not to be written to."""
    stages = tmp_path_factory.mktemp("served") / "stages"
    dynnet.export(dynnet.create_model("digits"), stages)
    return stages
