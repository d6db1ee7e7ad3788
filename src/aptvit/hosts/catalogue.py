"""Which of timm's models can be adapted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aptvit.hosts.timm_host import reason_not_adaptable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ModelEntry", "as_markdown", "as_table", "describe_model", "model_names"]

_COLUMNS = ("image", "patch", "width", "blocks", "head size", "prefix tokens", "positions", "pooling")


@dataclass(frozen=True)
class ModelEntry:
    """One of timm's models.

    Attributes:
        name: Name for ``timm.create_model``.
        reason: Why it cannot be adapted; None if it can.
        traits: Image and patch size, positions, pooling, ... by name; empty if it cannot be adapted.
    """

    name: str
    reason: str | None
    traits: dict[str, str]


# timm's modules of Vision Transformers and similar models.
_FAMILIES = (
    *("vision_transformer", "deit", "eva", "vision_transformer_relpos", "vision_transformer_hybrid"),
    *("vision_transformer_sam", "beit", "cait", "naflexvit", "vitamin"),
)


def model_names(pattern: str = "*") -> list[str]:
    """Names of timm's Vision Transformers that match a pattern, whether or not they can be adapted."""
    names = {name for module in _FAMILIES for name in timm.list_models(module=module)}
    return sorted(names & set(timm.list_models(pattern if "*" in pattern else f"*{pattern}*")))


class _NoInitialValues(TorchFunctionMode):
    """Skips initialisation of tensors on the meta device, which takes most of the time of building a model there."""

    _SKIPPED = frozenset(
        ("uniform_", "normal_", "erfinv_", "fill_", "zero_", "copy_", "mul_", "div_", "add_", "clamp_")
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in self._SKIPPED and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def describe_model(name: str) -> ModelEntry:
    """Whether a timm model can be adapted, found by building it on the meta device."""
    with torch.device("meta"), _NoInitialValues():
        host = timm.create_model(name, pretrained=False)
    reason = reason_not_adaptable(host)
    return ModelEntry(name, reason, {} if reason else _traits(host))


def _traits(host: Any) -> dict[str, str]:
    rope: Any = getattr(host, "rope", None)
    is_naflex = not hasattr(host, "patch_embed")  # NaFlexVit: images of any size
    embed: Any = host.embeds if is_naflex else host.patch_embed
    if is_naflex:
        positions = [] if embed.pos_embed_type == "none" else [embed.pos_embed_type]
    else:
        positions = ["absolute"] if host.pos_embed is not None else []
    if rope is not None:
        positions.append(f"rotary ({type(rope).__name__.removeprefix('RotaryEmbedding').lower() or 'axial'})")
    attention = next(m for m in host.blocks.modules() if hasattr(m, "fused_attn"))
    head_dim = getattr(attention, "head_dim", None) or host.embed_dim // attention.num_heads
    height, width = getattr(embed, "img_size", None) or (0, 0)
    return {
        "image": "any" if not height else f"{height}" if height == width else f"{height}x{width}",
        "patch": str(embed.patch_size[0]),
        "width": str(host.embed_dim),
        "blocks": f"{len(host.blocks)} {type(host.blocks[0]).__name__}",
        "head size": str(head_dim),
        "prefix tokens": str(host.num_prefix_tokens),
        "positions": " + ".join(positions) or "none",
        "pooling": host.global_pool or "none",
    }


def as_table(entries: Sequence[ModelEntry], include_refused: bool = False) -> Table:
    """A table of the adaptable models with their traits; with ``include_refused`` also the others, with reasons."""
    from rich.table import Table

    adaptable = [entry for entry in entries if entry.reason is None]
    table = Table(title=f"{len(adaptable)} of {len(entries)} models can be adapted", box=None, header_style="bold")
    for column in ("name", *_COLUMNS):
        table.add_column(column, no_wrap=column == "name")
    for entry in adaptable:
        table.add_row(entry.name, *(entry.traits[column] for column in _COLUMNS))
    if include_refused:
        for entry in entries:
            if entry.reason is not None:
                table.add_row(entry.name, f"no: {entry.reason}", style="dim")
    return table


def as_markdown(entries: Sequence[ModelEntry]) -> str:
    """The text of docs/reference/models.md."""
    adaptable = [entry for entry in entries if entry.reason is None]
    lines = [
        "# Models",
        "",
        f"Made by `aptvit models --markdown` with timm {timm.__version__}: {len(adaptable)} of {len(entries)} names of "
        "Vision Transformers can be adapted.",
        "",
        f"| name | {' | '.join(_COLUMNS)} |",
        f"|---|{'---|' * len(_COLUMNS)}",
    ]
    lines += [f"| `{e.name}` | {' | '.join(e.traits[column] for column in _COLUMNS)} |" for e in adaptable]
    lines += ["", "## Not adaptable", "", "| name | because |", "|---|---|"]
    lines += [f"| `{e.name}` | {e.reason} |" for e in entries if e.reason is not None]
    return "\n".join(lines)
