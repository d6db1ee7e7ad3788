"""Recipes: everything that a training depends on besides model and data, as one readable YAML each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

__all__ = ["RECIPES", "Recipe", "load_recipe"]

RECIPES = (
    *("full", "short", "adapters", "distill", "heal"),
    *("detector", "detector-short", "detector-heal", "detector-choose"),
    *("segmenter", "segmenter-short", "segmenter-heal", "segmenter-choose"),
)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The YAML files in ``aptvit/training/recipes`` say why each value is what it is.

    Attributes:
        method: ``"apt"``; or what to compare it with: ``"uniform"``, ``"random"``, ``"resize"``, ``"downscale"``,
            ``"tome"``.
        objective: ``"labels"``; ``"distill"``: the uniform model as it was teaches, no labels are read; ``"boxes"``:
            objects in pictures; ``"pixels"``: a class for each.
        trains: ``"all"`` parameters; only the ``"new"`` ones of the method, and those of a classifier for new classes;
            or, of boxes and pixels, these and the ``"heads"`` around the pretrained model.
        keep: Share of the patch tokens.
        keep_also: Further shares that are trained in turn with ``keep``, so that one model serves them all.
        per_image: Every image keeps that share; otherwise thresholds are calibrated on the training images.
        blend: Of such thresholds: how far each image's number of tokens is from what they give it on the way to the
            share, see `aptvit.patching.budget.Budget`.
        thresholds: Thresholds to use instead of a share.
        scales: Patch sizes, the base size included, where no thresholds are given.
        scorer: As for `aptvit.adapt`.
        init: How the sub-patch branch starts (Table 7b).
        resize_only: No sub-patch branch.
        area_bias: How much the logarithm of a patch's area adds to its logits as a key, as for `aptvit.adapt`.
        recalibrate: Solve the thresholds again after every so many updates; 0 for never.
        epochs: Passes over the images; 0 trains nothing: patches are chosen, and the network is evaluated and written.
        max_steps: Updates at which to end, whatever ``epochs`` says; 0 for no such limit.
        max_minutes: Minutes of training after which to end; the schedule follows the clock then. 0 for no limit.
        batch_size: Images of an update, of all processes together.
        micro_batch_size: Images at a time on a process; an update sums over them. 0 for all at once.
        optimizer: A name of timm's.
        lr: Peak learning rate, for ``lr_batch`` images.
        lr_batch: The learning rate grows in proportion to ``batch_size / lr_batch``; 0 leaves it as it is.
        min_lr: Where the cosine ends, as a share of the peak.
        warmup: Share of the updates in which the learning rate rises.
        weight_decay: Of matrices; biases, norms and positions have none.
        betas: Of Adam.
        layer_decay: Factor from each layer to the one below.
        new_lr: Factor for the new parameters, in place of layer decay.
        clip: Largest norm of the gradient; 0 for any.
        ema: Decay of an average of the weights; 0 for none.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        drop_path: Rate of stochastic depth in the last block.
        crop: Smallest share of a picture that a random crop holds; 1 for the evaluation transform.
        flip: Probability of a mirror image.
        auto_augment: timm's string, such as ``rand-m9-mstd0.5-inc1``; empty for none.
        color_jitter: Strength, where ``auto_augment`` is empty.
        erasing: Probability of random erasing.
        temperature: Of the teacher's answers.
        logits_weight: Weight of the divergence from the teacher's answers.
        pooled_weight: Weight of the distance to the teacher's pooled features.
        features_weight: Weight of the distance to its feature maps.
        feature_depths: Depths of these maps, as shares of all blocks.
        precision: Type to compute in; weights stay in float32.
        checkpointing: Compute activations again in the backward pass.
        compile: Compile the blocks.
        shard: Shard parameters over the processes (FSDP2) instead of copying them (DDP).
        balance: Deal images so that all processes have as many tokens.
        workers: Processes that read images, for each process that trains.
        seed: Of everything random.
        save_every: Updates between checkpoints; 0 for the end of each epoch only.
        keep_checkpoints: How many to keep.
        eval_every: Epochs between evaluations; 0 for the end only.
        hold_back: Share of the training images to evaluate on, where there are no others.
        interpolate: In the end take the weights between those before and at most this share of the way to those after
            (averaged, with ``ema``) that answer most like the teacher on the images set aside; 0 for those after.
            Trainings on few images can go too far, most of all for images of another kind.
        size: Of boxes and pixels: side of the squares that are trained on, in pixels; pictures with boxes are
            evaluated with this as their longer side.
        test_size: Of pixels: longer side of pictures in evaluation; 0 leaves them as they are.
        slide: Of pixels: evaluate in overlapping squares of ``size``.
        jitter: Smallest and largest scale of pictures in training, relative to where the longer side is ``size``.
        distort: Of pixels: probability of other colours.
        window: Side of attention windows in base patches; 0 for none.
        global_blocks: Blocks without windows, counted from 0.
        depths: Of pixels: the four blocks that are read; by default the last of each quarter.
        channels: Of the pyramid and the heads.
        cascade: Of boxes: three stages of boxes.
        detail: Of boxes and pixels: refine maps where patches are coarse, see `aptvit.dense.CellDetail`.
        from_maps: Of boxes and pixels: the uniform network that the training starts from teaches its maps; labels are
            only evaluated, and heads stay as they are.
        masks: Of boxes: learn and predict a mask for each, from COCO's outlines.
        ignore: Of pixels: numbers in the masks that no class belongs to.
        subtract: Of pixels: 1 where masks count classes from 1 and have 0 for none, as ADE20K's do.
    """

    method: Literal["apt", "uniform", "random", "resize", "downscale", "tome"] = "apt"
    objective: Literal["labels", "distill", "boxes", "pixels"] = "labels"
    trains: Literal["all", "new", "heads"] = "all"
    keep: float = 0.5
    keep_also: tuple[float, ...] = ()
    per_image: bool = False
    blend: float = 0.0
    thresholds: tuple[float, ...] = ()
    scales: int = 2
    scorer: str = "entropy"
    init: Literal["zero", "residual", "nonzero"] = "zero"
    resize_only: bool = False
    area_bias: float = 0.0
    recalibrate: int = 0
    epochs: int = 1
    max_steps: int = 0
    max_minutes: float = 0.0
    batch_size: int = 256
    micro_batch_size: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-5
    lr_batch: int = 0
    min_lr: float = 0.0
    warmup: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.999)
    layer_decay: float = 1.0
    new_lr: float = 1.0
    clip: float = 0.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0
    crop: float = 1.0
    flip: float = 0.0
    auto_augment: str = ""
    color_jitter: float = 0.0
    erasing: float = 0.0
    temperature: float = 1.0
    logits_weight: float = 1.0
    pooled_weight: float = 0.0
    features_weight: float = 0.0
    feature_depths: tuple[float, ...] = (1.0,)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    balance: bool = True
    workers: int = 4
    seed: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    eval_every: int = 1
    hold_back: float = 0.1
    interpolate: float = 0.0
    size: int = 512
    test_size: int = 0
    slide: bool = False
    jitter: tuple[float, ...] = (0.5, 2.0)
    distort: float = 0.5
    window: int = 0
    global_blocks: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    channels: int = 256
    cascade: bool = False
    detail: bool = True
    from_maps: bool = False
    masks: bool = False
    ignore: tuple[int, ...] = (255,)
    subtract: int = 0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shares(self) -> tuple[float, ...]:
        """All shares that are trained, the main one first."""
        return (self.keep, *(share for share in self.keep_also if share != self.keep))

    @property
    def peak_lr(self) -> float:
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1.0)

    def to_yaml(self) -> str:
        """As `load_recipe` reads it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def load_recipe(name_or_file: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Recipe:
    """A recipe by name or from a YAML file, with some values replaced.

    Args:
        name_or_file: One of `RECIPES`, or a file; what it leaves out has the default.
        overrides: Values by name, or strings ``name=value`` with values as YAML has them.

    Raises:
        ValueError: If there is no such recipe, a name is unknown, or a value is not what it must be.
    """
    path = Path(name_or_file)
    if str(name_or_file) in RECIPES:
        text = (resources.files("aptvit.training") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"there is no recipe {str(name_or_file)!r}: use {', '.join(RECIPES)}, or a YAML file")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, such as 'epochs: 1'")
    given = overrides if isinstance(overrides, Mapping) else dict(map(_parse, overrides))
    return Recipe(**{name: _as_type(name, value) for name, value in {**values, **given}.items()})


def _parse(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} must be NAME=VALUE, such as epochs=3")
    return name.strip().replace("-", "_"), yaml.safe_load(value) if value.strip() else ""


def _as_type(name: str, value: Any) -> Any:
    """A value of the type that its field has."""
    types = get_type_hints(Recipe)
    if name not in types:
        near = difflib.get_close_matches(name, types, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"use {', '.join(types)}"
        raise ValueError(f"a recipe has no {name!r}: {hint}")
    kind = types[name]
    try:
        if get_origin(kind) is tuple:
            words = value.replace(",", " ").split() if isinstance(value, str) else value
            return tuple(map(get_args(kind)[0], [words] if isinstance(words, (int, float)) else words))
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError
            return value
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return kind(float(value)) if kind in (int, float) else kind(value)
    except (TypeError, ValueError):
        wanted = " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else _WORDS.get(kind, "numbers")
        raise ValueError(f"{name}={value!r} must be {wanted}") from None


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_SHARES = (
    *("keep", "hold_back", "crop", "flip", "erasing", "warmup"),
    *("label_smoothing", "drop_path", "min_lr", "ema", "distort", "blend", "interpolate"),
)
_POSITIVE = (
    *("keep", "lr", "temperature", "batch_size", "scales"),
    *("layer_decay", "crop", "keep_checkpoints", "size", "channels"),
)


def _check(recipe: Recipe) -> None:
    """Every number is in its range."""
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, (int, float)) and value < 0:
            raise ValueError(f"{field.name}={value:g} must not be negative")
    for name in _POSITIVE:
        if getattr(recipe, name) <= 0:
            raise ValueError(f"{name}={getattr(recipe, name):g} must be above 0")
    for name, value in [(name, getattr(recipe, name)) for name in _SHARES] + [("keep_also", s) for s in recipe.shares]:
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value:g} must be a share between 0 and 1")
    if any(not 0 < depth <= 1 for depth in recipe.feature_depths):
        raise ValueError(f"feature_depths={recipe.feature_depths} must be shares of all blocks, above 0 and up to 1")
    if len(recipe.betas) != 2:
        raise ValueError(f"betas={recipe.betas} must be two numbers")
    if recipe.thresholds and (recipe.per_image or recipe.keep_also or recipe.recalibrate):
        raise ValueError("thresholds are given: leave per_image, keep_also and recalibrate out, or the thresholds")
    if recipe.blend and (recipe.per_image or recipe.thresholds):
        raise ValueError(f"blend={recipe.blend:g} finds thresholds: with per_image, or with given ones, set blend=0")
    if recipe.interpolate and (recipe.objective != "distill" or recipe.shard):
        raise ValueError("interpolate compares with a teacher, in whole weights: objective=distill, shard=false")
    if len(recipe.jitter) != 2 or not 0 < recipe.jitter[0] <= recipe.jitter[1]:
        raise ValueError(f"jitter={recipe.jitter} must be the smallest and the largest scale")
    if recipe.objective in ("boxes", "pixels") and recipe.method not in ("apt", "resize", "uniform"):
        raise ValueError(f"method={recipe.method} gives no feature maps: use apt, resize or uniform")
    if recipe.from_maps and (
        recipe.objective not in ("boxes", "pixels") or recipe.method == "uniform" or recipe.trains == "heads"
    ):
        raise ValueError("from_maps: an adaptive network for boxes or pixels learns the uniform one's maps, not heads")
    if recipe.scorer == "spread" and recipe.objective not in ("boxes", "pixels"):
        raise ValueError("scorer=spread foresees what a detector or segmenter says: objective=boxes or pixels")
    if recipe.global_blocks and not recipe.window:
        raise ValueError(f"global_blocks={list(recipe.global_blocks)} without window: all blocks are global already")
    if recipe.recalibrate and recipe.per_image:
        raise ValueError("recalibrate solves thresholds, and per_image has none: leave one of them out")
