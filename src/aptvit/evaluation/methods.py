"""Methods by name, and the models that run them.

tome                 at each share of the tokens
tome@8               at a setting of the method: 8 tokens merged in each block
tome-flash           without proportional attention, so that flash kernels can run: the baseline of the paper
apt-entropy          every image keeps the share; patches are scored by entropy, or another scorer
apt-entropy-global   one threshold for all images: busy images keep more
apt-glance+tome      adaptive patches first, then ToMe in three of the blocks to reach the share
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from aptvit.calibration.calibrator import calibrate
from aptvit.encoder.readings import Reading
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.pretrained import Host
from aptvit.merging import ReducedAdaptive, dtem, evit, fit_dtem, random, resize, tome
from aptvit.merging.settings import setting_of_share
from aptvit.models.adaptive_vit import AdaptivePatchTransformer
from aptvit.patching.scoring import get_scorer
from aptvit.scorers import SCORERS
from aptvit.scorers.glance import GlanceScorer, fit_glance
from aptvit.scorers.harm import HarmScorer, fit_harm
from aptvit.scorers.learned import GLANCE
from aptvit.training.samples import Repeatable

__all__ = [
    "DEFAULT_METHODS",
    "SAVED",
    "UNIFORM",
    "Conditions",
    "Method",
    "Prepared",
    "Setup",
    "parse_methods",
    "prepare",
]

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
_DTEM_R = 16  # r of the authors' training


@dataclass(frozen=True, order=True)
class Method:
    """A method that reduces tokens, with its share or its setting.

    Attributes:
        name: One of `BASELINES`, "uniform", "saved" (the adaptive model of a folder, as it is), "apt-SCORER",
            "apt-SCORER-global" or "apt-SCORER+tome".
        keep: Target share of the tokens; None with a setting.
        setting: Setting of the method: tokens merged per block, side of the image in pixels, or EViT's keep rate.
        scales: Number of patch sizes of adaptive patches; 0 for that of all methods.
        area_bias: As for `aptvit.adapt`.
        reading: As for `aptvit.adapt`.
    """

    name: str
    keep: float | None = None
    setting: float | None = None
    scales: int = 0
    area_bias: float = 0.0
    reading: Reading = "resized"

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses adaptive patches."""
        return _ADAPTIVE.fullmatch(self.name) is not None

    def __str__(self) -> str:
        if self.setting is not None:
            return f"{self.name}@{self.setting:g}"
        return self.name if self.keep is None else f"{self.name} at {100 * self.keep:g} %"


UNIFORM, SAVED = Method("uniform"), Method("saved")


def parse_methods(names: Iterable[str], keep: Sequence[float]) -> list[Method]:
    """Parse names of methods.

    Args:
        names: Names, which are run at every share of ``keep``, or ``name@value``. The value is a share for methods that
            keep a share of the patches, and the method's setting for the others.
        keep: Shares of the tokens.

    Returns:
        The methods, without duplicates; the uniform model is the first.

    Raises:
        ValueError: If there is no method of a name, or a value is out of range.
    """
    for share in keep:
        if not 0 < share <= 1:
            raise ValueError(f"keep={share:g} must be a share of the tokens in (0, 1]")
    methods = [UNIFORM]
    for word in names:
        name, at, value = word.strip().partition("@")
        adaptive = _ADAPTIVE.fullmatch(name)
        if adaptive is not None and adaptive["scorer"] not in SCORERS:
            get_scorer(adaptive["scorer"])
        if adaptive is None and name not in (UNIFORM.name, SAVED.name, *BASELINES):
            names = ", ".join((UNIFORM.name, SAVED.name, *BASELINES, "apt-SCORER", "apt-SCORER-global"))
            raise ValueError(f"unknown method {name!r}: use {names} or apt-SCORER+tome, as in apt-entropy")
        if name == SAVED.name:
            methods.append(SAVED)
        elif name != UNIFORM.name:
            methods += [_with_value(name, value)] if at else [Method(name, share) for share in keep]
    methods = list(dict.fromkeys(methods))
    if len(methods) == 1:
        raise ValueError("there is nothing to compare with the uniform model: give at least one method and share")
    return methods


def _with_value(name: str, word: str) -> Method:
    value = float(word) if re.fullmatch(r"\d+(\.\d*)?", word) else math.nan
    if name in _WHOLE_SETTINGS:
        unit = f"{_WHOLE_SETTINGS[name]}, a whole number"
        is_valid = value.is_integer() and value >= (1 if name == "downscale" else 0)
    else:
        unit, is_valid = "a share in (0, 1]", 0 < value <= 1
    if not is_valid:
        raise ValueError(f"{name}@{word}: the value after @ must be a number, {unit}")
    return Method(name, setting=value) if name in (*_WHOLE_SETTINGS, "evit") else Method(name, keep=value)


# Models


