"""The methods by name: what a person writes, and what runs.

tome                 at each share of the tokens that is asked for
tome@8               at a setting of the method: 8 tokens merged in each block
tome-flash           without proportional attention, so that flash kernels can run: what the paper compares with
apt-entropy          every photo keeps that share; scored by entropy, or whatever scorer is named
apt-entropy-global   one threshold for all photos: busy ones keep more
apt-glance+tome      adaptive patches first, then ToMe in three of the blocks to reach the share
"""

from __future__ import annotations

import copy
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aptvit.calibration.calibrator import calibrate
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.pretrained import Host
from aptvit.merging import ReducedAdaptive, dtem, evit, fit_dtem, random, resize, tome
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.scoring import get_scorer
from aptvit.scorers import SCORERS
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.scorers.learned import GLANCE

__all__ = [
    *("BASELINES", "DEFAULT_METHODS", "UNIFORM", "Conditions", "Method", "Prepared", "Setup", "parse_methods"),
    "prepare",
]

T = TypeVar("T")

BASELINES = ("random", "resize", "downscale", "tome", "tome-flash", "evit", "dtem", "dtem-flash")
DEFAULT_METHODS = (
    *("apt-glance+tome", "apt-glance", "apt-embedding", "apt-entropy", "apt-entropy-global"),
    *("random", "downscale", "tome", "evit"),
)

_ADAPTIVE = re.compile(r"apt-(?P<scorer>\w+?)(?P<is_global>-global)?(?P<merges>\+tome)?")
_WHOLE_SETTINGS = {
    "downscale": "a side in pixels",
    **dict.fromkeys(("tome", "tome-flash", "dtem", "dtem-flash"), "tokens to merge in each block"),
}
_TOLERANCE = 0.05  # share of the tokens: a method that cannot go below 51 % still answers when 50 % are asked for
_DTEM_R = 16  # what its authors train with


@dataclass(frozen=True, order=True)
class Method:
    """A way to spend fewer tokens, and how far it goes.

    Attributes:
        name: One of `BASELINES`, "uniform", "apt-SCORER", "apt-SCORER-global" or "apt-SCORER+tome".
        keep: Share of the tokens asked for; None where ``setting`` is given.
        setting: Of the method: tokens merged per block, the side of the image, EViT's keep rate.
    """

    name: str
    keep: float | None = None
    setting: float | None = None

    @property
    def is_adaptive(self) -> bool:
        return _ADAPTIVE.fullmatch(self.name) is not None

    def __str__(self) -> str:
        if self.setting is not None:
            return f"{self.name}@{self.setting:g}"
        return self.name if self.keep is None else f"{self.name} at {100 * self.keep:g} %"


UNIFORM = Method("uniform")


def parse_methods(names: Iterable[str], keep: Sequence[float]) -> list[Method]:
    """Methods from names as a person writes them; the uniform model is always the first.

    Args:
        names: Each a name, which is run at every share of ``keep``, or ``name@value``. The value is a share for those
            that keep a share of the patches, and the method's setting for the others.
        keep: Shares of the tokens.

    Raises:
        ValueError: If there is no method of that name, or a value is out of range.
    """
    for share in keep:
        if not 0 < share <= 1:
            raise ValueError(f"keep={share:g} must be a share of the tokens in (0, 1]")
    methods = [UNIFORM]
    for word in names:
        name, at, value = word.strip().partition("@")
        _check_name(name)
        if name != UNIFORM.name:
            methods += [_with_value(name, value)] if at else [Method(name, share) for share in keep]
    methods = list(dict.fromkeys(methods))
    if len(methods) == 1:
        raise ValueError("there is nothing to compare with the uniform model: give at least one method and share")
    return methods


