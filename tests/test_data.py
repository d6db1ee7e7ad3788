from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import assert_same_layout
from torch import Tensor

import aptvit
from aptvit import data
from aptvit.data import TokenBudgetBatcher, TokenPack, predict, restore_order, score_ahead
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier

Host = Callable[..., Any]
PATCH = 4


def mean_of_patch(pixels: Tensor, patch_size: int, factors: Sequence[int]) -> dict[int, Tensor]:
    scores = {}
    for side in (factor * patch_size for factor in factors):
        rows, cols = pixels.shape[2] // side, pixels.shape[3] // side
        whole = pixels[:, 0, : rows * side, : cols * side]
        scores[side // patch_size] = whole.reshape(len(pixels), rows, side, cols, side).mean((2, 4))
    return scores


class Cutter:
    """The part of a model that a batcher needs: dark patches are merged."""

    def __init__(self, thresholds: Sequence[float] = (), num_prefix_tokens: int = 0) -> None:
        self.patchifier = Patchifier(
            PATCH, 1, thresholds=thresholds, scorer=mean_of_patch, num_prefix_tokens=num_prefix_tokens
        )
        self.chunks: list[int] = []

    def layout(self, images: Any) -> PatchLayout:
        self.chunks.append(len(images))
        return self.patchifier(self.patchifier.groups(images))


def random_image(rows: int, cols: int, random: torch.Generator) -> Tensor:
    """(1, H, W) in 0..1, of another brightness in each region, so that scores differ between patches and images."""
    coarse = torch.rand(1, 1, -(-rows // 4), -(-cols // 4), generator=random) * torch.rand((), generator=random) * 2
    cells = torch.nn.functional.interpolate(coarse, scale_factor=4)[0, :, :rows, :cols]
    return (
        (cells + torch.rand(1, rows, cols, generator=random) / 8)
        .repeat_interleave(PATCH, 1)
        .repeat_interleave(PATCH, 2)
    )


def image_of_tokens(num_tokens: int) -> Tensor:
    """(1, 4, 4 n), which a Cutter without thresholds or prefix tokens cuts into n tokens."""
    return torch.zeros(1, PATCH, PATCH * num_tokens)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Cutter, list[Tensor], dict[str, int]]:
    """Something that cuts, images of few or many sizes, and options of a batcher."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    images = [random_image(*draw(st.sampled_from(sizes)), random) for _ in range(draw(st.integers(0, 30)))]
    num_scales = draw(st.integers(1, 3))
    cutter = Cutter([draw(st.sampled_from([-1.0, 60.0, 150.0]))] * (num_scales - 1), draw(st.integers(0, 3)))
    options = {
        "max_tokens": draw(st.integers(1, 200)),
        "lookahead": draw(st.integers(1, 5)),
        "chunk": draw(st.integers(1, 7)),
    }
    return cutter, images, options


# Packs


@settings(max_examples=80, deadline=None)
@given(inputs())
def test_every_image_is_in_one_pack_with_its_layout(case: tuple[Cutter, list[Tensor], dict[str, int]]) -> None:
    cutter, images, options = case
    packs = list(TokenBudgetBatcher(cutter, images, **options))
    index = [number for pack in packs for number in pack.index]
    assert sorted(index) == list(range(len(images)))
    for pack in packs:
        assert pack.num_tokens == sum(pack.layout.seqlens)
        assert pack.num_tokens <= options["max_tokens"] or len(pack.index) == 1
        assert len(pack.images) == len(pack.index) == pack.layout.num_images
        assert all(torch.equal(image, images[i]) for image, i in zip(pack.images, pack.index, strict=True))
        assert isinstance(pack.images, Tensor) == (len({images[i].shape for i in pack.index}) == 1)
        assert_same_layout(pack.layout, cutter.layout(pack.images))
    if images:
        outputs = [(pack.index, torch.tensor(pack.index)[:, None] * torch.tensor([1, 10])) for pack in packs]
        expected = torch.arange(len(images))[:, None] * torch.tensor([1, 10])
        assert torch.equal(restore_order(outputs), expected)


@settings(max_examples=80, deadline=None)
@given(inputs())
def test_the_oldest_comes_next_nothing_that_fits_is_left_and_the_pool_is_bounded(
    case: tuple[Cutter, list[Tensor], dict[str, int]],
) -> None:
    cutter, images, options = case
    max_tokens, pool_limit = options["max_tokens"], options["lookahead"] * options["max_tokens"]
    lengths = cutter.layout(images).seqlens if images else []
    taken = 0

    def stream() -> Iterator[Tensor]:
        nonlocal taken
        for image in images:
            taken += 1
            yield image

    yielded: set[int] = set()
    for pack in TokenBudgetBatcher(cutter, stream(), **options):
        waiting = set(range(taken)) - yielded
        last_chunk = lengths[max(0, taken - options["chunk"]) : taken]
        assert sum(lengths[i] for i in waiting) < pool_limit + sum(last_chunk)
        if taken < len(images):  # a pack is not made before there is something to choose from
            assert sum(lengths[i] for i in waiting) >= pool_limit
        assert pack.index[0] == min(waiting)
        yielded.update(pack.index)
        left = [lengths[i] for i in waiting - yielded]
        assert all(length > max_tokens - pack.num_tokens for length in left)
    assert taken == len(yielded) == len(images)


def test_the_largest_images_that_fit_join_the_oldest() -> None:
    lengths = [3, 5, 4, 2, 6, 12, 1, 4]
    batcher = TokenBudgetBatcher(Cutter(), map(image_of_tokens, lengths), 9, lookahead=100)
    packs = list(batcher)
    assert [pack.index for pack in packs] == [[0, 4], [1, 2], [3, 6, 7], [5]]
    assert [pack.num_tokens for pack in packs] == [9, 9, 7, 12]  # 12 cannot be split


def test_packs_are_full_where_images_are_small() -> None:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 120, (600,), generator=random).tolist()
    packs = list(TokenBudgetBatcher(Cutter(), map(image_of_tokens, lengths), 1024))
    filled = [pack.num_tokens / 1024 for pack in packs]
    assert min(filled[:-4]) >= 0.98  # the last ones have less to choose from
    assert sum(filled) / len(filled) >= 0.95
    assert len(packs) <= math.ceil(sum(lengths) / 1024) + 1


def test_images_may_come_one_by_one_in_batches_or_in_lists() -> None:
    random = torch.Generator().manual_seed(0)
    batch = torch.stack([random_image(4, 6, random) for _ in range(5)])
    others = [random_image(2, 3, random), random_image(8, 8, random)]
    single = [*batch, *others, *batch]
    options: dict[str, Any] = {"max_tokens": 60, "chunk": 3}

    def content(images: Any) -> list[tuple[list[int], list[Tensor]]]:
        return [(pack.index, list(pack.images)) for pack in TokenBudgetBatcher(Cutter((60.0,)), images, **options)]

    expected = content(single)
    for images in (
        iter(single),
        [batch, others, list(batch)],
        (one for one in [batch, *others, tuple(batch), batch[:0]]),
    ):
        for (index, got), (expected_index, target) in zip(content(images), expected, strict=True):
            assert index == expected_index
            assert all(torch.equal(one, other) for one, other in zip(got, target, strict=True))
    assert sorted(number for index, _ in content(batch) for number in index) == list(range(5))


def test_images_are_scored_in_chunks_as_they_are_needed() -> None:
    cutter = Cutter()
    packs = iter(TokenBudgetBatcher(cutter, (image_of_tokens(5) for _ in range(40)), 10, lookahead=2, chunk=3))
    assert cutter.chunks == []
    next(packs)
    assert cutter.chunks == [3, 3]  # 20 tokens are to wait
    next(packs)
    assert cutter.chunks == [3, 3]
    assert sum(1 for _ in packs) == 18
    assert cutter.chunks == [3] * 13 + [1]


def test_an_input_without_end_is_read_lazily() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield image_of_tokens(3)

    packs = iter(TokenBudgetBatcher(Cutter(), endless(), 10))
    assert [next(packs).index for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_each_iteration_starts_anew() -> None:
    batcher = TokenBudgetBatcher(Cutter(), [image_of_tokens(n) for n in (3, 9, 4)], 8)
    assert [pack.index for pack in batcher] == [pack.index for pack in batcher] == [[0, 2], [1]]
    assert list(TokenBudgetBatcher(Cutter(), [], 8)) == []


def test_an_image_that_waits_does_not_keep_its_batch() -> None:
    batches = [torch.zeros(6, 1, 8, 8), torch.zeros(6, 1, 4, 8)]
    packs = list(TokenBudgetBatcher(Cutter(), batches, 10))
    mixed = [image for pack in packs if isinstance(pack.images, list) for image in pack.images]
    assert mixed
    assert all(image.untyped_storage().nbytes() == image.nbytes for image in mixed)


def test_raw_and_normalised_images_are_not_made_one_tensor() -> None:
    images = [torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)]
    (pack,) = TokenBudgetBatcher(Cutter(), images, 8, chunk=1)
    assert [image.dtype for image in pack.images] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_broken_image_is_named_by_its_number_in_the_input(chunk: int) -> None:
    images = [torch.rand(1, 8, 8) for _ in range(11)]
    images[6][0, 2, 2] = math.nan
    with pytest.raises(ValueError, match=r"^image 6 holds NaN or infinite pixels: check"):
        list(TokenBudgetBatcher(Cutter(), images, 8, chunk=chunk))
    images[6] = torch.rand(1, 8, 7)
    with pytest.raises(ValueError, match=r"^image 6 of 8x7 pixels: sides must be multiples"):
        list(TokenBudgetBatcher(Cutter(), iter(images), 8, chunk=chunk))
    images[6] = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"^image 6 is \(1, 1, 8, 8\): a list holds tensors"):
        list(TokenBudgetBatcher(Cutter(), [images], 8, chunk=chunk))


def test_other_refusals_have_the_number_too_or_stay_as_they_are() -> None:
    class Fussy(Cutter):
        def layout(self, images: Any) -> PatchLayout:
            if len(images) > self.most or any(image.shape[2] > 4 * self.widest for image in images):
                raise ValueError("too much")
            return super().layout(images)

        most, widest = 100, 2

    images = [image_of_tokens(n) for n in (1, 2, 3, 1)]
    with pytest.raises(ValueError, match=r"^image 2: too much$"):
        list(TokenBudgetBatcher(Fussy(), images, 8))
    Fussy.most, Fussy.widest = 2, 4
    with pytest.raises(ValueError, match=r"^too much$"):  # no image is at fault
        list(TokenBudgetBatcher(Fussy(), images, 8))


def test_wrong_inputs_and_options_are_refused() -> None:
    for options, message in (
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1: give"),
        ({"max_tokens": 8, "lookahead": 0}, "lookahead=0 must be at least 1"),
        ({"max_tokens": 8, "chunk": -1}, "chunk=-1 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenBudgetBatcher(Cutter(), [], **options)
    with pytest.raises(ValueError, match=r"item 1 of the images is of shape \(8, 8\): give \(C, H, W\)"):
        list(TokenBudgetBatcher(Cutter(), [torch.zeros(1, 8, 8), torch.zeros(8, 8)], 8))
    with pytest.raises(ValueError, match="item 0 of the images is a ndarray"):
        list(TokenBudgetBatcher(Cutter(), [torch.zeros(1, 8, 8).numpy()], 8))  # type: ignore[list-item]


# Input order


def test_rows_come_back_in_order() -> None:
    rows = torch.randn(6, 2, 3)
    assert torch.equal(restore_order([([4, 0], rows[[4, 0]]), ([5, 1, 2], rows[[5, 1, 2]]), ([3], rows[3:4])]), rows)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([[0, 1], [1, 2]], "index 1 is doubled"),
        ([[0, 1, 2], [0, 1, 2]], "index 0 is doubled"),
        ([[0, 2], [3]], "index 1 is missing"),
        ([[1]], "index 0 is missing"),
        ([], "no images"),
        ([[]], "no images"),
    ],
)
def test_rows_that_are_not_one_of_each_are_refused(index: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore_order((numbers, torch.zeros(len(numbers), 2)) for numbers in index)


def test_an_output_without_a_row_for_each_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2\) has no row for each of 3 images"):
        restore_order([([0, 1, 2], torch.zeros(1, 2))])


# Predictions


@pytest.fixture
def model(make_host: Host) -> Any:
    return aptvit.adapt(make_host(), thresholds=(6.5, 6.5), init="nonzero")


@pytest.mark.parametrize("max_tokens", [1, 70, 10_000])
def test_predictions_are_those_of_each_image_alone(model: Any, images: Tensor, max_tokens: int) -> None:
    mixed = [images[0], images[1][:, :64], images[2], images[3][:, 32:], images[4][:, :, :96], images[1][:, 64:]]
    got = predict(model, iter(mixed), max_tokens, chunk=4)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in mixed])
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_predictions_of_a_batch_are_those_of_the_model(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = model(images)
    got = predict(model, images, 100, lookahead=2, chunk=2)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert got.is_inference()


def test_predictions_that_are_no_tensors_are_refused(model: Any, images: Tensor) -> None:
    model.forward_head = lambda features: {"logits": features.tokens}
    with pytest.raises(ValueError, match="returns a dict, not a tensor"):
        predict(model, images, 100)


# Scoring ahead


def test_each_batch_comes_with_its_layout_and_the_next_is_there(model: Any, images: Tensor) -> None:
    batches = [images, list(images[:2]), [images[0], images[1][:, :64]], images[3:]]
    taken = 0

    def stream() -> Iterator[Any]:
        nonlocal taken
        for batch in batches:
            taken += 1
            yield batch

    pairs = score_ahead(model, stream())
    assert taken == 0
    for number, batch in enumerate(batches):
        got, layout = next(pairs)
        assert got is batch
        assert taken == min(number + 2, len(batches))
        assert_same_layout(layout, model.layout(batch))
        with torch.no_grad():
            assert torch.equal(model(got, layout=layout), model(batch))
    assert next(pairs, None) is None
    assert list(score_ahead(model, [])) == []


def test_a_batch_that_is_no_batch_is_refused_by_the_model(model: Any) -> None:
    with pytest.raises(ValueError, match="image 0 is str"):
        list(score_ahead(model, [["photo.jpg"]]))  # type: ignore[list-item]


def test_on_other_devices_batches_are_scored_one_after_the_other() -> None:
    """A batch is scored when it is asked for, not before: the blocks of the batch before have run by then."""
    cutter = Cutter((60.0,))
    batches = [torch.rand(count, 1, 8, 8) for count in (3, 1, 2)]
    for number, (images, layout) in enumerate(score_ahead(cutter, iter(batches))):
        assert images is batches[number]
        assert cutter.chunks == [3, 1, 2][: number + 1]
        assert_same_layout(layout, Cutter((60.0,)).layout(images))
    assert number == 2


class PaperGpu:
    """A GPU on paper, since most machines that run this have none: for each piece of work, what is surely done before.

    That is what was queued on its stream before, what that stream was told to wait for, and what the program itself
    has waited for.
    """

    def __init__(self) -> None:
        self.before: dict[str, set[str]] = {}
        self.awaited: set[str] = set()
        self.main = self.current = PaperStream()

    def queue(self, work: str) -> None:
        self.before[work] = self.current.done | self.awaited
        self.current.done |= {work, *self.awaited}

    def wait(self) -> None:
        self.awaited |= self.current.done

    @contextmanager
    def on(self, stream: PaperStream) -> Iterator[None]:
        outside, self.current = self.current, stream
        yield
        self.current = outside


class PaperStream:
    """What `torch.cuda.Stream` does to what is done when; an event is what was done on a stream until then."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.done: set[str] = set()

    def record_event(self) -> set[str]:
        return set(self.done)

    def wait_event(self, event: set[str]) -> None:
        self.done |= event

    def wait_stream(self, other: PaperStream) -> None:
        self.done |= other.done


class PaperTensor(Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda:0")  # type: ignore[assignment]


def test_on_a_gpu_scores_wait_for_their_pixels_and_not_for_the_blocks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PaperGpu()
    monkeypatch.setattr(torch.cuda, "Stream", PaperStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    kept: list[tuple[Any, Any]] = []
    monkeypatch.setattr(data, "record_stream", lambda layout, stream: kept.append((layout, stream)))

    class Scorer:
        def layout(self, images: Any) -> Any:
            name = f"of {int(images[0, 0, 0, 0])}"
            gpu.queue(f"scores {name}")
            gpu.wait()  # to learn how many patches there are
            gpu.queue(f"layout {name}")
            return f"layout {name}"

    def stream() -> Iterator[Tensor]:
        for number in range(4):
            gpu.queue(f"pixels of {number}")
            yield torch.full((1, 1, 4, 4), float(number)).as_subclass(PaperTensor)

    for number, (_, layout) in enumerate(score_ahead(Scorer(), stream())):
        assert layout == f"layout of {number}"
        assert (layout, gpu.main) in kept  # its memory is from another stream
        gpu.queue(f"blocks of {number}")
    assert number == 3
    for number in range(4):
        assert f"pixels of {number}" in gpu.before[f"scores of {number}"]
        assert f"layout of {number}" in gpu.before[f"blocks of {number}"]
        assert f"blocks of {number - 1}" not in gpu.before[f"scores of {number}"]
        assert f"blocks of {number - 1}" not in gpu.before[f"pixels of {number}"]  # nor do copies to the GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_stream_of_their_own_are_the_same(model: Any, images: Tensor) -> None:
    model.cuda()
    batches = [images[torch.randperm(5)] for _ in range(20)]
    on_device = (batch.pin_memory().cuda(non_blocking=True) for batch in batches)
    with torch.no_grad():
        got = [model(batch, layout=layout) for batch, layout in score_ahead(model, on_device)]
        for logits, batch in zip(got, batches, strict=True):
            expected = model(batch.cuda())
            assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_pack_is_what_a_model_takes(model: Any, images: Tensor) -> None:
    layout = model.layout(images)
    pack = TokenPack(images, layout, list(range(5)))
    assert pack.num_tokens == layout.num_tokens
    with torch.no_grad():
        assert torch.equal(model(pack.images, layout=pack.layout), model(images))
