"""From a stream of images to batches for a model: packs of a bounded number of tokens, and scoring one batch ahead.

images ── chunks, scored ── a pool of images that wait ── packs of at most max_tokens ── outputs ── input order
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
    """What decides how images are cut: an `aptvit.AdaptivePatchTransformer`, or a wrapper around one."""

    def layout(self, images: Images) -> PatchLayout:
        """Which patches these images are cut into."""
        ...


class Predictor(HasLayout, Protocol):
    """What can also run on images whose layout is known."""

    def __call__(self, images: Images, layout: PatchLayout | None = None) -> Any:
        """Outputs of these images."""
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
class _Waiting:
    """A scored image: its number in the input, and its place in the layout of the chunk it was scored in."""

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
    their number of images instead: the shapes of the matrix products stay almost constant, and memory is bounded
    however busy the images are.

    Images are scored in chunks as they come, and wait in a pool until it holds ``lookahead * max_tokens`` tokens. A
    pack takes the image that has waited longest, then again and again the largest that still fits. No image is
    dropped, doubled or overtaken for ever. At most ``lookahead * max_tokens`` tokens and one chunk wait at any time,
    whatever the length of the input.

    An image that alone has more than ``max_tokens`` tokens cannot be split: it is a pack of its own. So memory is
    bounded by the larger of ``max_tokens`` and the largest single image.

    Each iteration starts anew from ``iter(images)``, and takes from it only what it needs. A generator can be read
    once, here as elsewhere.

    Args:
        model: What decides how images are cut: it has ``layout(images)``.
        images: Iterable of images (C, H, W), of batches (B, C, H, W) or of lists of images, of any sizes, on the
            device of the model.
        max_tokens: Most tokens of a pack, prefix tokens included.
        lookahead: Packs' worth of tokens that wait: more of them fill packs better, and hold more images in memory.
        chunk: Images scored together.

    Raises:
        ValueError: If a number is below 1. While iterating: if the model refuses an image; the message has the
            image's number in the input.
    """

    def __init__(
        self, model: HasLayout, images: Iterable[Images], max_tokens: int, *, lookahead: int = 4, chunk: int = 16
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1: give the tokens that fit into memory")
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead} must be at least 1: a pack is filled from what waits")
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: give the number of images to score together")
        self.model = model
        self.images = images
        self.max_tokens = max_tokens
        self.lookahead = lookahead
        self.chunk = chunk

    def __iter__(self) -> Iterator[TokenPack]:
        pool: list[_Waiting] = []  # oldest first
        for scored in self._scored_chunks():
            pool += scored
            while sum(one.num_tokens for one in pool) >= self.lookahead * self.max_tokens:
                yield _as_pack(_take(pool, self.max_tokens))
        while pool:
            yield _as_pack(_take(pool, self.max_tokens))

    def _scored_chunks(self) -> Iterator[list[_Waiting]]:
        first = 0
        singles = _single_images(self.images)
        while images := list(islice(singles, self.chunk)):
            # What a scorer computed of a whole chunk would wait in memory with each of its images.
            layout = replace(_layout_of_chunk(self.model, images, first), cache=None)
            yield [_Waiting(first + place, image, layout, place) for place, image in enumerate(images)]
            first += len(images)


def _single_images(images: Iterable[Images]) -> Iterator[Tensor]:
    for number, item in enumerate(images):
        if isinstance(item, Tensor) and item.ndim == 3:
            yield item
        elif isinstance(item, Tensor) and item.ndim == 4:
            for image in item:
                yield image.clone()  # a view would keep its whole batch in memory for as long as it waits
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
    """Score an image alone, so that what is wrong with it is said with its number in the input."""
    try:
        model.layout([image])
    except ValueError as error:
        message = str(error)
        named = message.startswith("image 0 ")
        raise ValueError(f"image {number} {message[8:]}" if named else f"image {number}: {message}") from error


def _take(pool: list[_Waiting], max_tokens: int) -> list[_Waiting]:
    """Take a pack out of the pool: the oldest image, then the largest that fit."""
    oldest, *others = pool
    taken, room = {oldest.number}, max_tokens - oldest.num_tokens
    for one in sorted(others, key=lambda one: one.num_tokens, reverse=True):  # stable: of equals, the older first
        if one.num_tokens <= room:
            taken.add(one.number)
            room -= one.num_tokens
    pack = [one for one in pool if one.number in taken]
    pool[:] = [one for one in pool if one.number not in taken]
    return pack


def _as_pack(taken: Sequence[_Waiting]) -> TokenPack:
    images = [one.image for one in taken]
    alike = len({(image.shape, image.dtype, image.device) for image in images}) == 1
    layout = layout_of_images([(one.layout, one.place) for one in taken])
    return TokenPack(torch.stack(images) if alike else images, layout, [one.number for one in taken])