@dataclass(frozen=True)
class Conditions:
    """Conditions of all methods.

    Attributes:
        dtype: Type of the computation.
        device: Device of the computation.
        batch_size: Images per batch.
        timed_images: Number of timed images, spread evenly over all images.
        rounds: Timed rounds.
        scales: Number of patch sizes of adaptive models, the base size included.
        max_images: Most images to use, spread evenly; None for all.
        calibration: Files of other images to calibrate and fit methods on; None for the evaluated images.
        fit_steps: Batches that DTEM is fitted on.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch_size: int = 8
    timed_images: int = 64
    rounds: int = 5
    scales: int = 2
    max_images: int | None = None
    calibration: tuple[Path, ...] | None = None
    fit_steps: int = 100

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("timed_images", 1), ("rounds", 1), ("fit_steps", 1), ("scales", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Setup:
    """Inputs of `prepare`: a host, the conditions and images.

    Args:
        host: The uniform model, on its device and in its type.
        conditions: Conditions of all methods.
        samples: Gives normalised batches, at each call from the beginning, to calibrate and fit methods on.

    Attributes:
        vit: The uniform model.
        size: Side of its input in pixels.
        num_patches: Patch tokens of the uniform model.
        num_tokens: Tokens of the uniform model, prefix tokens included.
        fitted_on: The images that methods are fitted on, in words.
    """

    def __init__(self, host: Host, conditions: Conditions, samples: Callable[[], Iterable[Tensor]]) -> None:
        self.host, self.conditions, self.samples = host, conditions, samples
        vit: Any = host.model
        self.vit, self.size = vit, int(host.data["input_size"][-1])
        # NaFlexVit has no grid of its own: images are of the size of its configuration.
        embed = getattr(vit, "patch_embed", None)
        self.grid_size: tuple[int, int] = (
            (self.size // vit.embeds.patch_size[0],) * 2 if embed is None else embed.grid_size
        )
        self.num_patches = math.prod(self.grid_size)
        self.num_tokens = vit.num_prefix_tokens + self.num_patches
        self.fitted_on = "other photos" if conditions.calibration else "these photos"
        self._fitted: dict[tuple[str, str], dict[str, Tensor]] = {}

    @cached_property
    def dtem_metric(self) -> dict[str, Tensor]:
        """State of DTEM's metric, fitted to the uniform model's probabilities by the authors' recipe; for every r."""
        vit = copy.deepcopy(self.vit).float()  # small steps are lost in half precision

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for images in self.samples():
                with torch.no_grad():
                    probabilities = vit(images).softmax(1)  # (B, C, H, W) -> (B, num_classes)
                yield images, probabilities

        reduced = dtem(vit, _DTEM_R)
        # Probabilities are computed in each pass: of all images they could be too many for the memory.
        fit_dtem(reduced, Repeatable(pairs), steps=self.conditions.fit_steps)
        return reduced.reduction.state_dict()

    def fitted(self, scorer: str, reading: Reading) -> dict[str, Tensor]:
        """State of a scorer that is fitted to the uniform model; for every share.

        Args:
            scorer: "glance" or "harm".
            reading: How coarse patches are read, which decides what merging them changes.
        """
        if (scorer, reading) not in self._fitted:
            model = AdaptivePatchTransformer(self.vit, scorer=scorer, reading=reading)
            fit: Any = {GlanceScorer.name: fit_glance, HarmScorer.name: fit_harm}[scorer]
            fit(model, self.samples())
            self._fitted[scorer, reading] = getattr(model, GLANCE).state_dict()
        return self._fitted[scorer, reading]

    def mean_tokens(self, model: Any) -> float:
        """Tokens that enter a block, prefix tokens included: mean over the blocks of a model of `aptvit.merging`."""
        if not hasattr(model, "tokens_per_block"):
            grid_size = model.patch_embed.grid_size if hasattr(model, "patch_embed") else self.grid_size
            return model.num_prefix_tokens + math.prod(grid_size)
        return fmean(model.tokens_per_block(tuple(self.grid_size)))