def _check_name(name: str) -> None:
    adaptive = _ADAPTIVE.fullmatch(name)
    if adaptive is not None:
        if adaptive["scorer"] not in SCORERS:
            get_scorer(adaptive["scorer"])
    elif name not in (*BASELINES, UNIFORM.name):
        names = ", ".join((UNIFORM.name, *BASELINES))
        raise ValueError(
            f"unknown method {name!r}: use {names}, apt-SCORER, apt-SCORER-global or apt-SCORER+tome, as in apt-entropy"
        )


def _with_value(name: str, word: str) -> Method:
    try:
        value = float(word)
    except ValueError:
        raise ValueError(f"{name}@{word}: what follows @ must be a number") from None
    if name in _WHOLE_SETTINGS:
        if not value.is_integer() or value < (1 if name == "downscale" else 0):
            raise ValueError(f"{name}@{word}: what follows @ is {_WHOLE_SETTINGS[name]}, a whole number")
        return Method(name, setting=value)
    if not 0 < value <= 1:
        raise ValueError(f"{name}@{word}: what follows @ is a share in (0, 1]")
    return Method(name, setting=value) if name == "evit" else Method(name, keep=value)


# From a name to something that runs


@dataclass(frozen=True)
class Conditions:
    """How all methods run.

    Attributes:
        dtype: Type to compute in.
        device: Device to compute on.
        batch_size: Images per batch.
        timed_photos: Images that are timed, spread evenly over all of them.
        rounds: Timed rounds.
        scales: Patch sizes of adaptive models, the base size included.
        max_photos: Use at most that many images, spread evenly.
        calibration: Other images, for methods that need some before; those that are measured if None.
        fit_steps: Batches of these that a method is fitted on (DTEM; nothing else here is trained).
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int = 8
    timed_photos: int = 64
    rounds: int = 5
    scales: int = 2
    max_photos: int | None = None
    calibration: tuple[Path, ...] | None = None
    fit_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "timed_photos", "rounds", "fit_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.scales < 2:
            raise ValueError(f"scales={self.scales} must be at least 2: one scale merges nothing")


@dataclass(frozen=True)
class Setup:
    """What methods are made from.

    Attributes:
        host: The uniform model, on its device and in its type.
        conditions: How all methods run.
        samples: Gives normalised batches, as often as wished, for methods that need images before: to calibrate, to
            fit.
    """

    host: Host
    conditions: Conditions
    samples: Callable[[], Iterable[Tensor]]

    @property
    def vit(self) -> Any:
        return self.host.model

    @property
    def size(self) -> int:
        """Side of the image in pixels."""
        return self.host.data["input_size"][-1]

    @property
    def num_patches(self) -> int:
        return math.prod(self.vit.patch_embed.grid_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of the uniform model, prefix tokens included."""
        return self.vit.num_prefix_tokens + self.num_patches

    @property
    def fitted_on(self) -> str:
        return "other photos" if self.conditions.calibration else "these photos"

    @cached_property
    def dtem_metric(self) -> dict[str, Tensor]:
        """What DTEM compares tokens by, fitted to the uniform model's answers by its authors' recipe, at their r.

        It is fitted once and serves every r.
        """
        vit = copy.deepcopy(self.vit).float()  # small steps are lost in half precision
        reduced = dtem(vit, _DTEM_R)
        fit_dtem(reduced, _WithAnswers(vit, self.samples()), steps=self.conditions.fit_steps)
        metric: dict[str, Tensor] = reduced.reduction.state_dict()
        return metric

    @cached_property
    def glance(self) -> dict[str, Tensor]:
        """Weights of a glance scorer, fitted to the model; they serve every share."""
        model = AdaptivePatchTransformer(self.vit, scorer=GlanceScorer.name)
        fit_glance(model, self.samples())
        state: dict[str, Tensor] = getattr(model, GLANCE).state_dict()
        return state

    def mean_tokens(self, model: Any) -> float:
        """Tokens that enter a block, prefix tokens included: mean over the blocks of a model of `aptvit.merging`."""
        if not hasattr(model, "tokens_per_block"):
            return model.num_prefix_tokens + math.prod(model.patch_embed.grid_size)
        return fmean(model.tokens_per_block(tuple(self.vit.patch_embed.grid_size)))


