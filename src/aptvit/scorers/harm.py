"""Scores by the predicted harm of merging a patch: how much the model's answer would change, per token that is saved.

Merging a patch replaces its tokens in front of the first block, a change d, and to first order changes the outputs by
J d (as if the merged token still counted as many). The harm is the size of that change:

    classes: E_c (d log p_c)^2 / 2 over the most probable classes c (with all classes, the Fisher estimate of the KL
             divergence of the answers);
    maps:    |J d|^2 / 2 with each channel divided by its standard deviation, estimated by random projections.

A backward pass for each class or projection gives the harm of all patches of all sizes at once; no patch is merged for
it. A small network learns to predict its root, relative to the image's mean, on unlabelled images
(`aptvit.scorers.sizes`): the harm itself differs by orders of magnitude, and a few patches would decide what is
learned. So scores compare the patches of one image; give every image a share of its tokens (``keep=``).

images ── all 2x patches ── first block ──> tokens ── network ──> log of the root of the relative harm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from aptvit.encoder.encoder import Encoder
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.learned import parts_of
from aptvit.scorers.sizes import FACTORS, Answers, SizesScorer, fit_sizes, relative_channels

__all__ = ["HarmScorer", "fit_harm", "harm_of"]

_PASSES = 4  # classes, or random projections of maps, for each image
_TOKENS = 1 << 13  # of the images that run at a time with gradients


class HarmScorer(SizesScorer):
    """Predicted harm of merging a patch for each token that it saves, see `fit_harm`."""

    name = "harm"
    fit_call = "aptvit.fit_harm(model, images)"

    def _scores(self, predicted: Tensor, distances: Tensor, factor: int) -> Tensor:
        return super()._scores(predicted, distances, factor).square() / (factor**2 - 1)


def fit_harm(
    model: Any,
    images: Images | Iterable[Images],
    answers: Answers | None = None,
    *,
    updates: int = 600,
    max_images: int = 8192,
    seed: int = 0,
) -> float:
    """Train the network of ``scorer="harm"`` to predict what a merge changes, on images without labels.

    The host's weights are not changed. The teacher is exact to first order and costs about ten forward passes for each
    image; any number of images helps, and random crops are as good as images.

    Args:
        model: Adapted with ``scorer="harm"``.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either.
        answers: From (B, C, H, W) normalised images to what must not change, with nothing merged and with gradients:
            (B, C) logits of classes, or (B, K, H', W') maps. By default the model's own outputs: logits, or features if
            it has no classifier.
        updates: Least number of optimizer steps; a quarter and a half are tried, too, and what is best on held back
            images is kept.
        max_images: Most images to read, mirrored images included.
        seed: Seed of the network, of the order of images, of crops and of projections.

    Returns:
        Share of the Poisson deviance of the root of the harm that is explained on every tenth image, which is held
        back: 1 is perfect.

    Raises:
        ValueError: If the model's scorer is another one, the outputs cannot be used, or no image holds a 2x patch.
    """
    if not isinstance(model.patchifier.scorer, HarmScorer):
        raise ValueError('this model predicts no harm: adapt(vit, scorer="harm", ...)')
    random = torch.Generator(model.packed_encoder.adapter.device).manual_seed(seed)

    def outputs(images: Tensor) -> Tensor:
        return as_outputs(model(images, keep=1.0))

    def targets(images: Tensor) -> dict[int, Tensor]:
        harm = harm_of(model.packed_encoder, outputs if answers is None else answers, images, random)
        mean = harm[2].sqrt().mean((1, 2), keepdim=True).clamp(min=1e-12)
        return {factor: values.sqrt() / mean for factor, values in harm.items()}

    lengths = (max(updates // 4, 1), max(updates // 2, 1))
    return fit_sizes(model, images, targets, updates, max_images, seed, lengths)


def as_outputs(result: Any) -> Tensor:
    """Logits or features (B, D, tokens) of what a model returns.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(result, Tensor):
        return result
    logits, features = getattr(result, "logits", None), getattr(result, "last_hidden_state", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(features, Tensor):
        return features.transpose(1, 2)
    raise ValueError(
        f"a model that returns a {type(result).__name__} has no logits or features: give fit_harm answers=, a function "
        "from images to what must not change"
    )


def harm_of(encoder: Encoder, answers: Answers, images: Tensor, random: torch.Generator) -> dict[int, Tensor]:
    """First-order harm of merging each patch.

    Args:
        encoder: The adaptive model's encoder.
        answers: As for `fit_harm`.
        images: (B, C, H, W), normalised.
        random: Draws the projections of maps.

    Returns:
        For each factor (B, h // factor, w // factor).

    Raises:
        ValueError: If the answers are of another shape, or do not come from the model.
    """
    patch_size = encoder.adapter.patch_size
    num_tokens = (images.shape[2] // patch_size) * (images.shape[3] // patch_size)
    parts = [_harm(encoder, answers, part, random) for part in images.split(max(1, _TOKENS // max(num_tokens, 1)))]
    return {factor: torch.cat([part[factor] for part in parts]) for factor in FACTORS}


@torch.enable_grad()
def _harm(encoder: Encoder, answers: Answers, images: Tensor, random: torch.Generator) -> dict[int, Tensor]:
    rows, cols = (side // encoder.adapter.patch_size for side in images.shape[2:])
    leaf, output = _with_leaf(encoder, answers, images, rows * cols)
    fine = leaf.detach().unflatten(1, (rows, cols))
    changes: dict[int, Tensor] = {}
    for factor in FACTORS:
        coarse = _coarse_tokens(encoder, images, factor)  # (B, h // factor, w // factor, D)
        covered = fine[:, : coarse.shape[1] * factor, : coarse.shape[2] * factor]
        enlarged = coarse.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        changes[factor] = enlarged - covered  # (B, rows, cols, D)
    harm: dict[int, Any] = dict.fromkeys(FACTORS, 0.0)
    for weight, value in _values(output, random):
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        gradient = gradient.unflatten(1, (rows, cols))
        for factor, change in changes.items():
            moved = (gradient[:, : change.shape[1], : change.shape[2]] * change).sum(-1)  # (B, rows, cols)
            shape = torch.Size((len(moved), moved.shape[1] // factor, moved.shape[2] // factor))
            of_patch = parts_of(moved, shape, factor).sum((2, 4))
            harm[factor] = harm[factor] + 0.5 * weight[:, None, None] * of_patch.square()
    return harm


def _with_leaf(encoder: Encoder, answers: Answers, images: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """Run the answers with the patch tokens of the first block as a leaf (B, h w, D) of the graph."""
    leaves: list[Tensor] = []
    batch, prefix = len(images), encoder.adapter.num_prefix_tokens

    def replace(_block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        if x.numel() != batch * (prefix + num_patches) * x.shape[-1]:
            raise ValueError(
                f"the answers run the model on {x.numel() // x.shape[-1]} tokens instead of {batch} images of "
                f"{prefix + num_patches}: they must use the images as they are, with nothing merged"
            )
        front, patches = x.detach().float().reshape(batch, -1, x.shape[-1]).tensor_split([prefix], dim=1)
        leaves.append(patches.requires_grad_())
        return (torch.cat([front, leaves[-1]], dim=1).reshape(x.shape).to(x.dtype), *inputs[1:])

    handle = next(iter(encoder.adapter.blocks)).register_forward_pre_hook(replace)
    try:
        output = answers(images)
    finally:
        handle.remove()
    if len(leaves) != 1 or output.grad_fn is None:
        raise ValueError("the answers do not come from this model, or without gradients: run the model itself in them")
    return leaves[0], output


@torch.no_grad()
def _coarse_tokens(encoder: Encoder, images: Tensor, factor: int) -> Tensor:
    """Patches of a size, as the first block reads them. (B, C, H, W) -> (B, h // factor, w // factor, D)"""
    adapter, scale = encoder.adapter, factor.bit_length() - 1
    rows, cols = (side // adapter.patch_size for side in images.shape[2:])
    scale_map = torch.zeros(len(images), rows, cols, dtype=torch.int8, device=images.device)
    scale_map[:, : rows // factor * factor, : cols // factor * factor] = scale
    layout = PatchLayout.from_scale_map(scale_map, adapter.patch_size, scale + 1, adapter.num_prefix_tokens)
    tokens = encoder.embed([ImageGroup(images, list(range(len(images))))], layout)
    x = adapter.before_blocks(tokens.x)[0]
    coarse = x[layout.patch_index[layout.scale == scale]].float()
    return coarse.view(len(images), rows // factor, cols // factor, coarse.shape[1])


def _values(output: Tensor, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (B,) and values (B,) whose squared changes sum up to twice the harm."""
    if output.ndim == 2 and output.shape[1] > 1:
        logs = output.float().log_softmax(1)
        top = logs.detach().topk(min(_PASSES, logs.shape[1]), dim=1)
        weights = top.values.softmax(1)  # probabilities among the most probable classes
        for number in range(weights.shape[1]):
            yield weights[:, number], logs.gather(1, top.indices[:, number : number + 1])[:, 0]
        return
    if output.ndim < 2:
        raise ValueError(f"answers of shape {tuple(output.shape)} are neither logits (B, C) nor maps (B, K, H, W)")
    maps = relative_channels(output if output.ndim == 4 else output.reshape(*output.shape[:2], 1, -1))
    for _ in range(_PASSES):
        signs = torch.randint(0, 2, maps.shape, generator=random, device=maps.device) * 2.0 - 1
        yield maps.new_full((len(maps),), 1 / _PASSES), (maps * signs).flatten(1).sum(1)
