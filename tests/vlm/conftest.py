from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_llava


@pytest.fixture
def make_processor() -> Callable[..., Any]:
    return tiny_llava.make_processor


@pytest.fixture
def make_llava() -> Callable[..., Any]:
    return tiny_llava.make_llava
