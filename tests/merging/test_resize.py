from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import aptvit
from aptvit.merging import resize


def test_it_is_adapt_without_the_branch(make_host: Callable[..., Any], images: Tensor) -> None:
    host = make_host()
    model = resize(host, keep=0.5)
    assert model.state_dict().keys() == host.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(images), aptvit.adapt(host, keep=0.5, resize_only=True)(images))
    assert model.layout(images).keep_ratio < 0.6
