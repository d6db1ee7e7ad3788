"""From a stream of images to batches for a model: packs of a bounded number of tokens, and scoring one batch ahead.

images ── scored in chunks ── pool of scored images ── packs of at most max_tokens ── outputs ── input order
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from aptvit.patching.images import Images
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import layout_of_images

__all__ = ["TokenBudgetBatcher", "TokenPack", "predict", "record_stream", "restore_order", "score_ahead"]


class HasLayout(Protocol):
    """A model that cuts images into patches: an `aptvit.AdaptivePatchTransformer`, or a wrapper around one."""

    def layout(self, images: Images) -> PatchLayout:
        """The patches of (B, C, H, W) images, or of a list of (C, H_i, W_i)."""
        ...


class Predictor(HasLayout, Protocol):
    """A model that also takes images with their layout."""

    def __call__(self, images: Images, layout: PatchLayout | None = None) -> Any:
        """Outputs of the images, such as (B, num_classes) logits."""
        ...


# Packs of a bounded number of tokens


@dataclass(frozen=True, eq=False)
class TokenPack:
    """Images that a model runs on together: ``model(pack.images, layout=pack.layout)``.

    Attributes:
        images: (B, C, H, W) where all images have one size and type, else a list of (C, H_i, W_i).
        layout: The layout of these images, in this order.
        index: Number of each image in the order of the input, ascending.
    """

    images: Tensor | list[Tensor]
    layout: PatchLayout
    index: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed sequence, prefix tokens included."""
        return self.layout.num_tokens


@dataclass(frozen=True, eq=False)
class _PoolEntry:
    """A scored image that waits: its number in the input, and its index in the layout of its chunk."""

    number: int
    image: Tensor
    layout: PatchLayout
    place: int

    @property
    def num_tokens(self) -> int:
        return self.layout.seqlens[self.place]


class TokenBudgetBatcher:
    """Packs of at most ``max_tokens`` tokens, each with as many images as fit.

    Busy images cost more tokens than smooth ones, so batches of a fixed number of images vary in length. Packs vary in
    their number of images instead: the shapes of the matrix products stay almost constant, and memory is bounded.

    Images are scored in chunks and wait in a pool until it holds ``lookahead * max_tokens`` tokens. A pack takes the
    oldest image of the pool, then repeatedly the largest image that still fits. Each image is in exactly one pack. The
    pool never holds more than ``lookahead * max_tokens`` tokens and one chunk.

    An image with more than ``max_tokens`` tokens is a pack of its own. So memory is bounded by the larger of
    ``max_tokens`` and the largest image.

    Each iteration calls ``iter(images)`` anew and reads it lazily.

    Args:
        model: Has ``layout(images)``, such as an `aptvit.AdaptivePatchTransformer`.
        images: Iterable of images (C, H, W), of batches (B, C, H, W) or of lists of images, of any sizes, on the
            device of the model.
        max_tokens: Most tokens of a pack, prefix tokens included.
        lookahead: Size of the pool in packs: a larger pool fills packs better, and holds more images in memory.
        chunk: Images scored together.

    Raises:
        ValueError: If an option is below 1. While iterating: if the model refuses an image; the message gives the
            image's number in the input.
    """

    def __init__(
        self, model: HasLayout, images: Iterable[Images], max_tokens: int, *, lookahead: int = 4, chunk: int = 16
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1: give the tokens that fit into memory")
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead} must be at least 1: packs are filled from a pool of so many")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: give the number of images to score together")
        self.model = model
        self.images = images
        self.max_tokens = max_tokens
        self.lookahead = lookahead
        self.chunk = chunk

    def __iter__(self) -> Iterator[TokenPack]:
        pool: list[_PoolEntry] = []  # oldest first
        for scored in self._scored_chunks():
            pool += scored
            while sum(entry.num_tokens for entry in pool) >= self.lookahead * self.max_tokens:
                yield _as_pack(_take(pool, self.max_tokens))
        while pool:
            yield _as_pack(_take(pool, self.max_tokens))

    def _scored_chunks(self) -> Iterator[list[_PoolEntry]]:
        first = 0
        singles = _single_images(self.images)
        while images := list(islice(singles, self.chunk)):
            # The cache of a whole chunk would stay in memory for as long as any of its images waits.
            layout = replace(_layout_of_chunk(self.model, images, first), cache=None)
            yield [_PoolEntry(first + place, image, layout, place) for place, image in enumerate(images)]
            first += len(images)