class _WithAnswers:
    """Batches with the answers of a model, computed anew in each pass: kept in memory they could be too many."""

    def __init__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        self.model, self.batches = model, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images in self.batches:
            with torch.no_grad():
                answers = self.model(images).softmax(1)  # (B, C, H, W) -> (B, num_classes)
            yield images, answers


@dataclass(frozen=True)
class Prepared:
    """A method that is ready to run.

    Attributes:
        model: What runs.
        run: Normalised images (B, C, size, size) -> logits (B, classes).
        size: Side of the images that it reads, in pixels.
        setting: What was set, in words.
        tokens: Tokens that enter a block, prefix tokens included, for each image of a batch: the mean over the blocks.
    """

    model: nn.Module
    run: Callable[[Tensor], Tensor]
    size: int
    setting: str
    tokens: Callable[[Tensor], list[float]]


def prepare(method: Method, setup: Setup) -> Prepared:
    """Build a method for a host.

    Args:
        method: Which one, and how far it is to go.
        setup: The host, and what else methods are made from.

    Raises:
        ValueError: If the method cannot run on this host, or cannot go that far.
        ImportError: If what it needs is not installed.
    """
    return (_adaptive if method.is_adaptive else _baseline)(method, setup)


def _ready(model: Any, setup: Setup, setting: str) -> Prepared:
    """A model that runs, and counts its tokens."""
    # FLOP counters fail on parameters that want a gradient in inference mode.
    model.eval().requires_grad_(False)
    varies = isinstance(model, AdaptivePatchTransformer)

    def run(images: Tensor) -> Tensor:
        # Adaptive models choose patches by the pixels as they are, not rounded to half precision.
        return model(images if varies or isinstance(model, ReducedAdaptive) else images.to(setup.conditions.dtype))

    def tokens(images: Tensor) -> list[float]:
        return list(map(float, model.layout(images).seqlens)) if varies else [setup.mean_tokens(model)] * len(images)

    return Prepared(model, run, setup.size, setting, tokens)


def _at_setting(
    method: Method, setup: Setup, settings: Sequence[T], build: Callable[[T], Any], words: Callable[[T], str]
) -> Prepared:
    """A method whose tokens follow from a setting: the one that was given, or the nearest to the share asked for.

    Args:
        method: The method.
        setup: The host.
        settings: All there are; tokens fall from one to the next.
        build: Makes the model.
        words: Describes the setting.
    """

    def tokens(setting: T) -> float:
        return setup.mean_tokens(build(setting))

    setting: Any = method.setting
    if setting is not None:
        setting = type(settings[0])(setting)  # type: ignore[call-arg]
    else:
        assert method.keep is not None
        wanted = setup.vit.num_prefix_tokens + method.keep * setup.num_patches
        least = tokens(settings[-1])
        if least > wanted + _TOLERANCE * setup.num_tokens:
            raise ValueError(
                f"{method.name} cannot go down to {method.keep:.0%} of the tokens on this model: "
                f"{least / setup.num_tokens:.0%} is the least"
            )
        place = bisect_left(settings, -wanted, key=lambda setting: -tokens(setting))
        setting = min(settings[max(0, place - 1) : place + 1], key=lambda setting: abs(tokens(setting) - wanted))
    return _ready(build(setting), setup, words(setting))


# Adaptive patches


