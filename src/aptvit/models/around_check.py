"""A model around a ViT beside its host, on noise: what was found in the host's structure, proved before it is used.

Two comparisons, of the embeddings, of each layer and of what the ViT returns:

1. nothing merged, on packed tokens, against the host; a batch of two at two sizes, one of them not square
2. one layout with merged patches, on images that are constant inside each patch, against the host on full grids, whose
   embeddings are those of the patches at all of their cells, and whose attention reads the first cell of each patch
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from aptvit.encoder.full_grid import GridPlan, restored
from aptvit.encoder.map_windows import pooled
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.inner_vit import InnerViT
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import uniform_layout

__all__ = ["check_beside", "largest_difference", "run_on_full_grids"]

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative to the largest value; others 0.1


def check_beside(model: Any, host: nn.Module) -> None:
    """Compare a model of `aptvit.models.around.adapt_around` with its host.

    Args:
        model: The model.
        host: Its host.

    Raises:
        ValueError: If they differ; the message names the first part that does.
    """
    with torch.no_grad(), _evaluating(model, host), _only_resized(model):
        try:
            _check(model, host)
        except ValueError:
            raise
        except Exception as error:  # hosts fail on what they do not expect with errors of many types
            name = type(model.aptvit.inner.core).__name__
            raise ValueError(f"cannot adapt this model: {name} fails on packed tokens: {error}"[:300]) from error


def _check(model: Any, host: nn.Module) -> None:
    inner: InnerViT = model.aptvit.inner
    core: Any = host.get_submodule(inner.core_name)
    runs = list(_runs_of_sizes(core, inner))
    if not runs:
        raise ValueError(
            f"cannot check {type(core).__name__} beside itself: it took no images of noise, so nothing is known of "
            "its order of tokens. check=False adapts it without a check"
        )
    for size, expected in runs:
        layout = _layout(model, size, merges=False)
        with model.aptvit.calling(layout, packs_always=True):
            values = _run(inner.core, inner, _noise(inner, size))
        _compare(values, expected, inner, f"with nothing merged at {_words(size)} px")
    size = runs[0][0]
    merged = _layout(model, size, merges=True)
    pixel_values = _constant_in_patches(inner, size)
    with model.aptvit.calling(merged):
        values = _run(inner.core, inner, pixel_values)
    expected = run_on_full_grids(model, host, pixel_values, merged)
    # Mean embeddings of the cells, which constant patches have in common but for their positions.
    _check_embeddings(model, host, pixel_values, merged, values)
    _compare(values, expected, inner, f"with merged patches at {_words(size)} px")


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _only_resized(model: nn.Module) -> Iterator[None]:
    """Without the sub-patch branch of Eq. 2 inside: what it adds is not the host's."""
    branch = getattr(model, COARSE_PREFIX, None)
    try:
        if branch is not None:
            delattr(model, COARSE_PREFIX)
        yield
    finally:
        if branch is not None:
            model.add_module(COARSE_PREFIX, branch)


