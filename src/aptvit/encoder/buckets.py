"""Padding of packed sequences to a multiple of tokens, so that compiled code and CUDA graphs meet few shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aptvit.encoder.encoder import BlockOutputs, Encoder, Request, Tokens, collect
from aptvit.layers.attention import AttentionPlan, Segments
from aptvit.layers.cuda_graphs import BlockGraphs
from aptvit.layers.position_embed import Rotation
from aptvit.patching.layout import Packing

__all__ = ["GraphedBlocks", "TokenBucket", "pad_plan"]


@dataclass(frozen=True)
class TokenBucket:
    """Pads packed sequences to a multiple of tokens.

    Attributes:
        multiple: Lengths are padded to a multiple of this many tokens.
    """

    multiple: int

    def padded(self, tokens: Tokens, plan: AttentionPlan) -> tuple[Tokens, AttentionPlan]:
        """Append a segment of padding to tokens and their plan.

        A plain batch whose length is a multiple already stays unchanged.

        Args:
            tokens: (1, T, D) tokens.
            plan: The plan of the tokens.
        """
        num_padding, rotation = -tokens.x.shape[1] % self.multiple, tokens.rotation
        if num_padding == 0 and plan.key_index is None and all(part.is_dense for part in plan.segments):
            return tokens, plan
        fill = (0, 0, 0, num_padding)
        if rotation is not None:
            in_windows = None if rotation.in_windows is None else F.pad(rotation.in_windows, fill)
            rotation = Rotation(F.pad(rotation.globally, fill), in_windows)
        return Tokens(F.pad(tokens.x, fill), rotation), pad_plan(plan, num_padding, self.multiple)

    def cut(self, outputs: BlockOutputs, num_tokens: int) -> BlockOutputs:
        """Outputs without padding: of the first ``num_tokens`` tokens."""
        intermediates = {number: x[:, :num_tokens] for number, x in outputs.intermediates.items()}
        recorded = [[tensor[:, :, :num_tokens] for tensor in block] for block in outputs.recorded]
        return BlockOutputs(outputs.x[:, :num_tokens], intermediates, recorded)


def pad_plan(plan: AttentionPlan, num_tokens: int, multiple: int) -> AttentionPlan:
    """Append a segment of padding to a plan.

    Args:
        plan: The plan of the tokens.
        num_tokens: Tokens of the segment, 0 or more.
        multiple: The numbers of keys and of cached keys are padded to a multiple of this, too.
    """
    if plan.key_index is None:
        images, *windows = (segments.queries.padded(num_tokens) for segments in plan.segments)
        return AttentionPlan.of_tokens(images, windows[0] if windows else None, _pad(plan.key_bias, num_tokens))
    num_keys = multiple - plan.key_index.shape[0] % multiple  # at least one: each query has a key to attend to
    whole, *parts = (Segments(part.queries.padded(num_tokens), part.keys.padded(num_keys)) for part in plan.segments)
    index, cached = plan.key_index, plan.cached
    if cached is not None:
        num_cached = cached[0][0][0].shape[2]
        if num_gap := -num_cached % multiple:  # padding between cached keys and keys of the tokens
            index = index + num_gap * (index >= num_cached)
            fill = (0, 0, 0, num_gap)
            cached = [[(F.pad(key, fill), F.pad(value, fill)) for key, value in block] for block in cached]
    return AttentionPlan(
        whole, parts[0] if parts else None, _pad(plan.key_bias, num_keys), _pad(index, num_keys), cached
    )


class GraphedBlocks(BlockGraphs):
    """CUDA graphs of all blocks. A graph serves all lengths up to a maximum: it reads the lengths on the device."""

    def run(self, encoder: Encoder, tokens: Tokens, plan: AttentionPlan | None, request: Request) -> BlockOutputs:
        """Arguments as for `aptvit.encoder.encoder.Encoder.run`."""
        if tokens.x.numel() == 0:  # nothing to record
            return collect(tokens.x, encoder.steps(tokens, plan, request), request.indices)
        limits: list[tuple[int, bool]] = []
        if plan is not None:
            plan, limits = _bounded(plan, 1 if encoder.bucket is None else encoder.bucket.multiple)

        def run(x: Tensor, globally: Tensor | None, in_windows: Tensor | None, plan: AttentionPlan | None) -> tuple:
            rotation = None if globally is None else Rotation(globally, in_windows)
            outputs = collect(x, encoder.steps(Tokens(x, rotation), plan, request), request.indices)
            return outputs.x, outputs.intermediates, outputs.recorded

        key = (request, tuple(limits), torch.is_autocast_enabled(tokens.x.device.type))
        rotation = tokens.rotation
        rotations = (None, None) if rotation is None else (rotation.globally, rotation.in_windows)
        return BlockOutputs(*self(key, run, tokens.x, *rotations, plan))


def _bounded(plan: AttentionPlan, multiple: int) -> tuple[AttentionPlan, list[tuple[int, bool]]]:
    """Round the greatest lengths of a plan up to a multiple.

    Returns:
        The plan, and for each packing its greatest length and whether it is a plain batch, for the key of a graph.
    """
    limits: list[tuple[int, bool]] = []

    def bounded(packing: Packing) -> Packing:
        limits.append((packing.max_seqlen + -packing.max_seqlen % multiple, packing.is_dense))
        return replace(packing, max_seqlen=limits[-1][0])

    images, *windows = (Segments(bounded(segments.queries), bounded(segments.keys)) for segments in plan.segments)
    return replace(plan, images=images, windows=windows[0] if windows else None), limits


def _pad(values: Tensor | None, length: int) -> Tensor | None:
    return None if values is None else F.pad(values, (0, length))
