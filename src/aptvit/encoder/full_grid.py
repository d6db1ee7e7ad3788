"""Tokens of hosts that read full grids: reduced to one for each patch inside the layers, restored where they are read.

rows (R, N, D) ── reduce ──> (1, T, D) ── a layer of the host, packed ──> (1, T, D) ── restore ──> rows (R, N, D)

R are a host's images, clips or windows, N its tokens of each. Restoring writes a patch's token to all cells of the
patch, so ``reduce(restore(x)) == x``. Between layers nothing is restored: `GridTokens` are packed tokens that become
(R, N, D) when something reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from aptvit.layers.attention import BlockAttention
from aptvit.patching.layout import Packing, PatchLayout

__all__ = ["GridAttention", "GridCall", "GridPlan", "GridTokens", "current_call", "restored"]

Places = Callable[[int, tuple[int, int], int, int], tuple[Tensor, int]]  # `aptvit.hosts.inner_vit.InnerViT.places`


@dataclass(frozen=True, eq=False)
class GridPlan:
    """Which tokens of a host's rows are kept, and which of these each token is a copy of.

    Attributes:
        shape: (R, N) of the host's rows.
        index: (T,) place of each kept token in the (R N) tokens, in order.
        source: (R N,) number of the kept token that stands for each token.
        patches: (patches,) number of the kept token of each patch, in the order of the layout.
        rows: The sequences of the kept tokens in the rows.
        images: The sequences in images or clips: the same as ``rows`` unless rows are windows.
    """

    shape: tuple[int, int]
    index: Tensor
    source: Tensor
    patches: Tensor
    rows: Packing
    images: Packing

    @classmethod
    def of_layout(cls, layout: PatchLayout, places: Places, rows: int, tokens: int, num_windows: int) -> GridPlan:
        """The plan of a layout. Synchronises with the device once if rows are windows.

        Args:
            layout: The layout of the images.
            places: Where cells are in the host's rows.
            rows: R.
            tokens: N.
            num_windows: Windows along a side of an image.
        """
        place, prefix = places(layout.num_images, layout.grid_sizes[0], rows, tokens)  # (images, h, w)
        kept = torch.zeros(rows, tokens, dtype=torch.long, device=place.device)
        kept[:, :prefix] = 1
        anchors = place[layout.image, layout.row, layout.col]
        kept.view(-1)[anchors] = 1
        number = kept.view(-1).cumsum(0) - 1
        index = torch.nonzero_static(kept.view(-1), size=rows * prefix + layout.num_patches)[:, 0]
        patches, source = number[anchors], number.clone()
        by_layout = number.new_zeros(layout.num_tokens)  # the kept token at each place of the layout's own sequence
        by_layout[layout.patch_index] = patches
        source[place.flatten()] = by_layout[layout.restore_index.flatten()]
        if num_windows == 1:
            per_row = layout.num_images // rows  # images of a clip
            counts = [sum(per_scale) for per_scale in layout.counts]
            lengths = [prefix + sum(counts[i : i + per_row]) for i in range(0, len(counts), per_row)]
            packing = images = Packing.from_seqlens(lengths, place.device, tokens)
        else:
            lengths, per_image = kept.sum(1).tolist(), num_windows**2
            packing = Packing.from_seqlens(lengths, place.device, tokens)
            whole = [sum(lengths[i : i + per_image]) for i in range(0, rows, per_image)]
            images = Packing.from_seqlens(whole, place.device, tokens * per_image)
        return cls((rows, tokens), index, source, patches, packing, images)

    def reduce(self, x: Tensor) -> Tensor:
        """(R, N, D) -> (1, T, D)"""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def restore(self, packed: Tensor) -> Tensor:
        """(1, T, D) -> (R, N, D)"""
        return packed[0].index_select(0, self.source).unflatten(0, self.shape)


@dataclass(eq=False)
class GridCall:
    """One call of a host.

    Attributes:
        owner: Whose call it is.
        options: ``keep=``, ``thresholds=`` and ``max_tokens=`` of this call.
        layout: The layout of the images, computed when they are embedded unless the user gave it.
        is_packed: Whether layers run on packed tokens; False before the embedding, and if nothing is merged.
        packs_always: Whether layers run on packed tokens also if nothing is merged.
        cached: Plans by shape, and what follows from them.
    """

    owner: Any
    options: Any = field(default_factory=dict)
    layout: PatchLayout | None = None
    is_packed: bool = False
    packs_always: bool = False
    cached: dict[Any, Any] = field(default_factory=dict)

    @property
    def plan(self) -> GridPlan:
        """The plan of the layers, which exists once images are embedded."""
        return next(value for value in self.cached.values() if isinstance(value, GridPlan))

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The cached value for a key; ``compute`` makes it if there is none."""
        if key not in self.cached:
            self.cached[key] = compute()
        return self.cached[key]


