"""Which of timm's models can be adapted, and lists of models of any library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aptvit.hosts.timm_host import reason_not_adaptable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ModelEntry",
    "NoInitialValues",
    "as_markdown",
    "as_table",
    "describe_model",
    "matching",
    "model_names",
    "traits_of",
]

_COLUMNS = ("image", "patch", "width", "blocks", "head size", "prefix tokens", "positions", "pooling")


@dataclass(frozen=True)
class ModelEntry:
    """A model of timm or open_clip, or a class of transformers.

    Attributes:
        name: Name for ``create_model``, or of the class.
        reason: Why it cannot be adapted; None if it can.
        traits: Image and patch size, positions, pooling, ... by name; empty if it cannot be adapted.
        library: "timm", "transformers" or "open_clip".
    """

    name: str
    reason: str | None
    traits: dict[str, str]
    library: str = "timm"


# timm's modules of Vision Transformers and similar models.
_FAMILIES = (
    *("vision_transformer", "deit", "eva", "vision_transformer_relpos", "vision_transformer_hybrid"),
    *("vision_transformer_sam", "beit", "cait", "naflexvit", "vitamin"),
)


def model_names(pattern: str = "*") -> list[str]:
    """Names of timm's Vision Transformers that match a pattern, whether or not they can be adapted."""
    return matching({name for module in _FAMILIES for name in timm.list_models(module=module)}, pattern)


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Names that match a pattern with *, or have it in them, in any case; sorted."""
    pattern = (pattern if "*" in pattern else f"*{pattern}*").lower()
    return sorted(name for name in names if fnmatchcase(name.lower(), pattern))


class NoInitialValues(TorchFunctionMode):
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
    with torch.device("meta"), NoInitialValues():
        host = timm.create_model(name, pretrained=False)
    reason = reason_not_adaptable(host)
    return ModelEntry(name, reason, {} if reason else traits_of(host))


def traits_of(host: Any) -> dict[str, str]:
    """Traits of an adaptable model of timm, in words."""
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
    """A table of the adaptable models with their traits; with ``include_refused`` also the others, with reasons.

    Args:
        entries: Models of one library, at least one.
        include_refused: Whether to list models that cannot be adapted.
    """
    from rich.table import Table

    adaptable = [entry for entry in entries if entry.reason is None]
    title = f"{entries[0].library}: {len(adaptable)} of {len(entries)} models can be adapted"
    table = Table(title=title, box=None, header_style="bold")
    for column in ("name", *_COLUMNS):
        table.add_column(column, no_wrap=column == "name")
    for entry in adaptable:
        table.add_row(entry.name, *(entry.traits.get(column, "") for column in _COLUMNS))
    if include_refused:
        for entry in entries:
            if entry.reason is not None:
                table.add_row(entry.name, f"no: {entry.reason}", style="dim")
    return table


def as_markdown(entries: Sequence[ModelEntry]) -> str:
    """The text of docs/reference/models.md.

    Args:
        entries: Models of all libraries.
    """
    lines = ["# Models", "", "What `aptvit.adapt` takes, made by `aptvit models --markdown`."]
    for library, about in _ABOUT.items():
        of_library = [entry for entry in entries if entry.library == library]
        adaptable = [entry for entry in of_library if entry.reason is None]
        if not of_library:
            continue
        columns = [column for column in _COLUMNS if any(entry.traits.get(column) for entry in adaptable)]
        numbers = f"{len(adaptable)} of {len(of_library)} {about}"
        lines += ["", f"## {library} {version(_PACKAGES.get(library, library))}", "", numbers, ""]
        lines += [f"| name | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines += [f"| `{e.name}` | {' | '.join(e.traits.get(column, '') for column in columns)} |" for e in adaptable]
        lines += ["", f"Not adaptable of {library}:", "", "| name | because |", "|---|---|"]
        lines += [f"| `{e.name}` | {e.reason} |" for e in of_library if e.reason is not None]
    return "\n".join(lines)


_PACKAGES = {"open_clip": "open_clip_torch"}
_ABOUT = {
    "timm": "names of Vision Transformers can be adapted.",
    "transformers": "classes for images and clips have a structure that can be adapted, most with their default "
    "configuration, UperNet and Mask2Former on a Dinov2 backbone. `adapt` compares the model with its host; [compared "
    "in tests](../hosts.md).",
    "open_clip": "names can be adapted: their VisionTransformer, or a model of timm.",
}
