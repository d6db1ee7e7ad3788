"""Every name of timm's three modules: adapted and equal to the host with nothing merged, or refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import aptvit
from aptvit.hosts.catalogue import describe_model, model_names

NAMES = sorted(name for module in ("vision_transformer", "deit", "eva") for name in timm.list_models(module=module))


def shallow(name: str, depth: int = 2) -> Any:
    """The model, two blocks deep, whatever its name takes for that."""
    if "sapiens2" not in name:
        return timm.create_model(name, depth=depth).eval()
    with torch.device("meta"):
        heads = [getattr(block.attn, "num_kv_heads", None) for block in timm.create_model(name).blocks[:depth]]
    return timm.create_model(name, depth=depth, num_kv_heads=heads).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_merged_every_name_is_the_host(name: str) -> None:
    host = shallow(name)
    images = torch.randn(1, 3, *host.patch_embed.img_size)
    with torch.inference_mode():
        expected = host(images)
        logits = aptvit.adapt(host, thresholds=(-1.0, -1.0))(images)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_catalogue_lists_every_name_of_the_three_modules() -> None:
    assert set(NAMES) <= set(model_names())


@pytest.mark.slow
def test_all_names_of_the_three_modules_can_be_adapted() -> None:
    assert [name for name in NAMES if describe_model(name).reason is not None] == []