def _single_images(images: Iterable[Images]) -> Iterator[Tensor]:
    for number, item in enumerate(images):
        if isinstance(item, Tensor) and item.ndim == 3:
            yield item
        elif isinstance(item, Tensor) and item.ndim == 4:
            for image in item:
                yield image.clone()  # a view would keep its whole batch in memory
        elif isinstance(item, Sequence):
            yield from item
        else:
            got = f"of shape {tuple(item.shape)}" if isinstance(item, Tensor) else f"a {type(item).__name__}"
            raise ValueError(f"item {number} of the images is {got}: give (C, H, W), (B, C, H, W) or a list of images")


def _layout_of_chunk(model: HasLayout, images: Sequence[Tensor], first: int) -> PatchLayout:
    """Layout of images that have the numbers ``first``, ``first + 1``, ... in the input."""
    try:
        return model.layout(images)
    except ValueError:
        for number, image in enumerate(images, start=first):
            _refuse_if_broken(model, image, number)
        raise


def _refuse_if_broken(model: HasLayout, image: Tensor, number: int) -> None:
    """Score an image alone, so that an error names the image by its number in the input."""
    try:
        model.layout([image])
    except ValueError as error:
        message = str(error)
        named = message.startswith("image 0 ")
        raise ValueError(f"image {number} {message[8:]}" if named else f"image {number}: {message}") from error


def _take(pool: list[_PoolEntry], max_tokens: int) -> list[_PoolEntry]:
    """Take a pack out of the pool: the oldest image, then the largest that fit."""
    oldest, *younger = pool
    numbers, free_tokens = {oldest.number}, max_tokens - oldest.num_tokens
    for entry in sorted(
        younger, key=lambda entry: entry.num_tokens, reverse=True
    ):  # stable: of equals, the older first
        if entry.num_tokens <= free_tokens:
            numbers.add(entry.number)
            free_tokens -= entry.num_tokens
    pack = [entry for entry in pool if entry.number in numbers]
    pool[:] = [entry for entry in pool if entry.number not in numbers]
    return pack


def _as_pack(entries: Sequence[_PoolEntry]) -> TokenPack:
    images = [entry.image for entry in entries]
    is_batch = len({(image.shape, image.dtype, image.device) for image in images}) == 1
    layout = layout_of_images([(entry.layout, entry.place) for entry in entries])
    return TokenPack(torch.stack(images) if is_batch else images, layout, [entry.number for entry in entries])


