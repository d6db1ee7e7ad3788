"""LLaVA-1.5 with a number of visual tokens that depends on the image.

The processor cuts images into patches, since it has to write one ``<image>`` token for each patch into the prompt, and
passes their scale map on as ``patch_scales``. The tower runs packed up to the layer in the configuration. The projector
and the language model are transformers' own.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from aptvit.files.model_folders import SETTINGS_FILE
from aptvit.files.weights import read_weights
from aptvit.hosts.adapter import share_parameters
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.models.checkpoints import options_of, read_config
from aptvit.models.saved_files import errors_name
from aptvit.models.settings import WEIGHTS_FILE
from aptvit.models.tower import AdaptiveTower
from aptvit.patching.layout import PatchLayout
from aptvit.patching.patchifier import Patchifier
from aptvit.storage.writing import save_weights, write_json

__all__ = ["LlavaForConditionalGeneration", "LlavaProcessor", "adapt_llava", "from_pretrained", "train_only"]

_TOWER = "model.vision_tower."


def adapt(model: Any, processor: Any, **options: Any) -> tuple[Any, Any]:
    """Turn a vision language model and its processor into adaptive ones.

    Args:
        model: A model of LLaVA-1.5, see `adapt_llava`.
        processor: The processor of the model.
        options: As for `aptvit.adapt`.

    Returns:
        Model and processor, to be used together.

    Raises:
        ValueError: If the model cannot be adapted.
    """
    return adapt_llava(model, processor, **options)


def adapt_llava(model: Any, processor: Any, **options: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Turn a LLaVA-1.5 model and its processor into adaptive ones.

    The arguments are not changed; weights are shared. With nothing merged the result is the host, to rounding.

    Args:
        model: A ``LlavaForConditionalGeneration`` of transformers.
        processor: The ``LlavaProcessor`` of the model.
        options: As for `aptvit.adapt`: ``thresholds=(5.75,)`` (section 4 of the paper) or ``keep=0.5``, ...

    Returns:
        Model and processor, to be used together: setting ``model.vision.thresholds`` applies to both.

    Raises:
        ValueError: If the model is not LLaVA-1.5, or the processor was made for another model.
    """
    reason = _reason_not_adaptable(model) or _reason_not_fitting(processor, model.config)
    if reason is not None:
        raise ValueError(f"cannot adapt this model: {reason}")
    tower = AdaptiveTower(model.model.vision_tower, processor=processor, **options)
    if processor.num_additional_image_tokens != tower.num_prefix_tokens:
        raise ValueError(
            f"cannot adapt this model: the processor's num_additional_image_tokens is "
            f"{processor.num_additional_image_tokens}, but the vision tower has {tower.num_prefix_tokens} tokens "
            f"besides patches: set processor.num_additional_image_tokens = {tower.num_prefix_tokens}"
        )
    adaptive = share_parameters(model)
    adaptive.__class__ = LlavaForConditionalGeneration
    adaptive.model.__class__ = LlavaModel
    adaptive.model.vision_tower = tower
    counting = copy.copy(processor)
    counting.__class__ = LlavaProcessor
    counting.patchifier = tower.patchifier
    return adaptive, counting


def _reason_not_adaptable(model: Any) -> str | None:
    name = type(model).__name__
    if isinstance(model, LlavaForConditionalGeneration):
        return "it is adaptive already: set model.vision.thresholds or model.vision.keep"
    if not isinstance(model, transformers.LlavaForConditionalGeneration):
        return (
            f"{name} is not LlavaForConditionalGeneration (LLaVA-1.5); LLaVA-NeXT and OneVision read features as a "
            "grid of tiles, docs/how-to/hugging-face.md says more"
        )
    return None


