from __future__ import annotations

from pathlib import Path

import class_folders
import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders.cats_and_cups(tmp_path_factory.mktemp("photos"))