current_call: ContextVar[GridCall | None] = ContextVar("grid_call", default=None)

_NO_VALUES = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu")
} | {Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.is_complex, Tensor.numel}


class GridTokens(Tensor):
    """(R, N, D) tokens of full grids, held as packed tokens until something reads their values.

    Any operation of PyTorch on them sees the restored (R, N, D); the next layer takes the packed tokens.

    Attributes:
        packed: (1, T, D) kept tokens.
        plan: How they are restored.
    """

    packed: Tensor
    plan: GridPlan
    _restored: Tensor | None

    @staticmethod
    def __new__(cls, packed: Tensor, plan: GridPlan) -> GridTokens:
        shape = (*plan.shape, packed.shape[-1])
        tokens = Tensor._make_wrapper_subclass(cls, shape, dtype=packed.dtype, device=packed.device)
        tokens.packed, tokens.plan, tokens._restored = packed, plan, None
        return tokens

    def restored(self) -> Tensor:
        """(R, N, D), a plain tensor."""
        if self._restored is None:
            self._restored = self.plan.restore(self.packed)
        return self._restored

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*restored(args), **restored(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*restored(args), **restored(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.restored().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.restored().__deepcopy__(memo)


def restored(values: Any) -> Any:
    """The same nest of tuples, lists, dictionaries and outputs, with plain tensors."""
    return tree_map_only(GridTokens, lambda tokens: tokens.restored(), values)


@dataclass(frozen=True, eq=False)
class GridAttention(BlockAttention):
    """Attention of packed tokens, which also reads masks between the tokens of full grids.

    Attributes:
        plan: Which tokens are kept.
    """

    plan: GridPlan | None = None

    def with_mask(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scale: float | None
    ) -> Tensor:
        """Attention with a mask or bias for each pair of tokens of a row, read at the kept tokens.

        Args:
            query: (1, H, T, d) queries.
            key: (1, H, T, d) keys.
            value: (1, H, T, e) values.
            mask: (R or 1, H or 1, N, N) mask or bias.
            dropout: Dropout of the attention weights.
            scale: Factor of the logits.

        Returns:
            (1, H, T, e).

        Raises:
            ValueError: If the mask is not between the tokens of full grids.
        """
        assert self.plan is not None
        (rows, tokens), packing = self.plan.shape, self.plan.rows
        if mask.shape[-2:] != (tokens, tokens) or mask.shape[0] not in (1, rows):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} is not between the {tokens} tokens of {rows} rows")
        longest = packing.max_seqlen
        step = torch.arange(longest, device=query.device)
        valid = step < packing.cu_seqlens.diff()[:, None]  # (R, L)
        number = (packing.cu_seqlens[:-1, None] + step).where(valid, packing.cu_seqlens[:-1, None]).long()
        within = self.plan.index[number] % tokens  # (R, L) place of each token in its row
        q, k, v = (x[0][:, number].transpose(0, 1) for x in (query, key, value))  # (R, H, L, d)
        heads = mask.shape[1]
        bias = mask.expand(rows, -1, -1, -1).gather(2, within[:, None, :, None].expand(-1, heads, -1, tokens))
        bias = bias.gather(3, within[:, None, None].expand(-1, heads, longest, -1))
        if bias.dtype == torch.bool:
            bias = bias & valid[:, None, None]
        else:
            bias = bias.to(query.dtype).masked_fill(~valid[:, None, None], torch.finfo(query.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
        return out.transpose(0, 1)[:, valid][None]