def _reason_not_fitting(processor: Any, config: Any) -> str | None:
    """The reason why a processor does not belong to a model; None if it does."""
    if isinstance(processor, LlavaProcessor):
        return "its processor is adaptive already: give the one that AutoProcessor loads"
    if not isinstance(processor, transformers.LlavaProcessor):
        return f"{type(processor).__name__} is no LlavaProcessor: load the model's own with AutoProcessor"
    vision = config.vision_config
    strategy = config.vision_feature_select_strategy
    expected = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": strategy,
        "image_token_id": config.image_token_id,
    }
    for name, value in expected.items():
        if getattr(processor, name) != value:
            return (
                f"the processor's {name} is {getattr(processor, name)!r}, the model's {value!r}: load the processor "
                f"of this model, or set processor.{name} = {value!r}"
            )
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    expected_size = {"height": vision.image_size, "width": vision.image_size}
    if {key: size[key] for key in expected_size if key in size} != expected_size:
        return (
            f"the processor makes images of {dict(size)}, the vision tower was made for {vision.image_size} pixels a "
            "side: load the processor of this model"
        )
    return None


class LlavaProcessor(transformers.LlavaProcessor):
    """A processor that writes one ``<image>`` token for each patch of an image, and returns ``patch_scales``, too.

    The class has the name of transformers' class, so that saved files can be read without aptvit.

    Attributes:
        patchifier: The model's patchifier.
    """

    patchifier: Patchifier

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        """The ``<image>`` tokens of one image.

        Args:
            image_inputs: Outputs of the image processor for all images; ``patch_scales`` are added to it.
            image_idx: Number of the image.
        """
        if "patch_scales" not in image_inputs:
            image_inputs["patch_scales"] = self._scales(image_inputs["pixel_values"])
        scales = torch.as_tensor(image_inputs["patch_scales"][image_idx])
        area = 4 ** scales[scales >= 0].long()
        count = round(float((1 / area).sum())) + self.num_additional_image_tokens
        return self.image_token * (count - (self.vision_feature_select_strategy == "default"))

    def _scales(self, pixel_values: Any) -> Any:
        """(B, h, w) int8 scale of the patch over each base cell, as `PatchLayout.scale_map`."""
        pixels = [torch.as_tensor(image) for image in pixel_values]
        scales = self.patchifier(self.patchifier.groups(pixels)).scale_map
        return scales if isinstance(pixel_values, Tensor) else list(scales.numpy())

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The configuration, as of transformers' class: without the patchifier."""
        patchifier = self.__dict__.pop("patchifier")
        try:
            return super().to_dict(*args, **kwargs)
        finally:
            self.patchifier = patchifier


