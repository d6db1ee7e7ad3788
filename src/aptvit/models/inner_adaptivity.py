"""The adaptive ViT inside a model: its settings, the layouts of images, and what runs in the place of its methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptvit.encoder.derived import DerivedValues, DerivedWeights
from aptvit.encoder.full_grid import GridAttention, GridCall, GridPlan, GridTokens, current_call, restored
from aptvit.encoder.map_windows import MapTokens, MapWindows, pooled
from aptvit.hosts.inner_vit import InnerViT
from aptvit.layers.attention import AttentionPlan, BlockAttention, run_block
from aptvit.layers.patch_embed import COARSE_PREFIX, CoarsePatchEmbed, Init, PatchOrder, embed_directly, patch_reader
from aptvit.layers.position_embed import PositionTable
from aptvit.layers.rotary import centre_rotation, rotations_of_scales
from aptvit.models.settings import BudgetSettings
from aptvit.patching.budget import CallBudget
from aptvit.patching.images import ImageGroup, Normalization
from aptvit.patching.layout import PatchLayout
from aptvit.patching.layouts import check_layout
from aptvit.patching.patchifier import Patchifier
from aptvit.patching.scoring import Scorer, get_scorer

__all__ = ["InnerAdaptivity"]


class InnerAdaptivity(BudgetSettings):
    """Settings of the adaptive ViT inside a model: ``model.aptvit``.

    Args:
        host: The host, a copy that is changed.
        options: See `aptvit.models.around.adapt_around`.

    Attributes:
        inner: Access to the ViT inside.
        patchifier: Cuts images into patches.
        resize_only: Whether the sub-patch branch of Eq. 2 is omitted.
        attention: Attention backend; None for the best backend for the tensors.
        area_bias: Factor of the logarithm of a patch's area that is added to its logits as a key.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        scorer: str | Scorer = "entropy",
        resize_only: bool = False,
        init: Init = "zero",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str | None = None,
        area_bias: float = 0.0,
        **budget: Any,
    ) -> None:
        of_towers = sorted(budget.keys() & {"pad", "token_bucket", "window_size", "global_blocks", "cut_size"})
        if of_towers:
            raise ValueError(f"{of_towers[0]} is for bare towers: a model around a ViT has its own sizes and windows")
        self.inner = inner = InnerViT(host)
        self.resize_only, self.attention, self.area_bias = resize_only, attention, area_bias
        if not resize_only:
            host.add_module(COARSE_PREFIX, CoarsePatchEmbed(inner.embed_dim, init, inner.device, inner.dtype))
        mean, std = (
            tuple(values) * (inner.in_chans // len(values)) for values in (mean or inner.mean, std or inner.std)
        )
        self.normalization = Normalization.of_channels(mean, std, inner.in_chans)
        self.derived = DerivedWeights(inner)  # type: ignore[arg-type]
        self.patchifier = Patchifier(
            inner.patch_size,
            inner.in_chans,
            scorer=self._scorer(scorer),
            mean=self.normalization.mean,
            std=self.normalization.std,
            **budget,
        )
        self._run_block: Any = run_block

    def _scorer(self, scorer: str | Scorer) -> Scorer:
        if scorer == "embedding":
            from aptvit.scorers.embedding import EmbeddingScorer

            return EmbeddingScorer(self.derived.maps_for_scoring)
        if isinstance(scorer, str) and scorer in ("glance", "harm", "spread", "preview"):
            raise ValueError(
                f"scorer={scorer!r} reads the blocks of a bare tower: for a ViT inside a model use 'entropy', "
                "'laplacian', 'upsample', 'exact', 'embedding' or a callable"
            )
        return get_scorer(scorer, ("embedding",))

    # Which patches

    def layout(self, pixel_values: Tensor, **call: Unpack[CallBudget]) -> PatchLayout:
        """The patches of images, or of the frames of clips. Synchronises with the device once.

        Args:
            pixel_values: What the host takes: (B, C, H, W) images, or (B, frames, C, H, W) clips, normalised.
            call: ``keep=``, ``thresholds=`` and ``max_tokens=`` for this call, instead of the settings.

        Raises:
            ValueError: If the images do not fit the model, or the budget cannot be met.
        """
        return self._layout(self._groups(pixel_values), call)

    def scores(self, pixel_values: Tensor) -> list[tuple[ImageGroup, Mapping[int, Tensor]]]:
        """Scores of all candidate patches, see `aptvit.AdaptivePatchTransformer.scores`."""
        return self.patchifier.scores(self.whole_patches(pixel_values))

    def _groups(self, pixel_values: Tensor) -> list[ImageGroup]:
        return self.patchifier.groups(self.whole_patches(pixel_values))

    def whole_patches(self, pixel_values: Tensor) -> Tensor:
        """The images that patches are cut from, without incomplete patches, which hosts cut off, too."""
        images = self.inner.images(pixel_values)
        height, width = (side // self.patch_size * self.patch_size for side in images.shape[2:])
        return images[:, :, :height, :width]

    def _layout(self, groups: list[ImageGroup], call: CallBudget) -> PatchLayout:
        budget = self.budget.for_call(**call) if call else self.budget
        grid, windows = groups[0].grid_size(self.patch_size), self.inner.num_windows
        coarsest = 1 << (self.num_scales - 1)
        if self.inner.is_square_only and grid[0] != grid[1]:
            raise ValueError(
                f"images of {grid[0]}x{grid[1]} patches: {type(self.inner.core).__name__} mixes up rows and columns of "
                "images that are not square: resize them to squares, as its processor does"
            )
        if windows > 1 and any(side // windows % coarsest for side in grid):
            raise ValueError(
                f"windows of {'x'.join(str(side // windows) for side in grid)} patches do not hold whole patches of "
                f"{coarsest}x{coarsest}: adapt with scales={self.num_scales - 1}, or use another image size"
            )
        return self.patchifier(groups, budget)

    # One call of the host

    @contextmanager
    def calling(self, layout: PatchLayout | None = None, packs_always: bool = False, **options: Any) -> Iterator[None]:
        """A context for one call of the host, with the options of this call."""
        if layout is not None and options:
            raise ValueError(f"a layout fixes the number of tokens: give either layout= or {', '.join(options)}")
        token = current_call.set(GridCall(self, options, layout, packs_always=packs_always))
        try:
            yield
        finally:
            current_call.reset(token)

    @property
    def call(self) -> GridCall | None:
        """The current call of this host in this thread; None outside of calls."""
        call = current_call.get()
        return call if call is not None and call.owner is self else None

    def embed(self, pixel_values: Tensor, *args: Any, **options: Any) -> Tensor:
        """In the place of the host's embeddings: its tokens, with those of coarse patches replaced.

        Args:
            pixel_values: As for `layout`.
            args: Further arguments of the host's embeddings.
            options: Further keyword arguments of the host's embeddings.

        Returns:
            (R, N, D), or a map (B, D, h, w).

        Raises:
            ValueError: If there are no images, they do not fit the model, or patches are masked.
        """
        inner, call = self.inner, self.call
        if not len(pixel_values):
            raise ValueError(f"a batch without images, which {type(inner.core).__name__} cannot reshape: leave it out")
        output = inner.embed_by_host(pixel_values, *args, **options)
        if call is None:
            return output
        full = inner.tokens_of(output)
        groups = self._groups(pixel_values)
        if call.layout is None:
            call.layout = self._layout(groups, call.options)
        else:
            check_layout(call.layout, groups, self.patchifier)
        layout = call.layout
        trains = torch.is_grad_enabled() and inner.vit.training  # then each parameter gets a gradient
        call.is_packed = not layout.is_uniform or inner.num_windows > 1 or trains or call.packs_always
        if not call.is_packed:
            return output
        if any(isinstance(value, Tensor) for value in (*args, *options.values())):
            raise ValueError("masks of patches cannot be combined with merging: leave them out, or call with keep=1.0")
        is_map = full.ndim == 4
        rows = inner.rows_of_map(full) if is_map else full
        plan = self.plan(call, rows.shape[0], rows.shape[1], 1 if is_map else inner.num_windows)
        number, coarse = self._coarse_tokens(groups, layout, pixel_values, args, options)
        packed = plan.reduce(rows)
        packed = packed.index_put((torch.zeros_like(number), plan.patches[number]), coarse.to(packed.dtype))
        if is_map:
            return inner.map_of_rows(plan.restore(packed), groups[0].grid_size(self.patch_size))
        tokens = GridTokens(packed, plan)
        return tokens if full is output else _with_tokens(output, tokens)

    def _coarse_tokens(
        self, groups: list[ImageGroup], layout: PatchLayout, pixel_values: Tensor, args: Any, options: Any
    ) -> tuple[Tensor, Tensor]:
        """For each coarse patch its number in the layout, and its token (n, D)."""
        inner, order = self.inner, PatchOrder(layout, groups)
        (selections,) = order.selections()
        directly = torch.is_grad_enabled() or inner.vit.training
        derived = None if directly else self.derived.fresh(self.derived.check(), waited=False)
        images = groups[0].images
        if derived is None:
            coarse = getattr(inner.vit, COARSE_PREFIX, None)
            rows = embed_directly(inner.patch_embed, coarse, images.to(inner.dtype), selections)[1:]
        else:
            read = patch_reader(images, self.normalization, inner.dtype)
            empty = tuple(part[:0] for part in selections[0])
            rows = derived.maps.embed(read, [empty, *selections[1:]])[1:]  # type: ignore[list-item]
        rows = [inner.patch_norm(part) for part in rows]
        positions = self._positions(derived, pixel_values, args, options)
        for scale, (image, row, col) in enumerate(selections[1:], start=1):
            table = positions[scale - 1]
            rows[scale - 1] = rows[scale - 1] + table[image % len(table), row, col].to(rows[scale - 1].dtype)
        return order.order[len(selections[0][0]) :], torch.cat(rows)

    def _positions(self, derived: DerivedValues | None, pixel_values: Tensor, args: Any, options: Any) -> list[Tensor]:
        """For each coarse scale (T, h', w', D) positions of its complete patches: means over the cells they cover."""

        def compute() -> list[Tensor]:
            inner, black = self.inner, torch.zeros_like(pixel_values[:1])
            base = inner.tokens_of(inner.embed_by_host(black, *args, **options))  # bias and position of each cell
            grid = tuple(side // self.patch_size for side in pixel_values.shape[-2:])
            if base.ndim == 4:
                cells = inner.rows_of_map(base).unflatten(1, grid)
            else:
                place, _ = inner.places(len(inner.images(black)), grid, *base.shape[:2])  # type: ignore[arg-type]
                cells = base.flatten(0, 1)[place]  # (T, h, w, D)
            side = self.patch_size
            bias = inner.patch_embed(black.new_zeros(1, inner.in_chans, side, side).to(inner.dtype))[0, :, 0, 0]
            cells = (cells - inner.patch_norm(bias)).permute(0, 3, 1, 2)
            pooled = (F.avg_pool2d(cells, 1 << scale) for scale in range(1, self.num_scales))
            return [table.permute(0, 2, 3, 1) for table in pooled]

        key = ("inner", tuple(pixel_values.shape[1:]), self.num_scales, repr(args), repr(options))
        return compute() if derived is None else derived.get(key, compute)

    def plan(self, call: GridCall, rows: int, tokens: int, num_windows: int | None = None) -> GridPlan:
        """The plan of a call for rows of this shape."""
        windows = self.inner.num_windows if num_windows is None else num_windows
        layout = call.layout
        assert layout is not None
        places = self.inner.places if windows == self.inner.num_windows else partial(_plain_places, self.inner.device)
        return call.get((rows, tokens), lambda: GridPlan.of_layout(layout, places, rows, tokens, windows))

    def run_layer(self, module: Any, block: Any, hidden_states: Tensor, arguments: dict[str, Any]) -> Any:
        """In the place of a layer's forward: the layer on packed tokens.

        Args:
            module: The layer.
            block: The layer's own forward, as `aptvit.layers.attention.run_block` runs it.
            hidden_states: (R, N, D), or `GridTokens`.
            arguments: Further arguments of the layer, by name.

        Returns:
            What the layer returns, with `GridTokens`.

        Raises:
            ValueError: If the layer does not return tokens of the same shape.
        """
        call = self.call
        assert call is not None
        if isinstance(hidden_states, GridTokens) and hidden_states.plan is call.cached.get(
            tuple(hidden_states.shape[:2])
        ):
            plan, x = hidden_states.plan, hidden_states.packed
        else:
            plan = self.plan(call, *hidden_states.shape[:2])
            x = plan.reduce(hidden_states)
        arguments = self._packed_arguments(call, plan, restored(arguments))
        is_global = self.inner.is_global(module)
        attention = self._attention(call, plan, is_global)
        run: Any = self._run_block
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            run = partial(checkpoint, partial(_run_in, call, run), use_reentrant=False)
        out, *_ = run(block, x, arguments, attention)
        tokens = out[0] if isinstance(out, tuple) else out
        if tokens.shape != x.shape:
            raise ValueError(
                f"{type(module).__name__} made {tuple(tokens.shape)} of {tuple(x.shape)} packed tokens: an argument "
                f"among {', '.join(arguments)} has a value for each image, which packed tokens cannot be given"
            )
        tokens = GridTokens(tokens, plan)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    def run_map_layer(self, module: Any, view: Any, maps: Tensor) -> Any:
        """In the place of a layer's forward that takes maps: the layer on a map of one row, that of the kept tokens.

        Args:
            module: The layer.
            view: The layer with its own parameters and without windows, whose attention reads `map_windows`.
            maps: (B, D, h, w), or (B, h, w, D); or `MapTokens`.

        Returns:
            What the layer returns, with `MapTokens`.
        """
        inner, call = self.inner, self.call
        assert call is not None and call.layout is not None
        grid = call.layout.grid_sizes[0]
        plan = self.plan(call, maps.shape[0], grid[0] * grid[1], 1)
        x = maps.packed if isinstance(maps, MapTokens) else pooled(plan, inner.rows_of_map(maps))
        run: Any = partial(type(view).forward, view)
        if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
            run = partial(checkpoint, partial(_run_in, call, run), use_reentrant=False)
        out = run(inner.map_of_rows(x, (1, x.shape[1])))
        tokens = inner.rows_of_map(out[0] if isinstance(out, tuple) else out)
        arrange = partial(inner.map_of_rows, grid_size=grid)
        tokens = MapTokens(tokens, plan, tuple(maps.shape), arrange)
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    def map_windows(self, window: int) -> tuple[MapWindows, Tensor | None]:
        """The windows of the current call, and the bias of its tokens as keys.

        Raises:
            ValueError: If a patch would cross the border of a window.
        """
        call = self.call
        assert call is not None and call.layout is not None
        coarsest = 1 << (self.num_scales - 1)
        if window % coarsest:
            raise ValueError(
                f"windows of {window}x{window} patches do not hold whole patches of {coarsest}x{coarsest}: adapt with "
                f"scales={self.num_scales - 1}"
            )
        plan = call.plan
        grid = call.layout.grid_sizes[0]
        windows = call.get(("windows", window), lambda: MapWindows.of_plan(plan, grid, window))
        bias = None
        if self.area_bias and not call.layout.is_uniform:
            bias = call.get(("bias", plan.shape), lambda: self._area_bias(call, plan))
        return windows, bias

    def _attention(self, call: GridCall, plan: GridPlan, is_global: bool) -> BlockAttention:
        segments = AttentionPlan.of_tokens(plan.images if is_global else plan.rows).images
        bias = None
        if self.area_bias and not call.layout.is_uniform:  # type: ignore[union-attr]
            bias = call.get(("bias", plan.shape), lambda: self._area_bias(call, plan))
        return GridAttention(segments, plan.images, bias, backend=self.attention, plan=plan)

    def _area_bias(self, call: GridCall, plan: GridPlan) -> Tensor:
        """(T,) bias of each token as a key: by the base patches that it covers."""
        assert call.layout is not None
        values = self.area_bias * math.log(4) * call.layout.scale
        return torch.zeros(len(plan.index), device=values.device).index_copy(0, plan.patches, values)

    def _packed_arguments(self, call: GridCall, plan: GridPlan, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer with rotary embeddings of the kept tokens instead of those of all cells."""
        of_cells = arguments.get("position_embeddings")
        if of_cells is None:
            return arguments
        rotary = call.get(("rotary", plan.shape), lambda: self._rotary(call, plan, *of_cells))
        return {**arguments, "position_embeddings": rotary}

    def _rotary(self, call: GridCall, plan: GridPlan, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(T, R) cosines and sines at the centres of the patches, from those of the cells (h w, R) or tokens (N, R)."""
        inner, layout = self.inner, call.layout
        assert layout is not None
        grid = layout.grid_sizes[0]
        base = torch.cat([sin, cos], dim=-1)[-grid[0] * grid[1] :]
        if inner.has_rotation:
            tables = rotations_of_scales(inner.rotation_table, grid, self.num_scales, inner.relative_positions)
        else:
            tables = [base, *(centre_rotation(base, grid, 1 << scale) for scale in range(1, self.num_scales))]
        table = PositionTable.of_grids([[(None, t) for t in tables]], layout.grid_sizes[:1], layout.image.device)
        rows = table.rows(layout.scale, torch.stack([layout.row, layout.col]) >> layout.scale)
        assert table.rotary is not None
        rotation = table.rotary[:1].expand(len(plan.index), -1)
        num_rotated = len(sin) - len(base)  # prefix tokens that the host rotates, too
        if num_rotated:
            place = (plan.index % plan.shape[1]).clamp(max=num_rotated - 1)
            rotation = torch.cat([sin, cos], dim=-1)[:num_rotated][place]
        rotation = rotation.index_put((plan.patches,), table.rotary[rows].to(rotation.dtype))
        sin, cos = rotation.chunk(2, dim=-1)
        return cos, sin

    def centres(self, call: GridCall, plan: GridPlan, positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Positions at the centres of patches, from a host's positions of cells: means over the cells they cover.

        Args:
            call: The call.
            plan: The plan of the layers.
            positions: (N,) positions of the tokens of a row.

        Returns:
            (T,) each.
        """
        layout = call.layout
        assert layout is not None
        rows, tokens = plan.shape
        place, _ = self.inner.places(layout.num_images, layout.grid_sizes[0], rows, tokens)
        by_token = torch.stack([part.float() for part in positions])  # (K, N)
        cells = by_token[:, place % tokens]  # (K, images, h, w)
        values = cells[:, layout.image, layout.row, layout.col]
        for scale in range(1, self.num_scales):
            means = F.avg_pool2d(cells, 1 << scale)
            row, col = (part >> scale for part in (layout.row, layout.col))
            inside = layout.scale == scale
            values = means[:, layout.image, row * inside, col * inside].where(inside, values)
        kept = by_token[:, plan.index % tokens]
        return kept.index_copy(1, plan.patches, values).unbind(0)

    def prepare(self) -> None:
        """Compute now what inference derives from the host's parameters, instead of in the first call."""
        maps = self.derived.fresh(self.derived.check(), waited=False).maps
        for scale in range(self.num_scales):
            maps.of_scale(scale)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers, one graph for all layers and all numbers of tokens.

        Args:
            args: As for ``torch.compile``.
            kwargs: As for ``torch.compile``.
        """
        self._run_block = torch.compile(run_block, *args, **{"dynamic": True, **kwargs})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run_block": run_block}  # as in PyTorch, copies are not compiled


def _with_tokens(output: Any, tokens: Tensor) -> Any:
    """An output of a host's embeddings, with other tokens."""
    if isinstance(output, tuple):
        return (tokens, *output[1:])
    return type(output)(**{**output, next(iter(output)): tokens})


def _plain_places(
    device: torch.device, num_images: int, grid_size: tuple[int, int], rows: int, tokens: int
) -> tuple[Tensor, int]:
    """As `InnerViT.places`, for maps (B, D, h, w)."""
    return torch.arange(rows * tokens, device=device).view(num_images, *grid_size), 0


def _run_in(call: GridCall, run: Any, *args: Any) -> Any:
    """Run a layer within a call, also when it is run again in the backward pass."""
    token = current_call.set(call)
    try:
        return run(*args)
    finally:
        current_call.reset(token)