@dataclass(frozen=True)
class Prepared:
    """A method that is ready to run.

    Attributes:
        model: The model, in eval mode.
        setup: The setup that it is made from.
        setting: Setting of the method, in words.
        size: Side of the input in pixels.
    """

    model: Any
    setup: Setup
    setting: str
    size: int

    def run(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, size, size) in float32 -> logits (B, num_classes)."""
        # Adaptive models choose patches in full precision, and cast by themselves.
        is_adaptive = isinstance(self.model, (AdaptivePatchTransformer, ReducedAdaptive))
        return self.model(images if is_adaptive else images.to(self.setup.conditions.dtype))

    def tokens(self, images: Tensor) -> list[float]:
        """For each image, the tokens that enter a block, prefix tokens included: mean over the blocks."""
        if isinstance(self.model, AdaptivePatchTransformer):
            return list(map(float, self.model.layout(images).seqlens))
        return [self.setup.mean_tokens(self.model)] * len(images)


def prepare(method: Method, setup: Setup) -> Prepared:
    """Build the model of a method.

    Args:
        method: The method.
        setup: The host, the conditions and images.

    Raises:
        ValueError: If the method cannot run on this host, or cannot reach its share.
        ImportError: If a dependency of the method is not installed.
    """
    model, setting = (_adaptive if method.is_adaptive else _baseline)(method, setup)
    # The FLOP counter fails on parameters that require gradients in inference mode.
    model.eval().requires_grad_(False)
    return Prepared(model, setup, setting, model.patch_embed.img_size[0] if method.name == "downscale" else setup.size)


def _at_setting(
    method: Method, setup: Setup, settings: Sequence[Any], build: Callable[[Any], Any], words: Callable[[Any], str]
) -> tuple[Any, str]:
    """The model at the setting of a method, or at the setting whose tokens are nearest to its share.

    Args:
        method: The method.
        setup: The host.
        settings: All settings; the tokens decrease from each to the next.
        build: (setting) -> model.
        words: (setting) -> its description.

    Returns:
        The model and the description of its setting.
    """

    def tokens(setting: Any) -> list[float]:
        return [setup.mean_tokens(build(setting))]

    if method.keep is None:
        setting = type(settings[0])(method.setting)
    else:
        sizes = setup.num_patches, setup.vit.num_prefix_tokens
        setting = setting_of_share(method.name, settings, tokens, method.keep, *sizes)
    return build(setting), words(setting)


def _adaptive(method: Method, setup: Setup) -> tuple[Any, str]:
    parts = _ADAPTIVE.fullmatch(method.name)
    assert parts is not None and method.keep is not None
    # Before ToMe, adaptive patches do half of the reduction, and end at most 16 % of the tokens above its share.
    keep = min((1 + method.keep) / 2, method.keep + 0.16) if parts["merges"] else method.keep
    share: dict[str, Any] = {} if parts["is_global"] else {"keep": keep}
    options: dict[str, Any] = {"scorer": parts["scorer"], "scales": method.scales or setup.conditions.scales, **share}
    options |= {"area_bias": method.area_bias, "reading": method.reading}
    model: Any = AdaptivePatchTransformer(setup.vit, **options)
    fitted = ""
    if parts["scorer"] in (GlanceScorer.name, HarmScorer.name):
        getattr(model, GLANCE).load_state_dict(setup.fitted(parts["scorer"], method.reading))
        fitted = f", {parts['scorer']} fitted on {setup.fitted_on}"
    if parts["is_global"]:
        threshold, *_ = calibrate(model, setup.samples(), keep=keep)  # the same for all scales
        return model, f"threshold {threshold:.4g}, calibrated on {setup.fitted_on}"
    if not parts["merges"]:
        return model, f"{100 * keep:g} % of every photo{fitted}"
    num_tokens, depth = setup.num_tokens - 3 * round((1 - keep) * setup.num_patches / 3), len(setup.vit.blocks)
    schedules = [_three_steps(depth, num_tokens, percent / 100) for percent in range(50)]

    def words(schedule: list[int]) -> str:
        return f"{100 * keep:.0f} % of every photo, then r = {', '.join(str(r) for r in schedule if r)}{fitted}"

    return _at_setting(method, setup, schedules, partial(tome, model.eval()), words)


def _three_steps(depth: int, num_tokens: int, share: float) -> list[int]:
    """Tokens to merge in each block: a share of the tokens after a third, a half and two thirds of the blocks."""
    schedule = [0] * depth
    for block in (depth // 3, depth // 2, 2 * depth // 3):
        schedule[block] = round(share * num_tokens)
        num_tokens -= schedule[block]
    return schedule


def _baseline(method: Method, setup: Setup) -> tuple[Any, str]:
    name, _, variant = method.name.partition("-")
    vit, options = setup.vit, {"prop_attn": variant != "flash"}
    merged = range(setup.num_tokens // 2 + 1)  # tokens in each block
    if name == UNIFORM.name:
        return vit, ""
    if name == SAVED.name:
        if setup.host.adaptive is None:
            raise ValueError("saved is the adaptive model of a folder: give --model a folder, or another method")
        return setup.host.adaptive.to(setup.conditions.device, setup.conditions.dtype), "as saved"
    if not hasattr(vit, "patch_embed"):
        raise ValueError(
            f"{method.name} is for models with one size of images, not for {type(vit).__name__}: compare with uniform, "
            "or give the method another model"
        )
    if name in ("random", "resize"):
        share, scales = method.keep or 1.0, setup.conditions.scales
        model = random(vit, share) if name == "random" else resize(vit, keep=share, scales=scales)
        return model, f"{100 * share:g} % of every photo"
    if name == "tome":
        return _at_setting(method, setup, merged, partial(tome, vit, **options), "r = {}".format)
    if name == "dtem":

        def fitted(r: int) -> Any:
            model = dtem(vit, r, **options)
            model.reduction.load_state_dict(setup.dtem_metric)
            return model

        words = f"r = {{}}, fitted in {setup.conditions.fit_steps} steps on {setup.fitted_on}".format
        return _at_setting(method, setup, merged, fitted, words)
    if name == "evit":
        rates = [percent / 100 for percent in range(100, 0, -1)]
        return _at_setting(method, setup, rates, partial(evit, vit), "keep rate {:g}".format)
    patch = vit.patch_embed.patch_size[0]
    sides = range(setup.size // patch * patch, 0, -patch)
    return _at_setting(method, setup, sides, partial(_resized, setup), "{} px".format)


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