class LlavaModel(transformers.LlavaModel):
    """transformers' LlavaModel with one row of image features for each patch."""

    vision_tower: AdaptiveTower

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        patch_scales: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Projected features, in raster order of the patches.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            vision_feature_layer: Hidden state to read, or several to concatenate; by default the configuration's.
            vision_feature_select_strategy: "default" drops the class token, "full" keeps it.
            patch_scales: (B, h, w) from the processor; by default it is computed.

        Returns:
            An output with ``pooler_output``: a list of (L_i, D) for each image.

        Raises:
            ValueError: If ``patch_scales`` do not belong to the images.
        """
        config, tower = self.config, self.vision_tower
        layers = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        layout = None if patch_scales is None else self.layout(pixel_values, patch_scales)
        states, layout = tower.hidden_states([layers] if isinstance(layers, int) else layers, pixel_values, layout)
        x, lengths = torch.cat(states, dim=-1), layout.seqlens
        if strategy == "default":
            patch_rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
            patch_rows.index_fill_(0, layout.cu_seqlens[:-1].long(), False)
            x = x[patch_rows.nonzero_static(size=len(x) - len(lengths))[:, 0]]
            lengths = [length - 1 for length in lengths]
        rows = self.multi_modal_projector(x)
        return BaseModelOutputWithPooling(pooler_output=list(rows.split(lengths)))

    def layout(self, pixel_values: Tensor, patch_scales: Tensor) -> PatchLayout:
        """The layout of the processor's scale map.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            patch_scales: (B, h, w) from the processor.

        Raises:
            ValueError: If the scale map does not belong to these images, or to this model.
        """
        tower = self.vision_tower
        grid = tuple(side // tower.patch_size for side in pixel_values.shape[2:])
        if tuple(patch_scales.shape) != (len(pixel_values), *grid):
            raise ValueError(
                f"patch_scales of shape {tuple(patch_scales.shape)} do not belong to pixel_values of shape "
                f"{tuple(pixel_values.shape)}: pass both as the processor returned them"
            )
        scales = patch_scales.to(pixel_values.device, torch.int8)
        layout = PatchLayout.from_scale_map(scales, tower.patch_size, tower.num_scales, tower.num_prefix_tokens)
        covered = [sum(n * 4**scale for scale, n in enumerate(counts)) for counts in layout.counts]
        if any(cells != grid[0] * grid[1] for cells in covered):
            raise ValueError(
                f"patch_scales do not tile a grid of {grid[0]}x{grid[1]} with {tower.num_scales} sizes: use the "
                "processor that adapt_llava returned together with this model"
            )
        return layout

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        patch_scales: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' forward, with ``patch_scales`` from the processor."""
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            features = self.get_image_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, patch_scales
            )
        if features is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        rows = torch.cat(features.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
        if input_ids is None:
            places = self.get_placeholder_mask(None, inputs_embeds=inputs_embeds, image_features=rows[None])
        else:
            is_image_token = input_ids == self.config.image_token_id
            _check_counts(
                is_image_token.sum(1).tolist(), [len(rows_of_image) for rows_of_image in features.pooler_output]
            )
            places = is_image_token[..., None]
        out = super().forward(inputs_embeds=inputs_embeds.masked_scatter(places, rows), **kwargs)
        if hasattr(out, "image_outputs"):  # from transformers 5.24 on
            out.image_outputs = features
        elif not isinstance(out, tuple):
            out.image_hidden_states = rows
        return out


def _check_counts(in_prompts: Sequence[int], in_images: Sequence[int]) -> None:
    """Check that each prompt has the tokens of whole images.

    Args:
        in_prompts: Number of image tokens in each prompt.
        in_images: Number of patches of each image, over all prompts.

    Raises:
        ValueError: If the numbers do not match.
    """
    ends = {0, *itertools.accumulate(in_images)}
    if sum(in_prompts) != sum(in_images) or not ends.issuperset(itertools.accumulate(in_prompts)):
        raise ValueError(
            f"the prompts hold {list(in_prompts)} image tokens, the images have {list(in_images)}: prepare both with "
            "the processor that adapt_llava returned, and pass on the patch_scales that it adds"
        )


def _with_patch_scales(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Set a forward's signature to transformers' with ``patch_scales`` added: generation and trainers inspect it."""
    signature = inspect.signature(transformers.LlavaForConditionalGeneration.forward)
    *parameters, variable_keywords = signature.parameters.values()
    extra = inspect.Parameter("patch_scales", inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = signature.replace(parameters=[*parameters, extra, variable_keywords])  # type: ignore[attr-defined]
    return forward


class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    """LLaVA-1.5 on adaptive patches, see `adapt_llava`.

    The class has the name of transformers' class, so that saved files can be read without aptvit.
    """

    model: LlavaModel

    @property
    def vision(self) -> AdaptiveTower:
        """The vision tower; its ``thresholds``, ``keep`` and ``budget`` set the number of visual tokens."""
        return self.model.vision_tower

    @_with_patch_scales
    def forward(self, input_ids: Tensor | None = None, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers' forward, with ``patch_scales`` from the processor.

        Args:
            input_ids: (B, L) tokens of the prompts.
            args: As for transformers' forward.
            labels: (B, L) target tokens; those of visual tokens are ignored.
            kwargs: As for transformers' forward: ``pixel_values`` (N, C, H, W) of all images, ...; and
                ``patch_scales`` (N, h, w).

        Raises:
            ValueError: If prompts, images and ``patch_scales`` do not belong together.
        """
        if labels is not None and input_ids is not None:
            labels = labels.masked_fill(input_ids == self.config.image_token_id, -100)
        return super().forward(input_ids, *args, labels=labels, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats the images of each prompt for its beams, in the order of the prompt."""
        pixels = model_kwargs.pop("pixel_values", None)
        scales = model_kwargs.pop("patch_scales", None)
        if pixels is not None and expand_size > 1 and input_ids is not None:
            if scales is None:
                scales = self.vision.layout(pixels).scale_map
            index = self._images_of_beams(input_ids, self.model.layout(pixels, scales), expand_size)
            pixels, scales = pixels[index], scales[index]
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        inputs = {"pixel_values": pixels, "patch_scales": scales}
        return ids, {**kwargs, **{name: value for name, value in inputs.items() if value is not None}}

    def _images_of_beams(self, input_ids: Tensor, layout: PatchLayout, beams: int) -> list[int]:
        """Numbers of the images, in the order in which the beams of all prompts read them."""
        dropped = self.config.vision_feature_select_strategy == "default"
        lengths = [length - dropped for length in layout.seqlens]
        in_prompts = (input_ids == self.config.image_token_id).sum(1).tolist()
        _check_counts(in_prompts, lengths)
        index, first = [], 0
        for tokens in in_prompts:
            last = first
            while tokens > 0:
                tokens -= lengths[last]
                last += 1
            index += [*range(first, last)] * beams
            first = last
        return index

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Write a folder that transformers can read, with the new parameters and options in files of their own.

        Args:
            save_directory: The folder; `aptvit.vlm.from_pretrained` reads all of it.
            args: As for transformers' ``save_pretrained``.
            kwargs: As for transformers' ``save_pretrained``.

        Raises:
            ValueError: If the scorer is a function, which cannot be saved.
        """
        state = kwargs.pop("state_dict", None)
        state = dict(self.state_dict() if state is None else state)
        new = {name: state.pop(name) for name in list(state) if name.startswith(f"{_TOWER}{COARSE_PREFIX}")}
        result = super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
        folder = Path(save_directory)
        write_json(folder / SETTINGS_FILE, {"aptvit": options_of(self.vision)})
        save_weights({name.removeprefix(_TOWER): value for name, value in new.items()}, folder / WEIGHTS_FILE)
        return result


def is_adaptive(folder: str | Path) -> bool:
    """Whether an adaptive LLaVA was saved to a folder."""
    return (Path(folder) / SETTINGS_FILE).is_file()


def from_pretrained(folder: str | Path, **options: Any) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a model and a processor that were saved with ``save_pretrained`` into one folder.

    Args:
        folder: The folder.
        options: As for transformers' ``from_pretrained``: ``dtype``, ``device_map``, ...

    Returns:
        Model and processor, as from `adapt_llava`.

    Raises:
        ValueError: If the folder holds no adaptive LLaVA.
    """
    path = Path(folder)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ValueError(f"there is no {name} in {path}: give a folder that model.save_pretrained wrote")
    host = transformers.LlavaForConditionalGeneration.from_pretrained(path, **options)
    with errors_name(path / SETTINGS_FILE):
        saved_processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model, processor = adapt_llava(host, saved_processor, **read_config(path / SETTINGS_FILE))
        model.vision.load_state_dict(read_weights(path / WEIGHTS_FILE), strict=False)
    return model, processor


_PARTS = {
    "projector": "model.multi_modal_projector.",
    "new": f"{_TOWER}{COARSE_PREFIX}.",
    "tower": _TOWER,
    "language": "model.language_model.",
}


def train_only(model: nn.Module, *parts: str) -> list[nn.Parameter]:
    """Freeze all parameters of a model except those of some parts.

    The paper freezes the fine-tuned model and trains the new parameters for 5 % of the iterations at a tenth of the
    learning rate; training the projector alone is LLaVA's first stage.

    Args:
        model: From `adapt_llava`.
        parts: Any of "projector", "new" (the sub-patch branch), "tower" (the new parameters included), "language".

    Returns:
        The parameters that are not frozen.

    Raises:
        ValueError: If a part does not exist.
    """
    for part in parts:
        if part not in _PARTS:
            raise ValueError(f"{part!r} is no part of the model: use {', '.join(map(repr, _PARTS))}")
    prefixes = tuple(_PARTS[part] for part in parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(prefixes) and name.startswith(prefixes))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