def _runs_of_sizes(core: Any, inner: InnerViT) -> Iterator[tuple[tuple[int, ...], _Values]]:
    """Up to two shapes of images that a host takes, one of them not square if it takes such, and what it computes."""
    config, unit = core.config, inner.patch_size * inner.num_windows
    native = next((getattr(config, name) for name in ("image_size", "crop_size") if hasattr(config, name)), None)
    frames = next((getattr(config, name) for name in ("num_frames", "frames_per_clip") if hasattr(config, name)), None)
    front = (inner.in_chans,) if inner.depth == 1 else (frames or inner.depth, inner.in_chans // inner.depth)
    square = (native, native) if isinstance(native, int) else tuple(native or ())
    not_square, small = [(4 * unit, 6 * unit)], [(4 * unit, 4 * unit)]
    for sizes in (not_square if not inner.is_square_only else [], [*small, square]):
        for size in sizes:
            if len(size) != 2:
                continue
            try:
                values = _run(core, inner, _noise(inner, (*front, *size)))
            except Exception:  # hosts refuse sizes with errors of many types
                continue
            yield (*front, *size), values
            break


def _noise(inner: InnerViT, size: tuple[int, ...]) -> Tensor:
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(inner.device, inner.dtype)


def _layout(model: Any, size: tuple[int, ...], merges: bool) -> PatchLayout:
    """A layout of a batch of two, the same for all images: nothing merged, or a checkerboard of 2x2 patches."""
    inner, scales = model.aptvit.inner, model.aptvit.num_scales
    rows, cols = (side // inner.patch_size for side in size[-2:])
    count = 2 if inner.depth == 1 else 2 * (size[0] // inner.depth)
    uniform = uniform_layout(count, (rows, cols), inner.patch_size, scales, device=inner.device)
    if not merges or scales < 2:
        return uniform
    row, col = torch.arange(rows // 2)[:, None], torch.arange(cols // 2)
    coarse = ((row + col) % 2 == 0).to(torch.int8)
    scale_map = torch.zeros(rows, cols, dtype=torch.int8)
    scale_map[: rows // 2 * 2, : cols // 2 * 2] = coarse.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return PatchLayout.from_scale_map(scale_map.expand(count, -1, -1).to(inner.device), inner.patch_size, scales)


def _constant_in_patches(inner: InnerViT, size: tuple[int, ...]) -> Tensor:
    """Clips or images of one colour in each block of 2x2 base patches, where the host cuts them."""
    side = 2 * inner.patch_size
    rows, cols = (-(-length // side) for length in size[-2:])
    blocks = _noise(inner, (*size[:-2], rows, cols)).flatten(0, -3)
    enlarged = F.interpolate(blocks[None], scale_factor=side, mode="nearest")[0, :, : size[-2], : size[-1]]
    return enlarged.roll((-inner.shift, -inner.shift), (1, 2)).unflatten(0, (2, *size[:-2]))


@dataclass
class _Values:
    """What a run computed.

    Attributes:
        embeddings: Tokens of the embeddings.
        layers: (R, N, D) output of each layer.
        outputs: Tensors that the ViT returned.
        kept: (R, N) which tokens of the layers to compare; None for all.
    """

    embeddings: Tensor
    layers: list[Tensor]
    outputs: list[Tensor]
    kept: Tensor | None = None


def _run(core: Any, inner: InnerViT, pixel_values: Tensor) -> _Values:
    """Run a host's ViT and record its parts."""
    layers = core.get_submodule(_layers_name(inner))
    recorded: dict[Any, Tensor] = {}

    def hook(key: Any) -> Any:
        return lambda _module, _inputs, output: recorded.__setitem__(key, _tensors(restored(output))[0])

    with ExitStack() as hooks:
        for key, module in (("embeddings", getattr(core, inner.embeddings_name)), *enumerate(layers)):
            hooks.callback(module.register_forward_hook(hook(key)).remove)
        output = core(pixel_values)
    if inner.map_attention is not None:
        recorded |= {key: inner.rows_of_map(value) for key, value in recorded.items() if key != "embeddings"}
    return _Values(recorded["embeddings"], [recorded[i] for i in range(len(layers))], _tensors(restored(output)))


def _words(size: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in size[-2:])


def _layers_name(inner: InnerViT) -> str:
    return next(name for name, module in inner.core.named_modules() if module is inner.layers)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of floats in an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value of the second; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    finite = b.isfinite()
    if not b.numel() or not finite.any():
        return 0.0
    return float((a - b)[finite].abs().max() / b[finite].abs().max().clamp_min(1e-30))


def _compare(values: _Values, expected: _Values, inner: InnerViT, situation: str) -> None:
    """Raise ValueError for the first part that differs."""
    _expect(values.embeddings, expected.embeddings, inner, "the embeddings", situation)
    for number, (tensor, reference) in enumerate(zip(values.layers, expected.layers, strict=True)):
        if expected.kept is not None:
            kept = F.pad(expected.kept, (reference.shape[1] - expected.kept.shape[1], 0), value=True)
            tensor, reference = tensor[kept], reference[kept]
        _expect(tensor, reference, inner, f"layer {number}", situation)
    if expected.kept is None:
        for tensor, reference in zip(values.outputs, expected.outputs, strict=True):
            _expect(tensor, reference, inner, "the output", situation)


def _expect(tensor: Tensor, reference: Tensor, inner: InnerViT, part: str, situation: str) -> None:
    difference = largest_difference(tensor.float(), reference.float())
    if difference > _TOLERANCE.get(inner.dtype, 0.1):
        raise ValueError(
            f"cannot adapt this model: {part} of {type(inner.core).__name__} differs from the host's by "
            f"{difference:.2g} of the largest value {situation}, so something in this class is not as in known ViTs. "
            "check=False skips this comparison"
        )


def _check_embeddings(model: Any, host: nn.Module, pixel_values: Tensor, layout: PatchLayout, values: _Values) -> None:
    """Compare embeddings of constant patches with the mean of the host's over their cells."""
    inner = model.aptvit.inner
    core: Any = host.get_submodule(inner.core_name)
    plain = _run(core, inner, pixel_values).embeddings
    if plain.ndim == 4:
        grid = layout.grid_sizes[0]
        rows = (inner.rows_of_map(maps) for maps in (plain, values.embeddings))
        cells, adaptive = (x.transpose(1, 2).unflatten(2, grid) for x in rows)
    else:
        place, _ = inner.places(layout.num_images, layout.grid_sizes[0], *plain.shape[:2])
        cells, adaptive = (x.flatten(0, 1)[place].permute(0, 3, 1, 2) for x in (plain, values.embeddings))
    means = F.avg_pool2d(cells, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    coarse = (layout.scale_map > 0)[:, None]
    height, width = means.shape[2:]
    expected = means.where(coarse[:, :, :height, :width], cells[:, :, :height, :width])
    adaptive = adaptive[:, :, :height, :width]
    if inner.shift:  # patches at the upper and left borders hold padding, and are not constant
        expected, adaptive = expected[:, :, 2:, 2:], adaptive[:, :, 2:, 2:]
    _expect(adaptive, expected, inner, "the embedding of coarse patches", "on constant patches")


def run_on_full_grids(model: Any, host: nn.Module, pixel_values: Tensor, layout: PatchLayout) -> _Values:
    """The host's ViT on full grids, with the embeddings of patches at all of their cells, where attention reads only
    the prefix tokens and the first cell of each patch.

    Rotary positions are those of the patch at all of its cells; they need the same patches in all images.

    Args:
        model: The adaptive model.
        host: Its host.
        pixel_values: The images.
        layout: Their layout.
    """
    inner: InnerViT = model.aptvit.inner
    plain: Any = share_parameters(host)
    core = plain.get_submodule(inner.core_name)
    outputs: list[Any] = []
    with model.aptvit.calling(layout):
        hook = inner.embeddings.register_forward_hook(lambda _m, _a, output: outputs.append(restored(output)))
        with ExitStack() as stack:
            stack.callback(hook.remove)
            inner.core(pixel_values)
        (embedded,) = outputs
        call = model.aptvit.call
        plan = model.aptvit.plan(call, *inner.shape_of_rows(embedded))
        rotary = call.cached.get(("rotary", plan.shape))
        centres = call.cached.get("centres")
    getattr(core, inner.embeddings_name).forward = lambda *_args, **_options: embedded
    kept = torch.zeros(plan.shape, dtype=torch.bool, device=inner.device)
    kept.view(-1)[plan.index] = True
    layers = core.get_submodule(_layers_name(inner))
    if rotary is not None:
        of_tokens = tuple(part[plan.source[: plan.shape[1]]] for part in rotary)  # of the first row

        def hook(layer: Any, arguments: Any, options: Any) -> Any:
            _, *names = inspect.signature(layer.forward).parameters
            options = {**dict(zip(names, arguments[1:], strict=False)), **options}
            rows = len(options["position_embeddings"][0])  # of the cells, or of all tokens
            return arguments[:1], {**options, "position_embeddings": tuple(part[-rows:] for part in of_tokens)}

        for layer in layers:
            layer.register_forward_pre_hook(hook, with_kwargs=True)
    if centres is not None:
        of_cells = tuple(part[plan.source[: plan.shape[1]]] for part in centres)
        for module in core.modules():
            if hasattr(module, "get_position_ids"):
                module.get_position_ids = lambda x, *_args, **_options: tuple(part.to(x.dtype) for part in of_cells)
    hidden = _HiddenKeys(kept)
    if inner.map_attention is not None:
        hidden = _HiddenCells(kept.unflatten(1, layout.grid_sizes[0]), layers)
        _hold_constant_in_patches(inner, layers, plan, layout.grid_sizes[0])
    with hidden:
        values = _run(core, inner, pixel_values)
    # The other cells are read by nobody: as queries they may have a bias of their own.
    return replace(values, kept=kept)


class _HiddenKeys(TorchFunctionMode):
    """Inside, attention over the tokens of full grids reads only some of them.

    Args:
        keys: (R, N) whether a token is read as a key.
    """

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, *further = args
        rows, tokens = key.shape[0], key.shape[2]
        extra = tokens - self.keys.numel() // rows  # queries that a host puts before its tokens
        if extra < 0 or self.keys.numel() % rows:
            return func(*args, **kwargs)
        kept = F.pad(self.keys.view(rows, -1), (extra, 0), value=True)[:, None, None]  # (R, 1, 1, N)
        bias = torch.zeros(kept.shape, dtype=query.dtype, device=query.device).masked_fill(~kept, float("-inf"))
        mask = kwargs.pop("attn_mask", further[1] if len(further) > 1 else None)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
        mask = bias.expand(-1, -1, query.shape[2], -1) if mask is None else mask + bias
        return func(query, key, further[0] if further else kwargs.pop("value"), attn_mask=mask, **kwargs)


def _hold_constant_in_patches(inner: InnerViT, layers: Any, plan: GridPlan, grid_size: tuple[int, int]) -> None:
    """Let what reads whole maps of a host read maps that are constant in each patch: the first layer, which reads the
    mean over a patch, and convolutions, which read its first cell."""

    def hook(reduce: Any) -> Any:
        def held(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            rows = plan.restore(reduce(inner.rows_of_map(arguments[0])))
            return (inner.map_of_rows(rows, grid_size), *arguments[1:])

        return held

    layers[0].register_forward_pre_hook(hook(partial(pooled, plan)))
    for layer in layers:
        if getattr(layer, "residual", None) is not None:
            layer.residual.register_forward_pre_hook(hook(plan.reduce))


class _HiddenCells(_HiddenKeys):
    """Inside, attention over the maps of a host, or over their windows with padding, reads only some cells.

    Args:
        keys: (B, h, w) whether a cell is read as a key.
        layers: The layers.
    """

    def __init__(self, keys: Tensor, layers: Any) -> None:
        super().__init__(keys.flatten(1))
        self.windows: dict[int, Tensor] = {}  # by the number of cells of a window, whether each is read
        for window in {int(layer.window_size) for layer in layers} - {0}:
            height, width = (-(-side // window) * window for side in keys.shape[1:])
            padded = F.pad(keys, (0, width - keys.shape[2], 0, height - keys.shape[1]), value=True)
            cut = padded.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
            self.windows[window * window] = cut.flatten(3, 4).flatten(0, 2)  # (B windows, cells)
        self.windows[self.keys.shape[1]] = self.keys

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            bias = self._bias(key.shape[2], query.dtype)[:, None]
            mask = kwargs.pop("attn_mask", None)
            mask = bias.expand(-1, 1, query.shape[2], -1) if mask is None else mask + bias
            return func(query, key, value, attn_mask=mask, **kwargs)
        if func in (F.softmax, Tensor.softmax) and args[0].shape[-1] in self.windows:
            logits, *further = args
            bias = self._bias(logits.shape[-1], logits.dtype)
            heads = logits.shape[0] // len(bias)
            return func(logits + bias.repeat_interleave(heads, 0), *further, **kwargs)
        return func(*args, **kwargs)

    def _bias(self, cells: int, dtype: torch.dtype) -> Tensor:
        """(B windows, 1, cells) minus infinity for hidden cells."""
        keys = self.windows[cells]
        return torch.zeros(keys.shape, dtype=dtype, device=keys.device).masked_fill(~keys, float("-inf"))[:, None]
