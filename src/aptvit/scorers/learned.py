"""Scorers with a small trained network that predicts properties of patches from the host's first block.

The image in 2x patches, a quarter of the tokens, goes through the host's first block (a *glance*). The network predicts
from these tokens a property of each patch that is known only after all blocks. It is trained with the host's own
outputs as targets, on unlabelled images, in seconds; the host is not changed. The properties are in
`aptvit.scorers.glance` and `aptvit.scorers.spread`.

images ── all 2x patches ── first block ──> tokens ── network ──> predicted property of each patch
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.encoder.costs import flops_of_blocks, flops_of_coarse_embedding
from aptvit.encoder.encoder import BlockStep, Encoder, Request, Tokens
from aptvit.layers.attention import AttentionPlan
from aptvit.patching.images import ImageGroup, Images
from aptvit.patching.layout import Packing, PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.scorers.embedding import EmbeddingScorer

__all__ = [
    "GLANCE",
    "FitOptions",
    "Glance",
    "GlanceModel",
    "LearnedScorer",
    "as_batches",
    "collect",
    "fit_network",
    "glance_inputs",
    "parts_of",
    "run_blocks",
]

GLANCE = "coarse_glance"  # the name of a model's network
_POSITIONS = 9


class GlanceModel(Protocol):
    """A model whose host holds the network: an `aptvit.AdaptivePatchTransformer`."""

    patchifier: Patchifier
    packed_encoder: Encoder


class Glance(nn.Module):
    """The network, from tokens of the first block to predictions. Its weights are buffers, which no optimizer updates.

    Args:
        embed_dim: Width of the host.
        outputs: Number of predicted values for each patch.
        reach: Number of 3x3 convolutions; 0 for a perceptron with two hidden layers.
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
        self.register_buffer("std", torch.zeros(inputs))  # zero until the network is trained

    def layers(self) -> list[Tensor]:
        """Weights and biases, from first to last."""
        return [getattr(self, f"{kind}{number}") for number in range(1, self.depth + 1) for kind in "wb"]

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, h/2, w/2, inputs) -> (B, h/2, w/2, outputs) logarithms."""
        layers = [layer.float() for layer in self.layers()]
        return network(layers, (inputs - self.mean.float()) / self.std.float().clamp(min=1e-5))


def network(layers: Sequence[Tensor], inputs: Tensor, dropout: float = 0.0) -> Tensor:
    """Run layers with GELU between them. (B, rows, cols, inputs) -> (B, rows, cols, outputs)

    Args:
        layers: Weights and biases alternately; weights with four axes are convolutions.
        inputs: (B, rows, cols, inputs).
        dropout: Probability of dropout before each layer but the first.
    """
    x = inputs
    for number, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
        x = F.dropout(F.gelu(x), dropout) if number else x
        if weight.ndim == 4:
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
        else:
            x = F.linear(x, weight, bias)
    return x


class LearnedScorer(ABC):
    """Base of scorers by the predictions of a `Glance` for each 2x patch.

    Args:
        encoder: The adaptive model's encoder; its host holds the network as a module named ``coarse_glance``.
    """

    fit_call: ClassVar[str]  # the call that trains the network, for the error message
    outputs: ClassVar[int] = 1  # see `Glance`
    reach: ClassVar[int] = 0  # see `Glance`

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.distance = EmbeddingScorer(encoder.derived.maps_for_scoring)
        self._is_fitted = False

    @classmethod
    def of_encoder(cls, encoder: Encoder) -> Self:
        """A scorer with a new network, which has to be trained before use."""
        network = Glance(encoder.adapter.embed_dim, cls.outputs, cls.reach)
        encoder.adapter.vit.add_module(GLANCE, network.to(encoder.adapter.device))
        return cls(encoder)

    def __call__(self, pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.Scorer`, for pixels that the host reads without normalisation."""
        return self.score_images(pixels, (0.0,), (1.0,), patch_size, factors)

    def score_images(
        self, images: Tensor, mean: Sequence[float], std: Sequence[float], patch_size: int, factors: Sequence[int]
    ) -> dict[int, Tensor]:
        """As `aptvit.patching.scoring.ImageScorer`.

        Raises:
            ValueError: If the network was never trained.
        """
        distances = self.distance.score_images(images, mean, std, patch_size, sorted({2, *factors}))
        rows, cols = distances[2].shape[1:]
        if rows * cols == 0:
            return {factor: distances[factor] for factor in factors}
        network = glance_of(self.encoder)
        self._is_fitted = self._is_fitted or bool(network.std.any())  # read once: reading synchronises with the device
        if not self._is_fitted:
            raise ValueError(f"the network of this scorer is not trained yet: call {self.fit_call}, without labels")
        predicted = network(glance_inputs(self.encoder, images, distances[2]))
        return {factor: self._scores(predicted, distances[factor], factor) for factor in factors}

    def flops(self, factors: Sequence[int]) -> Callable[[int], float]:
        """As `aptvit.patching.scoring.CountedScorer`: distances, first block on 2x patches, and network."""
        adapter = self.encoder.adapter
        distance, block = self.distance.flops(sorted({2, *factors})), flops_of_blocks(adapter, 1)
        network = 2 * sum(weight.numel() for weight in glance_of(self.encoder).layers()[::2])

        def flops(num_patches: int) -> float:
            num_coarse = num_patches / 4  # 2x patches
            embedding = flops_of_coarse_embedding(adapter, num_patches)
            first_block = float(block(num_coarse + adapter.num_prefix_tokens))
            return distance(num_patches) + embedding + first_block + network * num_coarse

        return flops

    @abstractmethod
    def _scores(self, predicted: Tensor, distances: Tensor, factor: int) -> Tensor:
        """Scores of one size.

        Args:
            predicted: (B, h/2, w/2, outputs) predictions for each 2x patch.
            distances: (B, h/factor, w/factor) scores of `EmbeddingScorer`.
            factor: Side of the patches in base patches.

        Returns:
            (B, h/factor, w/factor).
        """


