"""The setting of a baseline that keeps a share of the tokens, and errors that name the setting of each."""

from __future__ import annotations

import functools
import inspect
from bisect import bisect_left
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, ParamSpec, TypeVar

__all__ = ["exclusive_setting", "names_setting", "num_kept_of", "setting_of_share"]

Setting = TypeVar("Setting")
Parameters = ParamSpec("Parameters")
Model = TypeVar("Model")

_TOLERANCE = 0.05  # share of the tokens: a method that cannot go below 51 % still runs at 50 %
_SETTINGS = {
    "tome": "r",
    "dtem": "r",
    "evit": "rate",
    "random": "keep",
    "pixelprune": "tolerance",
    "downscale": "size",
    "resize": "thresholds",
}


def setting_of_share(
    method: str,
    settings: Sequence[Setting],
    tokens_per_block: Callable[[Setting], Sequence[float]],
    keep: float,
    num_patches: int,
    num_prefix_tokens: int,
) -> Setting:
    """The setting whose mean number of patch tokens over the blocks is nearest to a share.

    Args:
        method: Name of the method, for the error message.
        settings: All settings; the tokens decrease from each to the next.
        tokens_per_block: (setting) -> tokens that enter each block, prefix tokens included.
        keep: Share of the patch tokens, mean over the blocks.
        num_patches: Patch tokens of the uniform model.
        num_prefix_tokens: Prefix tokens of an image.

    Raises:
        ValueError: If the share is out of range, or no setting is as low.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r} must be a share of the patch tokens in (0, 1]")

    def mean(setting: Setting) -> float:
        return fmean(tokens_per_block(setting))

    target, num_tokens = num_prefix_tokens + keep * num_patches, num_prefix_tokens + num_patches
    least = mean(settings[-1])
    if least > target + _TOLERANCE * num_tokens:
        raise ValueError(f"{method} cannot go down to {keep:.0%} of the tokens, only to {least / num_tokens:.0%}")
    place = bisect_left(settings, -target, key=lambda setting: -mean(setting))
    return min(settings[max(0, place - 1) : place + 1], key=lambda setting: abs(mean(setting) - target))


def exclusive_setting(name: str, value: Any, keep: float | None, default: Any = None) -> Any:
    """The value of a method's own setting, its default, or None where ``keep`` decides.

    Raises:
        ValueError: If both are given, or neither and there is no default.
    """
    if value is not None and keep is not None:
        raise ValueError(f"give {name}={value!r} or keep={keep!r}, not both: each decides the number of tokens")
    if value is None and keep is None and default is None:
        raise ValueError(f"give {name}=, or keep=, the share of the patch tokens")
    return default if value is None and keep is None else value


def num_kept_of(keep: float, num_patches: int) -> int:
    """Number of patches of a share, at least one."""
    return max(1, round(keep * num_patches))


def names_setting(build: Callable[Parameters, Model]) -> Callable[Parameters, Model]:
    """Let a baseline refuse the settings of other baselines by the name of its own."""
    setting = _SETTINGS[build.__name__]
    foreign = {*_SETTINGS.values()} - {setting, "keep", *inspect.signature(build).parameters}

    @functools.wraps(build)
    def checked(*args: Parameters.args, **options: Parameters.kwargs) -> Model:
        for name in sorted(foreign.intersection(options)):
            raise ValueError(
                f"aptvit.merging.{build.__name__} has no {name}={options[name]!r}: its own setting is {setting}=, and "
                "keep= is the share of the patch tokens for every method"
            )
        return build(*args, **options)

    return checked
