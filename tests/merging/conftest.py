"""The methods once more, in numpy and float64, one image and one token at a time, as plainly as they are defined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class NumpyViT:
    """timm's VisionTransformer for one image, in parts: (D) weights from the state of a host."""

    def __init__(self, host: Any) -> None:
        self.weights = {key: value.detach().double().numpy() for key, value in host.state_dict().items()}
        self.depth = len(host.blocks)
        self.num_heads = host.blocks[0].attn.num_heads
        self.patch = host.patch_embed.patch_size[0]
        self.num_prefix = host.num_prefix_tokens
        self.pool = host.global_pool
        self.eps = host.blocks[0].norm1.eps

    def linear(self, name: str, x: Array) -> Array:
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def norm(self, name: str, x: Array) -> Array:
        if f"{name}.weight" not in self.weights:
            return x
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        return unit * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, image: Array) -> Array:
        """(3, H, W) -> (N, D) tokens that the first block reads."""
        p, (_, height, width) = self.patch, image.shape
        cells = [(y, x) for y in range(0, height, p) for x in range(0, width, p)]
        pixels = np.stack([image[:, y : y + p, x : x + p].reshape(-1) for y, x in cells])
        kernel = self.weights["patch_embed.proj.weight"]
        tokens = pixels @ kernel.reshape(len(kernel), -1).T + self.weights["patch_embed.proj.bias"]
        prefix = [self.weights[key][0] for key in ("cls_token", "dist_token", "reg_token") if key in self.weights]
        positions = self.weights["pos_embed"][0]
        if len(positions) == len(tokens):
            return np.concatenate([*prefix, tokens + positions])
        return np.concatenate([*prefix, tokens]) + positions

    def qkv(self, layer: int, normed: Array) -> Array:
        """(N, D) -> (3, H, N, d)"""
        out = self.linear(f"blocks.{layer}.attn.qkv", normed)
        return out.reshape(len(normed), 3, self.num_heads, -1).transpose(1, 2, 0, 3)

    def attention(self, layer: int, normed: Array, size: Array | None) -> tuple[Array, Array, Array]:
        """(N, D) -> output (N, D), attention (H, N, N), keys (H, N, d). A key counts ``size`` times."""
        q, k, v = self.qkv(layer, normed)
        logits = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        if size is not None:
            weight = weight * size
        weight = weight / weight.sum(-1, keepdims=True)
        out = (weight @ v).transpose(1, 0, 2).reshape(len(normed), -1)
        return self.scaled(f"blocks.{layer}.ls1", self.linear(f"blocks.{layer}.attn.proj", out)), weight, k

    def mlp(self, layer: int, x: Array) -> Array:
        hidden = self.linear(f"blocks.{layer}.mlp.fc1", self.norm(f"blocks.{layer}.norm2", x))
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return self.scaled(f"blocks.{layer}.ls2", self.linear(f"blocks.{layer}.mlp.fc2", hidden))

    def scaled(self, name: str, x: Array) -> Array:
        return x * self.weights[f"{name}.gamma"] if f"{name}.gamma" in self.weights else x

    def head(self, x: Array, size: Array | None) -> Array:
        x = self.norm("norm", x)
        if "head_dist.weight" in self.weights:
            return (self.linear("head", x[0]) + self.linear("head_dist", x[1])) / 2
        if self.pool == "token":
            return self.linear("head", x[0])
        patches = x[self.num_prefix :]
        weight = np.ones(len(patches)) if size is None else size[self.num_prefix :]
        return self.linear("head", self.norm("fc_norm", weight @ patches / weight.sum()))

    def run(self, x: Array, reduce: Any, weigh: bool, size: Array | None = None) -> Array:
        """Logits of the image whose tokens are x. reduce(layer, x, size, normed, attention, k) -> x, size."""
        for layer in range(self.depth):
            normed = self.norm(f"blocks.{layer}.norm1", x)
            out, attention, k = self.attention(layer, normed, size if weigh else None)
            x, size = reduce(layer, x + out, size, normed, attention, k)
            x = x + self.mlp(layer, x)
        return self.head(x, size)