def restore_order(outputs: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Put the rows of several outputs back into the order of the input.

    Args:
        outputs: For each pack, ``pack.index`` and the (B_i, ...) output of its images. The number of images follows
            from the indices, so missing images at the end of the input are not detected.

    Returns:
        (N, ...) rows 0 to N - 1, on the device of the outputs.

    Raises:
        ValueError: If there are no rows, an index is missing or doubled, or an output has not one row for each index.
    """
    index: list[int] = []
    rows: list[Tensor] = []
    for numbers, output in outputs:
        if len(output) != len(numbers):
            raise ValueError(f"an output of shape {tuple(output.shape)} has no row for each of {len(numbers)} images")
        index += numbers
        rows.append(output)
    if not index:
        raise ValueError("there are no images: give at least one")
    order = torch.tensor(index).argsort()
    for expected, place in enumerate(order.tolist()):
        if index[place] != expected:
            problem = "doubled" if index[place] < expected else "missing"
            number = min(index[place], expected)
            raise ValueError(f"index {number} is {problem}: give the output of each pack of one iteration once")
    return torch.cat(rows).index_select(0, order.to(rows[0].device))


@torch.inference_mode()
def predict(
    model: Predictor, images: Iterable[Images], max_tokens: int, *, lookahead: int = 4, chunk: int = 16
) -> Tensor:
    """Outputs of all images, computed in packs of at most ``max_tokens`` tokens.

    The model runs as it is, in training or evaluation mode, under ``torch.inference_mode``.

    Args:
        model: An `aptvit.AdaptivePatchTransformer`.
        images: As for `TokenBudgetBatcher`.
        max_tokens: As for `TokenBudgetBatcher`.
        lookahead: As for `TokenBudgetBatcher`.
        chunk: As for `TokenBudgetBatcher`.

    Returns:
        (N, ...) the model's outputs, such as logits, in the order of the images and on the outputs' device. For models
        of transformers: their ``logits``, ``image_embeds`` or ``pooler_output``, the first of these that exists. (0,
        ...) without images.

    Raises:
        ValueError: If an option is below 1, the model refuses an image (the message gives the
            image's number), or the model does not return tensors.
    """
    packs = TokenBudgetBatcher(model, images, max_tokens, lookahead=lookahead, chunk=chunk)
    outputs = [(pack.index, _rows_of(model, pack.images, pack.layout)) for pack in packs]
    return restore_order(outputs) if outputs else _rows_of(model, [], None)


def _rows_of(model: Predictor, images: Images, layout: PatchLayout | None) -> Tensor:
    output: Any = model(images, layout=layout)
    for name in ("logits", "image_embeds", "pooler_output"):  # of models of transformers
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if not isinstance(output, Tensor):
        name = type(output).__name__
        raise ValueError(f"the model returns a {name}, not a tensor: go through the packs of a TokenBudgetBatcher")
    return output


# Scoring one batch ahead


def score_ahead(model: HasLayout, batches: Iterable[Images]) -> Iterator[tuple[Images, PatchLayout]]:
    """Batches and their layouts; on a GPU a batch is scored while the blocks run on the previous batch.

        for images, layout in score_ahead(model, batches):
            logits = model(images, layout=layout)

    A layout needs one synchronisation with the device, to read the number of patches. In ``model(images)`` it waits for
    everything that was queued before, so the GPU is idle when the blocks are queued. Here each batch is scored on a
    separate stream, after the blocks of the previous batch were queued: the synchronisation waits for the scores only.
    Reading a result inside the loop, as ``loss.item()`` does, waits for the blocks and undoes the gain.

    Each batch is taken from ``batches`` one step early, so that its copy to the GPU does not queue behind the blocks;
    this holds one more batch in memory. On other devices batches are scored one after the other.

    Args:
        model: Has ``layout(images)``, such as an `aptvit.AdaptivePatchTransformer`.
        batches: Batches (B, C, H, W), or lists of (C, H_i, W_i), on the device of the model.

    Returns:
        An iterator over (batch, layout of the batch).

    Raises:
        ValueError: While iterating: if the model refuses a batch.
    """
    remaining = iter(batches)
    streams = _SideStreams()
    upcoming = _next_batch(remaining)
    while upcoming is not None:
        images, ready = upcoming
        layout = model.layout(images) if ready is None else streams.layout(model, images, ready)
        upcoming = _next_batch(remaining)  # before the consumer queues the blocks of this batch
        yield images, layout


def _next_batch(batches: Iterator[Images]) -> tuple[Images, torch.cuda.Event | None] | None:
    """The next batch, and on a GPU an event after which its pixels can be read; None after the last batch."""
    for images in batches:
        device = _device_of(images)
        return images, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return None


def _device_of(images: Images) -> torch.device:
    first = images if isinstance(images, Tensor) else next(iter(images), None)
    return first.device if isinstance(first, Tensor) else torch.device("cpu")  # the model refuses other types


class _SideStreams:
    """A CUDA stream for scoring on each device, beside the stream that the blocks run on."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def layout(self, model: HasLayout, images: Images, ready: torch.cuda.Event) -> PatchLayout:
        """The layout of images, for use on the current stream.

        Args:
            model: Computes the layout.
            images: Images on a GPU.
            ready: Event after which the images can be read.
        """
        device = _device_of(images)
        main = torch.cuda.current_stream(device)
        if device not in self._streams:
            # The host waits for these few small kernels, so they go before those of the blocks.
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        side = self._streams[device]
        side.wait_event(ready)
        with torch.cuda.stream(side):
            layout = model.layout(images)  # synchronises with the current stream, which is this one
        main.wait_stream(side)
        record_stream(layout, main)
        return layout


def record_stream(layout: PatchLayout, stream: torch.cuda.Stream) -> None:
    """Record another stream's use of all tensors of a layout, so that their memory is not reused too early.

    Args:
        layout: A layout on a CUDA device, its cache included.
        stream: The stream that reads the layout besides the stream that made it.
    """
    packings = [packing for packing in (layout.packing, layout.window_packing) if packing is not None]
    cached = () if layout.cache is None else layout.cache.tensors()
    tensors = (layout.scale_map, layout.image, layout.scale, layout.row, layout.col)
    for tensor in (*tensors, *(packing.cu_seqlens for packing in packings), *cached):
        tensor.record_stream(stream)