def restore_order(outputs: Iterable[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Put the rows of several outputs back into the order of the input.

    Args:
        outputs: For each pack, ``pack.index`` and the (B_i, ...) output of its images. How many images there were is
            known from them only, so nobody notices if the last are missing.

    Returns:
        (N, ...) rows 0 to N - 1, on the device of the outputs.

    Raises:
        ValueError: If there are no rows, an index is missing or doubled, or a pack has not one row for each index.
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
            what = "doubled" if index[place] < expected else "missing"
            number = min(index[place], expected)
            raise ValueError(f"index {number} is {what}: give the output of each pack of one iteration once")
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
        max_tokens: Likewise.
        lookahead: Likewise.
        chunk: Likewise.

    Returns:
        (N, ...) the model's outputs, such as logits, in the order of the images and on the outputs' device; of models
        of transformers their ``logits``, ``image_embeds`` or ``pooler_output``, whichever there is.

    Raises:
        ValueError: If there are no images, an option is below 1, the model refuses an image (the message has its
            number), or it does not return tensors.
    """
    packs = TokenBudgetBatcher(model, images, max_tokens, lookahead=lookahead, chunk=chunk)
    return restore_order((pack.index, _rows_of(model, pack)) for pack in packs)


def _rows_of(model: Predictor, pack: TokenPack) -> Tensor:
    output: Any = model(pack.images, layout=pack.layout)
    for name in ("logits", "image_embeds", "pooler_output"):  # of models of transformers
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    if not isinstance(output, Tensor):
        name = type(output).__name__
        raise ValueError(f"the model returns a {name}, not a tensor: go through the packs of a TokenBudgetBatcher")
    return output


# Scoring one batch ahead


def score_ahead(model: HasLayout, batches: Iterable[Images]) -> Iterator[tuple[Images, PatchLayout]]:
    """Batches and their layouts, scored on a GPU while the blocks still run on the batch before.

        for images, layout in score_ahead(model, batches):
            logits = model(images, layout=layout)

    The layout of a batch needs one wait for the device, to learn how many patches there are. In ``model(images)`` that
    wait is for all that was queued before it, so the GPU has nothing left to do when the blocks are queued. Here each
    batch is scored on a stream of its own when it is asked for, which is after the blocks of the batch before were
    queued and, as a rule, before they have run: the wait is for the scores only. Reading a result within the loop, as
    ``loss.item()`` does, waits for the blocks and undoes the gain.

    Each batch is taken from ``batches`` one step early, so that copying it to the GPU does not queue behind the blocks
    either; one more batch is in memory for that. On other devices the batches are scored one after the other.

    Args:
        model: What decides how images are cut: it has ``layout(images)``.
        batches: Batches (B, C, H, W), or lists of images of any sizes, on the device of the model.

    Raises:
        ValueError: If the model refuses a batch.
    """
    remaining = iter(batches)
    streams = _SideStreams()
    coming = _obtain(remaining)
    while coming is not None:
        images, ready = coming
        layout = model.layout(images) if ready is None else streams.layout(model, images, ready)
        coming = _obtain(remaining)  # before the consumer queues the blocks of this batch
        yield images, layout


def _obtain(batches: Iterator[Images]) -> tuple[Images, torch.cuda.Event | None] | None:
    """The next batch, and on a GPU the event that its pixels are there; None after the last."""
    for images in batches:
        device = _device_of(images)
        return images, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    return None


def _device_of(images: Images) -> torch.device:
    one = images if isinstance(images, Tensor) else next(iter(images), None)
    return one.device if isinstance(one, Tensor) else torch.device("cpu")  # what is no image, the model refuses


class _SideStreams:
    """Scores on a CUDA stream beside the one that the blocks run on; one such stream for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def layout(self, model: HasLayout, images: Images, ready: torch.cuda.Event) -> PatchLayout:
        """Layout of images, to be used on the current stream.

        Args:
            model: What decides how images are cut.
            images: Images on a GPU.
            ready: What to wait for before they are read.
        """
        device = _device_of(images)
        main = torch.cuda.current_stream(device)
        if device not in self._streams:
            # The host waits for these few small kernels, so they go before those of the blocks.
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        side = self._streams[device]
        side.wait_event(ready)
        with torch.cuda.stream(side):
            layout = model.layout(images)  # its wait is for the current stream, which is this one
        main.wait_stream(side)
        record_stream(layout, main)
        return layout


def record_stream(layout: PatchLayout, stream: torch.cuda.Stream) -> None:
    """Tell PyTorch that another stream reads the layout too: memory is reused in the order of its own stream."""
    packings = [packing for packing in (layout.packing, layout.window_packing) if packing is not None]
    cached = () if layout.cache is None else layout.cache.tensors()
    own = (layout.scale_map, layout.image, layout.scale, layout.row, layout.col)
    for tensor in (*own, *(packing.cu_seqlens for packing in packings), *cached):
        tensor.record_stream(stream)