def tome_step(
    x: Array, size: Array | None, metric: Array, r: int, num_prefix: int
) -> tuple[Array, Array | None, list[tuple[int, int]]]:
    """One merge, over positions in the whole sequence. -> tokens, sizes, (source, target) pairs"""
    num_tokens = len(x)
    r = min(r, (num_tokens - num_prefix) // 2)
    if r <= 0:
        return x, size, []
    unit = metric / np.sqrt((metric**2).sum(-1, keepdims=True))
    a, b = list(range(0, num_tokens, 2)), list(range(1, num_tokens, 2))
    scores = unit[a] @ unit[b].T
    for place, position in enumerate(a):
        if position < num_prefix:
            scores[place, :] = -np.inf
    for place, position in enumerate(b):
        if position < num_prefix:
            scores[:, place] = -np.inf
    order = np.argsort(-scores.max(-1), kind="stable")
    source, unmerged = list(order[:r]), list(order[r:])
    if num_prefix:
        unmerged = sorted(unmerged)
    size = np.ones(num_tokens) if size is None else np.array(size, dtype=float)
    total, new_size = x * size[:, None], size.copy()
    pairs = []
    for place in source:
        target = b[int(scores[place].argmax())]
        pairs.append((a[place], target))
        total[target] = total[target] + x[a[place]] * size[a[place]]
        new_size[target] += size[a[place]]
    stays = [a[place] for place in unmerged] + b
    stays = [*range(num_prefix), *(position for position in stays if position >= num_prefix)]
    return total[stays] / new_size[stays][:, None], new_size[stays], pairs


def evit_step(x: Array, attention: Array, keep: float, num_prefix: int, fuse: bool) -> Array:
    """One selection by the class token's attention (H, N, N)."""
    num_patches = len(x) - num_prefix
    left = math.ceil(keep * num_patches)
    if left == num_patches:
        return x
    score = attention[:, 0, num_prefix:].mean(0)
    order = np.argsort(-score, kind="stable")
    parts = [x[:num_prefix], x[num_prefix:][order[:left]]]
    if fuse:
        parts.append(sum(score[j] * x[num_prefix + j] for j in order[left:])[None])
    return np.concatenate(parts)


def soft_pairs(scores: Array, r: int, divisors: Array | None = None) -> tuple[Array, Array]:
    """DTEM's relaxed choice over the full matrix. -> assignment, and what its rows were divided by"""
    logits = np.full_like(scores, -np.inf)
    for row, one in enumerate(scores):
        for column in np.argsort(-one, kind="stable")[:3]:
            logits[row, column] = one[column] / 0.1
    khot = np.zeros_like(scores)
    for _ in range(r):
        sharp = np.exp((logits - logits.max()) / 0.1)
        onehot = sharp / sharp.sum()
        khot = khot + onehot
        # float64 reaches sums that torch's clamp at the smallest number lets pass as well
        remaining = np.clip(1 - onehot.sum(-1, keepdims=True), np.finfo(np.float64).tiny, None)
        logits = logits + np.log(remaining)
    if divisors is None:
        divisors = np.maximum(khot.sum(-1, keepdims=True), 1)
    return khot / divisors, divisors


def soft_step(
    x: Array,
    size: Array | None,
    metric: Array,
    r: int,
    num_effective: int,
    num_prefix: int,
    divisors: Array | None = None,
) -> tuple[Array, Array, Array]:
    """One soft merge. -> tokens, weights, the divisors of the rows"""
    size = np.ones(len(x)) if size is None else size
    unit = metric / np.sqrt((metric**2).sum(-1, keepdims=True))
    a, b = list(range(num_prefix, num_effective, 2)), list(range(num_prefix + 1, num_effective, 2))
    clip = np.clip if divisors is None else lambda value, *_: value  # a gradient passes through it
    pairs, divisors = soft_pairs(unit[a] @ unit[b].T, r, divisors)
    new_x, new_size = x.copy(), size.copy()
    for j, target in enumerate(b):
        new_size[target] = size[target] + sum(pairs[i, j] * size[source] for i, source in enumerate(a))
        total = size[target] * x[target] + sum(pairs[i, j] * size[source] * x[source] for i, source in enumerate(a))
        new_x[target] = total / new_size[target]
    for i, source in enumerate(a):
        new_size[source] = size[source] * clip(1 - pairs[i].sum(), 0, 1)
    remaining = a + b + list(range(num_effective, len(x)))
    remaining = [remaining[i] for i in np.argsort(-new_size[remaining], kind="stable")]
    order = [*range(num_prefix), *remaining]
    return new_x[order], new_size[order], divisors


@pytest.fixture(scope="session")
def oracle() -> Any:
    class Oracle:
        """What tests compare with."""

        vit = NumpyViT
        tome_step = staticmethod(tome_step)
        evit_step = staticmethod(evit_step)
        soft_step = staticmethod(soft_step)
        soft_pairs = staticmethod(soft_pairs)

    return Oracle


@pytest.fixture
def pixels(images: Tensor) -> Callable[[int], Tensor]:
    """Real photos, (5, 3, side, side) float64: the middle of each."""

    def crop(side: int) -> Tensor:
        start = (128 - side) // 2
        return images[:, :, start : start + side, start : start + side].double()

    return crop