def _adaptive(method: Method, setup: Setup) -> Prepared:
    parts = _ADAPTIVE.fullmatch(method.name)
    assert parts is not None and method.keep is not None
    # Before ToMe, adaptive patches go half of the way, at most to 16 % of the tokens above its end.
    keep = min((1 + method.keep) / 2, method.keep + 0.16) if parts["merges"] else method.keep
    share: dict[str, Any] = {} if parts["is_global"] else {"keep": keep}
    model: Any = AdaptivePatchTransformer(setup.vit, scales=setup.conditions.scales, scorer=parts["scorer"], **share)
    fitted = ""
    if isinstance(model.patchifier.scorer, GlanceScorer):
        getattr(model, GLANCE).load_state_dict(setup.glance)
        fitted = f", glance fitted on {setup.fitted_on}"
    if parts["is_global"]:
        thresholds = calibrate(model, setup.samples(), keep=keep)
        # One threshold serves all scales.
        return _ready(model, setup, f"threshold {thresholds[0]:.4g}, calibrated on {setup.fitted_on}")
    if not parts["merges"]:
        return _ready(model, setup, f"{100 * keep:g} % of every photo{fitted}")
    num_tokens, depth = setup.num_tokens - 3 * round((1 - keep) * setup.num_patches / 3), len(setup.vit.blocks)
    schedules = [_three_steps(depth, num_tokens, percent / 100) for percent in range(50)]

    def words(schedule: list[int]) -> str:
        return f"{100 * keep:.0f} % of every photo, then r = {', '.join(str(r) for r in schedule if r)}{fitted}"

    return _at_setting(method, setup, schedules, partial(tome, model.eval()), words)


def _three_steps(depth: int, num_tokens: int, share: float) -> list[int]:
    """Tokens to merge in each block: this share of those left after a third, a half and two thirds of the blocks."""
    schedule = [0] * depth
    for block in (depth // 3, depth // 2, 2 * depth // 3):
        schedule[block] = round(share * num_tokens)
        num_tokens -= schedule[block]
    return schedule


# Baselines


def _baseline(method: Method, setup: Setup) -> Prepared:
    name, _, variant = method.name.partition("-")
    vit, proportional = setup.vit, variant != "flash"
    merged = range(setup.num_tokens // 2 + 1)  # tokens in each block
    if name == UNIFORM.name:
        return _ready(vit, setup, "")
    if name in ("random", "resize"):
        share, scales = method.keep or 1.0, setup.conditions.scales
        model = random(vit, share) if name == "random" else resize(vit, keep=share, scales=scales)
        return _ready(model, setup, f"{100 * share:g} % of every photo")
    if name == "tome":
        return _at_setting(method, setup, merged, partial(tome, vit, prop_attn=proportional), "r = {}".format)
    if name == "dtem":

        def fitted(r: int) -> Any:
            model = dtem(vit, r, prop_attn=proportional)
            model.reduction.load_state_dict(setup.dtem_metric)
            return model

        words = f"r = {{}}, fitted in {setup.conditions.fit_steps} steps on {setup.fitted_on}".format
        return _at_setting(method, setup, merged, fitted, words)
    if name == "evit":
        rates = [percent / 100 for percent in range(100, 0, -1)]
        return _at_setting(method, setup, rates, partial(evit, vit), "keep rate {:g}".format)
    patch = vit.patch_embed.patch_size[0]
    sides = range(setup.size // patch * patch, 0, -patch)
    prepared: Any = _at_setting(method, setup, sides, partial(_resized, setup), "{} px".format)
    return replace(prepared, size=prepared.model.patch_embed.img_size[0])


def _resized(setup: Setup, side: int) -> Any:
    """The host for smaller images: `aptvit.merging.downscale` with positions resampled once, not in each forward."""
    patch = setup.vit.patch_embed.patch_size[0]
    if side > setup.size or side % patch:
        raise ValueError(f"an image of {side} pixels is no multiple of the patches of {patch} up to {setup.size}")
    vit: Any = share_parameters(setup.vit)
    if not hasattr(vit, "set_input_size"):
        raise ValueError(f"a {type(vit).__name__} is built for one size and cannot read smaller images")
    vit.set_input_size(img_size=side)
    return vit
