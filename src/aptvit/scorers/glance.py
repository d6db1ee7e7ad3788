"""Where will the model look? A glance at the picture in big patches, and a scorer that trusts it.

A big patch does harm where the model looks and where it changes what the model sees. The second is a distance in the
embedding space (`aptvit.scorers.embedding`). The first is guessed: the picture in big patches only, a quarter of the
tokens, goes through the host's first block, and a small network reads from it how much attention the class token will
pay to each patch in the last blocks. The network learns that from the host itself, on unlabelled photos, in seconds;
the host is not changed.

images ── all 2x patches ── first block ──> tokens ── network ──> log attention of each patch ─┐
       └─ distance of its embedding from the mean of its base patches' ────────────────────────┴─> scores
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aptvit.calibration.calibrator import as_batches
from aptvit.encoder.block_input import rotation_of_batch
from aptvit.encoder.costs import flops_of_blocks
from aptvit.layers.attention import run_block
from aptvit.layers.patch_embed import GLANCE
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import PatchLayout
from aptvit.scorers.embedding import EmbeddingScorer

if TYPE_CHECKING:
    from aptvit.models.adaptive_vit import AdaptivePatchTransformer

__all__ = ["GLANCE", "ForeseeingScorer", "Glance", "GlanceScorer", "Taught", "collect", "fit_glance", "teach"]

_POSITIONS = 9


class Glance(nn.Module):
    """From the tokens of a glance to what is to be known of each patch. Buffers only: no optimizer touches it.

    Args:
        embed_dim: Width of the host.
        outputs: Numbers to foresee of each patch.
        reach: How many patches away it looks: as many convolutions; 0 for a perceptron with two hidden layers.
        hidden: Width of the network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, embed_dim: int, outputs: int = 1, reach: int = 0, hidden: int = 64) -> None:
        super().__init__()
        inputs = 2 * embed_dim + 1 + _POSITIONS
        middle: list[tuple[int, ...]] = [(hidden, hidden, 3, 3)] * reach if reach else [(hidden, hidden)]
        self.depth = len(middle) + 2
        for number, shape in enumerate([(hidden, inputs), *middle, (outputs, hidden)], 1):
            self.register_buffer(f"w{number}", torch.zeros(shape))
            self.register_buffer(f"b{number}", torch.zeros(shape[0]))
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.zeros(inputs))  # zero until it is fitted

    def layers(self) -> list[Tensor]:
        """Weights and biases, from first to last."""
        return [getattr(self, f"{kind}{number}") for number in range(1, self.depth + 1) for kind in "wb"]

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, h/2, w/2, inputs) -> (B, h/2, w/2, outputs) logarithms."""
        layers = [layer.float() for layer in self.layers()]
        return network(layers, (inputs - self.mean.float()) / self.std.float().clamp(min=1e-5))


def network(layers: Sequence[Tensor], inputs: Tensor, dropout: float = 0.0) -> Tensor:
    """(B, rows, cols, inputs) -> (B, rows, cols, outputs). Layers whose weights have four axes are convolutions."""
    x = inputs
    for number, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        x = F.dropout(F.gelu(x), dropout) if number else x
        if weight.ndim == 4:
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
        else:
            x = F.linear(x, weight, bias)
    return x


class ForeseeingScorer(ABC):
    """Scores by what a network foresees of each 2x patch from a glance.

    Args:
        model: The model whose first block looks, and whose buffers hold the network.
    """

    fit: ClassVar[str]  # the function that teaches the network
    outputs: ClassVar[int] = 1  # of the network, see `Glance`
    reach: ClassVar[int] = 0

    def __init__(self, model: AdaptivePatchTransformer) -> None:
        self.model = model
        self.distance = EmbeddingScorer(model.adapter.patch_weight)
        self._is_fitted = False

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, of pixels that the host would read as they are."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.ImageScorer`.

        Raises:
            ValueError: If the network was never fitted.
        """
        distances = self.distance.score_images(images, mean, std, patch_size, sorted({2, *factors}))
        rows, cols = distances[2].shape[1:]
        if rows * cols == 0:
            return {factor: distances[factor] for factor in factors}
        glance = getattr(self.model, GLANCE)
        self._is_fitted = self._is_fitted or bool(glance.std.any())  # asked once: asking waits for the device
        if not self._is_fitted:
            raise ValueError(f"the glance knows nothing yet: {self.fit} fits it, without labels")
        foreseen = glance(glance_inputs(self.model, images, distances[2]))
        return {factor: self._scores(foreseen, distances[factor], factor) for factor in factors}

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`: distances, the first block over a quarter of the patches, the network."""
        distance, block = self.distance.flops(sorted({2, *factors})), flops_of_blocks(self.model, 1)
        embedding, prefix = 2 * self.model.adapter.patch_weight()[0].numel(), self.model.num_prefix_tokens
        network = 2 * sum(weight.numel() for weight in getattr(self.model, GLANCE).layers()[::2])

        def flops(num_patches: int) -> float:
            seen = num_patches / 4  # 2x patches; all pixels are embedded
            return distance(num_patches) + embedding * num_patches + float(block(seen + prefix)) + network * seen

        return flops

    @abstractmethod
    def _scores(self, foreseen: Tensor, distances: Tensor, factor: int) -> Tensor:
        """Scores of one size.

        Args:
            foreseen: (B, h/2, w/2, outputs) what the network says of each 2x patch.
            distances: (B, h/factor, w/factor) of `EmbeddingScorer`.
            factor: Side of the patches in base patches.

        Returns:
            (B, h/factor, w/factor).
        """


def parts_of(grid: Tensor, shape: torch.Size, side: int) -> Tensor:
    """The 2x patches in larger ones. (B, rows, cols) -> (B, rows // side, side, cols // side, side)"""
    rows, cols = shape[1:]
    return grid[:, : rows * side, : cols * side].reshape(len(grid), rows, side, cols, side)


class GlanceScorer(ForeseeingScorer):
    """Expected attention of a patch, times the square root of how far its embedding moves."""

    name = "glance"
    fit = "aptvit.fit_glance(model, photos)"

    def _scores(self, foreseen: Tensor, distances: Tensor, factor: int) -> Tensor:
        # A larger patch gets the attention of all its parts.
        attention = parts_of(foreseen[..., 0].exp(), distances.shape, factor // 2).sum((2, 4))
        return attention * distances**0.25


@torch.no_grad()
def glance_inputs(model: AdaptivePatchTransformer, images: Tensor, distances: Tensor) -> Tensor:
    """What the network reads for each 2x patch: its token, the class token, how far it moves, where it is.

    Args:
        model: The adaptive model.
        images: (B, C, H, W).
        distances: (B, h/2, w/2) of its `EmbeddingScorer`.

    Returns:
        (B, h/2, w/2, inputs) float32.
    """
    (tokens,) = _walk(model, images, coarse=True, blocks=1)
    x = tokens[0]  # (B, L, D)
    num_prefix, device = model.num_prefix_tokens, x.device
    grid = (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size)
    index, places = (one.to(device, non_blocking=True) for one in _coarse_places(grid))
    x = F.layer_norm(x.float(), x.shape[-1:])
    patches = x.index_select(1, index + num_prefix)
    # Without a class token, what the patches have in common.
    whole = (x[:, :1] if num_prefix else patches.mean(1, keepdim=True)).expand_as(patches)
    moved = distances.flatten(1).clamp(min=1e-6).log()[..., None]
    inputs = torch.cat([patches, whole, moved, places.expand(len(x), -1, -1)], dim=-1)
    return inputs.unflatten(1, distances.shape[1:])


@lru_cache(maxsize=16)
def _coarse_places(grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where 2x patches stand among the tokens of a glance, (n,), and in the picture, (n, positions)."""
    with torch.inference_mode(False):
        rows, cols = grid_size[0] // 2, grid_size[1] // 2
        row, col = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
        covered = (row < 2 * rows) & (col < 2 * cols)
        corner = covered & (row % 2 == 0) & (col % 2 == 0)
        index = corner[corner | ~covered].nonzero()[:, 0]
        y, x = (2 * (one[corner] + 1) / side - 1 for one, side in zip((row, col), grid_size, strict=True))
        waves = [f(math.pi * one / 2) for one in (x, y) for f in (torch.sin, torch.cos)]
        return index, torch.stack([x, y, x * x, y * y, x * y, *waves], dim=-1)


def _walk(
    model: AdaptivePatchTransformer, images: Tensor, coarse: bool, blocks: int
) -> Iterator[tuple[Tensor, _Recorded]]:
    """The images, cut into 2x patches or into base patches, block by block: (B, L, D) and what attention saw."""
    batch, (rows, cols) = len(images), (side // model.patch_size for side in images.shape[2:])
    merged = (rows // 2) * (cols // 2) if coarse else 0
    scale_map = torch.zeros(batch, rows, cols, dtype=torch.int8, device=images.device)
    scale_map[:, : rows // 2 * 2, : cols // 2 * 2] = int(coarse)
    counts = [[rows * cols - 4 * merged, merged]] * batch
    layout = PatchLayout.from_scale_map(scale_map, model.patch_size, 2, model.num_prefix_tokens, counts=counts)
    x, rotation = model._embed([ImageGroup(images, list(range(batch)))], layout)
    x = layout.packing.to_batch(model.adapter.before_blocks(x)[0])
    arguments = model.adapter.block_arguments(
        None if rotation is None else rotation_of_batch(rotation.globally, layout.packing)
    )
    for block, its in zip(list(model.adapter.blocks)[:blocks], arguments, strict=False):
        was_training = block.training
        block.eval()  # a glance is no training step
        try:
            with _Recorded() as seen:
                x = run_block(block, x, its, None)
        finally:
            block.train(was_training)
        yield x, seen


class _Recorded(TorchFunctionMode):
    """Keeps the queries and keys of the attention inside."""

    q: Tensor
    k: Tensor

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.q, self.k = args[:2]
        return func(*args, **(kwargs or {}))

    def attention_to_patches(self, num_prefix_tokens: int) -> Tensor:
        """(B, patches) attention of the first token, or where there is none of all tokens, the mean over heads."""
        q = self.q[:, :, :1] if num_prefix_tokens else self.q
        logits = q.float() @ self.k.float().transpose(2, 3) * q.shape[-1] ** -0.5
        return logits.softmax(-1).mean((1, 2))[:, num_prefix_tokens:]


@torch.no_grad()
def _examples(model: AdaptivePatchTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the network reads, and the logarithm of the attention that each 2x patch gets in the last blocks."""
    depth = len(model.adapter.blocks)
    total: Tensor | float = 0.0
    for number, (_, seen) in enumerate(_walk(model, images, coarse=False, blocks=depth)):
        if number >= depth - math.ceil(depth / 3):
            total = total + seen.attention_to_patches(model.num_prefix_tokens)
    assert isinstance(total, Tensor)
    scorer = EmbeddingScorer(model.adapter.patch_weight)
    mean, std = model.patchifier.mean, model.patchifier.std
    distances = scorer.score_images(images, mean, std, model.patch_size, (2,))[2]
    grid = total.unflatten(1, (images.shape[2] // model.patch_size, -1))
    logs = parts_of(grid, distances.shape, 2).sum((2, 4)).clamp(min=1e-8).log()
    return glance_inputs(model, images, distances), logs - logs.mean((1, 2), keepdim=True)


def fit_glance(
    model: AdaptivePatchTransformer,
    images: Images | Iterable[Images],
    *,
    epochs: int = 15,
    max_images: int = 4096,
    seed: int = 0,
) -> float:
    """Teach a model's glance where the model looks, on photos without labels. The host's weights are read, not changed.

    Args:
        model: Adapted with ``scorer="glance"``.
        images: A batch, a list, or an iterable of either; a few hundred photos, or random crops of them, are enough.
        epochs: Passes over them; the host runs once for each image.
        max_images: Images to read.
        seed: Seed of the network and of the order.

    Returns:
        How well attention is foreseen on every tenth image, which is held back: 1 is perfectly, 0 not at all.

    Raises:
        ValueError: If the model has no glance, or no image holds a 2x patch.
    """
    if not isinstance(model.patchifier.scorer, GlanceScorer):
        raise ValueError('this model has no glance: adapt(vit, scorer="glance", ...)')

    def examples(group: ImageGroup) -> tuple[Tensor, Tensor]:
        inputs, logs = _examples(model, group.images)
        return inputs, logs[..., None]

    return teach(model, collect(model, images, examples, max_images), Taught(epochs, seed, _centred))


def _centred(guess: Tensor, logs: Tensor) -> Tensor:
    """Squared errors of logarithms that are compared up to a constant of the image."""
    return (guess - guess.mean((1, 2), keepdim=True) - logs).square()


@dataclass(frozen=True)
class Taught:
    """How the network of a glance is fitted.

    Attributes:
        epochs: Passes over the images.
        seed: Seed of the network and of the order.
        errors: How far guesses are from the truth: both (images, h/2, w/2, outputs), as is what it returns.
        copies: Examples of each image, one after the other: they are held back together.
    """

    epochs: int
    seed: int
    errors: Callable[[Tensor, Tensor], Tensor]
    copies: int = 1


def collect(
    model: AdaptivePatchTransformer,
    images: Images | Iterable[Images],
    examples: Callable[[ImageGroup], tuple[Tensor, Tensor]],
    max_images: int,
) -> list[tuple[Tensor, Tensor]]:
    """What the network of a glance is to read and to foresee.

    Args:
        model: The adaptive model.
        images: A batch, a list, or an iterable of either.
        examples: Gives (b, rows, cols, inputs) of the images of one size, and (b, rows, cols, outputs) to foresee.
        max_images: Examples to gather.

    Returns:
        The same on the CPU, for each group of images.

    Raises:
        ValueError: If no image holds a 2x patch.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    seen = 0
    for batch in as_batches(images):
        for group in model.patchifier.groups(batch):
            if min(group.images.shape[2:]) >= 2 * model.patch_size:
                inputs, truth = examples(group)
                pairs.append((inputs.cpu(), truth.cpu()))
                seen += len(truth)
        if seen >= max_images:
            break
    if not seen:
        raise ValueError("there are no images to learn from that hold a patch of twice the size: give at least one")
    return pairs


def teach(model: AdaptivePatchTransformer, pairs: Sequence[tuple[Tensor, Tensor]], how: Taught) -> float:
    """Fit the network of a model's glance.

    Args:
        model: The adaptive model, whose buffers are set.
        pairs: From `collect`.
        how: How.

    Returns:
        How much smaller errors are than if all guesses were 0, on every tenth image, which is held back: 1 for none.
    """
    alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for inputs, truth in pairs:
        alike.setdefault(truth.shape[1:], []).append((inputs, truth))
    together = [tuple(torch.cat(ones) for ones in zip(*some, strict=True)) for some in alike.values()]
    glance = getattr(model, GLANCE)
    shapes = [layer.shape for layer in glance.layers()]
    layers, mean, std, quality = _train(together, shapes, how, glance.mean.device)
    with torch.no_grad():
        for old, new in zip([*glance.layers(), glance.mean, glance.std], [*layers, mean, std], strict=True):
            old.copy_(new)
    return quality


def _train(
    examples: Sequence[tuple[Tensor, ...]], shapes: Sequence[torch.Size], how: Taught, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor, float]:
    """Fit the network.

    Args:
        examples: For each grid, (images, rows, cols, inputs) and (images, rows, cols, outputs), on the CPU.
        shapes: Of the layers.
        how: How.
        device: Where.

    Returns:
        Layers, mean and standard deviation of the inputs, and how well it does on what is held back.
    """
    random = torch.Generator().manual_seed(how.seed)
    flat = torch.cat([inputs.flatten(0, 2) for inputs, _ in examples])
    mean, std = flat.mean(0).to(device), flat.std(0).clamp(min=1e-5).to(device)
    held = [torch.arange(len(truth)) // how.copies % 10 == 9 for _, truth in examples]
    layers = [torch.randn(shape, generator=random) * shape[1:].numel() ** -0.5 * (len(shape) > 1) for shape in shapes]
    layers = [layer.to(device).requires_grad_() for layer in layers]
    sizes = [int((~out).sum()) for out in held]
    steps = how.epochs * sum(-(-size // 64) for size in sizes)
    optimizer = torch.optim.AdamW(layers, 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(how.seed)
        for _ in range(how.epochs):
            for (inputs, truth), out in zip(examples, held, strict=True):
                chosen = (~out).nonzero()[:, 0]
                for index in chosen[torch.randperm(len(chosen), generator=random)].split(64):
                    guess = network(layers, (inputs[index].to(device) - mean) / std, dropout=0.1)
                    loss = how.errors(guess, truth[index].to(device)).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    layers = [layer.detach() for layer in layers]
    missed = total = 0.0
    for (inputs, truth), out in zip(examples, held, strict=True):
        for index in out.nonzero()[:, 0].split(64):
            guess = network(layers, (inputs[index].to(device) - mean) / std)
            known = truth[index].to(device)
            missed += float(how.errors(guess, known).sum())
            total += float(how.errors(torch.zeros_like(guess), known).sum())
    return layers, mean, std, 1 - missed / total if total else math.nan