def glance_of(encoder: Encoder) -> Glance:
    """The network in a host."""
    network: Glance = getattr(encoder.adapter.vit, GLANCE)
    return network


def parts_of(grid: Tensor, shape: torch.Size, side: int) -> Tensor:
    """Group the 2x patches inside larger patches. (B, h/2, w/2) -> (B, rows, side, cols, side)

    Args:
        grid: (B, h/2, w/2) values of 2x patches.
        shape: (B, rows, cols) of the larger patches.
        side: 2x patches along a side of a larger patch.
    """
    rows, cols = shape[1:]
    return grid[:, : rows * side, : cols * side].reshape(len(grid), rows, side, cols, side)


@torch.no_grad()
def glance_inputs(encoder: Encoder, images: Tensor, distances: Tensor) -> Tensor:
    """Inputs of the network for each 2x patch: its token, the class token, its `EmbeddingScorer` score, its position.

    Args:
        encoder: The adaptive model's encoder.
        images: (B, C, H, W).
        distances: (B, h/2, w/2) scores of `EmbeddingScorer`.

    Returns:
        (B, h/2, w/2, inputs) float32.
    """
    packing, steps = run_blocks(encoder, images, coarse=True, blocks=1)
    (step,) = steps
    x = packing.to_batch(step.x[0])  # (B, L, D)
    num_prefix, device = encoder.adapter.num_prefix_tokens, x.device
    grid = tuple(side // encoder.adapter.patch_size for side in images.shape[2:])
    index, places = (table.to(device, non_blocking=True) for table in _coarse_places((grid[0], grid[1])))
    x = F.layer_norm(x.float(), x.shape[-1:])
    patches = x.index_select(1, index + num_prefix)
    # Without a class token, the mean of the patch tokens.
    context = (x[:, :1] if num_prefix else patches.mean(1, keepdim=True)).expand_as(patches)
    distance = distances.flatten(1).clamp(min=1e-6).log()[..., None]
    inputs = torch.cat([patches, context, distance, places.expand(len(x), -1, -1)], dim=-1)
    return inputs.unflatten(1, distances.shape[1:])


@lru_cache(maxsize=16)
def _coarse_places(grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(n,) index of each 2x patch among the patch tokens of a glance, and (n, positions) features of its position."""
    with torch.inference_mode(False):
        rows, cols = grid_size[0] // 2, grid_size[1] // 2
        row, col = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
        covered = (row < 2 * rows) & (col < 2 * cols)
        corner = covered & (row % 2 == 0) & (col % 2 == 0)
        index = corner[corner | ~covered].nonzero()[:, 0]
        y, x = (2 * (cell[corner] + 1) / side - 1 for cell, side in zip((row, col), grid_size, strict=True))
        waves = [f(math.pi * centre / 2) for centre in (x, y) for f in (torch.sin, torch.cos)]
        return index, torch.stack([x, y, x * x, y * y, x * y, *waves], dim=-1)


def run_blocks(
    encoder: Encoder, images: Tensor, coarse: bool, blocks: int, record: tuple[str, ...] = ()
) -> tuple[Packing, Iterator[BlockStep]]:
    """Run blocks on images in 2x patches or in base patches.

    Args:
        encoder: The adaptive model's encoder.
        images: (B, C, H, W).
        coarse: Use 2x patches, and base patches where a 2x patch does not fit.
        blocks: Number of blocks to run.
        record: As for `aptvit.encoder.encoder.Request`.

    Returns:
        The sequences of the images, all of one length, and an iterator over the outputs of the blocks.
    """
    adapter, batch = encoder.adapter, len(images)
    rows, cols = (side // adapter.patch_size for side in images.shape[2:])
    merged = (rows // 2) * (cols // 2) if coarse else 0
    scale_map = torch.zeros(batch, rows, cols, dtype=torch.int8, device=images.device)
    scale_map[:, : rows // 2 * 2, : cols // 2 * 2] = int(coarse)
    counts = [[rows * cols - 4 * merged, merged]] * batch
    layout = PatchLayout.from_scale_map(scale_map, adapter.patch_size, 2, adapter.num_prefix_tokens, counts=counts)
    tokens = encoder.embed([ImageGroup(images, list(range(batch)))], layout)
    tokens = Tokens(adapter.before_blocks(tokens.x), tokens.rotation)
    return layout.packing, _in_evaluation(
        encoder.steps(tokens, AttentionPlan.of_tokens(layout.packing), Request((), blocks, record)), adapter.blocks
    )


def _in_evaluation(steps: Iterator[BlockStep], blocks: Iterable[nn.Module]) -> Iterator[BlockStep]:
    """Run the steps with the blocks in evaluation mode, and restore their mode afterwards."""
    training = [block for block in blocks if block.training]
    for block in training:
        block.eval()
    try:
        yield from steps
    finally:
        for block in training:
            block.train()


@dataclass(frozen=True)
class FitOptions:
    """Options for training the network.

    Attributes:
        epochs: Passes over the images.
        seed: Seed of the network and of the order of images.
        errors: Loss of (images, h/2, w/2, outputs) predictions and targets, for each element.
        copies: Number of consecutive examples of each image, which are held back together.
    """

    epochs: int
    seed: int
    errors: Callable[[Tensor, Tensor], Tensor]
    copies: int = 1


def collect(
    model: GlanceModel,
    images: Images | Iterable[Images],
    examples: Callable[[ImageGroup], tuple[Tensor, Tensor]],
    max_images: int,
) -> list[tuple[Tensor, Tensor]]:
    """Collect training examples for the network.

    Args:
        model: The adaptive model.
        images: (B, C, H, W), a list of (C, H_i, W_i), or an iterable of either.
        examples: From images of one size to (b, rows, cols, inputs) and (b, rows, cols, outputs) targets.
        max_images: Stop after this many examples.

    Returns:
        Inputs and targets of each group of images, on the CPU.

    Raises:
        ValueError: If no image holds a 2x patch.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    num_examples = 0
    for batch in as_batches(images):
        for group in model.patchifier.groups(batch):
            if min(group.images.shape[2:]) >= 2 * model.patchifier.patch_size:
                inputs, truth = examples(group)
                pairs.append((inputs.cpu(), truth.cpu()))
                num_examples += len(truth)
        if num_examples >= max_images:
            break
    if not num_examples:
        raise ValueError("no image is large enough for a patch of twice the size: give at least one")
    return pairs


def as_batches(images: Images | Iterable[Images]) -> Iterable[Images]:
    """Batches from a batch, a list of images, or an iterable of either."""
    if isinstance(images, Tensor):
        return [images]
    if isinstance(images, Sequence) and all(isinstance(image, Tensor) and image.ndim == 3 for image in images):
        return [[image] for image in images]
    return images


def fit_network(model: GlanceModel, pairs: Sequence[tuple[Tensor, Tensor]], options: FitOptions) -> float:
    """Train the network of a model.

    Args:
        model: The adaptive model; the buffers of its network are set.
        pairs: Inputs and targets, from `collect`.
        options: Options of the training.

    Returns:
        1 - loss / loss of predicting 0, on every tenth image, which is held back; NaN if there are fewer than ten.
    """
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for inputs, truth in pairs:
        by_shape.setdefault(truth.shape[1:], []).append((inputs, truth))
    examples = [tuple(torch.cat(tensors) for tensors in zip(*group, strict=True)) for group in by_shape.values()]
    glance = glance_of(model.packed_encoder)
    shapes = [layer.shape for layer in glance.layers()]
    layers, mean, std, quality = _train(examples, shapes, options, glance.mean.device)
    with torch.no_grad():
        for old, new in zip([*glance.layers(), glance.mean, glance.std], [*layers, mean, std], strict=True):
            old.copy_(new)
    return quality


def _train(
    examples: Sequence[tuple[Tensor, ...]], shapes: Sequence[torch.Size], options: FitOptions, device: torch.device
) -> tuple[list[Tensor], Tensor, Tensor, float]:
    """Train a network.

    Args:
        examples: For each grid, (images, rows, cols, inputs) and (images, rows, cols, outputs), on the CPU.
        shapes: Shapes of weights and biases.
        options: Options of the training.
        device: Device of the training.

    Returns:
        Layers, mean and standard deviation of the inputs, and 1 - loss / loss of predicting 0 on held back images.
    """
    random = torch.Generator().manual_seed(options.seed)
    flat = torch.cat([inputs.flatten(0, 2) for inputs, _ in examples])
    mean, std = flat.mean(0).to(device), flat.std(0).clamp(min=1e-5).to(device)
    held_back = [torch.arange(len(truth)) // options.copies % 10 == 9 for _, truth in examples]
    layers = [torch.randn(shape, generator=random) * shape[1:].numel() ** -0.5 * (len(shape) > 1) for shape in shapes]
    layers = [layer.to(device).requires_grad_() for layer in layers]
    sizes = [int((~validation).sum()) for validation in held_back]
    steps = options.epochs * sum(-(-size // 64) for size in sizes)
    optimizer = torch.optim.AdamW(layers, 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(options.seed)
        for _ in range(options.epochs):
            for (inputs, truth), validation in zip(examples, held_back, strict=True):
                chosen = (~validation).nonzero()[:, 0]
                for index in chosen[torch.randperm(len(chosen), generator=random)].split(64):
                    guess = network(layers, (inputs[index].to(device) - mean) / std, dropout=0.1)
                    loss = options.errors(guess, truth[index].to(device)).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    layers = [layer.detach() for layer in layers]
    error = total = 0.0
    for (inputs, truth), validation in zip(examples, held_back, strict=True):
        for index in validation.nonzero()[:, 0].split(64):
            guess = network(layers, (inputs[index].to(device) - mean) / std)
            target = truth[index].to(device)
            error += float(options.errors(guess, target).sum())
            total += float(options.errors(torch.zeros_like(guess), target).sum())
    return layers, mean, std, 1 - error / total if total else math.nan
