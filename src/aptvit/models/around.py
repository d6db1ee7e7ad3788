"""Models of transformers around a ViT, with the ViT on adaptive patches: depth, detection, segmentation, pose, video.

The host's own forward runs unchanged on full grids. In a copy that shares its parameters, three callables stand in the
place of methods:

`_Embeddings`   the host's own tokens; those of coarse patches are replaced, and the rest of the call is packed
`_Layer`        a layer on the kept tokens, between the reduction of full grids and their restoration
`_Core`         the module with both: where it is called without its host, a call starts and ends here

The copy gets a subclass of its own class (`_subclass_of`), whose instances have settings in ``model.aptvit``.
"""

from __future__ import annotations

import copy
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aptvit.encoder.full_grid import GridPlan, restored
from aptvit.hosts.adapter import share_parameters
from aptvit.hosts.statistics import normalisation
from aptvit.hosts.transformers import check_exported
from aptvit.layers.patch_embed import COARSE_PREFIX
from aptvit.models.adaptive_vit import not_compiled
from aptvit.models.around_check import check_beside
from aptvit.models.around_files import save_settings
from aptvit.models.inner_adaptivity import InnerAdaptivity
from aptvit.patching.budget import CallBudget

__all__ = ["adapt_around"]


class _Embeddings:
    """Stands in the place of ``embeddings.forward``."""

    def __init__(self, adaptivity: InnerAdaptivity) -> None:
        self.adaptivity = adaptivity
        self.__signature__ = inspect.signature(type(adaptivity.inner.embeddings).forward.__get__(object()))

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return self.adaptivity.embed(*args, **options)


class _Layer:
    """Stands in the place of a layer's ``forward``.

    Attributes:
        module: The layer.
        block: The layer's own forward, as `aptvit.layers.attention.run_block` runs it.
    """

    def __init__(self, adaptivity: InnerAdaptivity, module: nn.Module) -> None:
        self.adaptivity, self.module, self.block = adaptivity, module, _OwnForward(module)
        self.__signature__ = inspect.signature(type(module).forward.__get__(object()))

    def __call__(self, *args: Any, **options: Any) -> Any:
        call = self.adaptivity.call
        if call is None or not call.is_packed:
            return type(self.module).forward(self.module, *args, **options)
        arguments = self.__signature__.bind(*args, **options).arguments
        for name, parameter in self.__signature__.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        first = next(iter(self.__signature__.parameters))
        return self.adaptivity.run_layer(self.module, self.block, arguments.pop(first), arguments)


class _MapLayer:
    """Stands in the place of the ``forward`` of a layer that takes maps.

    Attributes:
        module: The layer.
        view: The same layer without windows, which are left to its attention.
    """

    def __init__(self, adaptivity: InnerAdaptivity, module: Any) -> None:
        self.adaptivity, self.module, self.view = adaptivity, module, copy.copy(module)
        self.__signature__ = inspect.signature(type(module).forward.__get__(object()))
        attention = getattr(module, str(adaptivity.inner.map_attention))
        attention.forward = _MapAttention(adaptivity, attention, module.window_size)
        self.view.window_size = 0
        for part in module.children():
            if type(part).__name__.endswith("DropPath"):
                part.forward = _MapDropPath(adaptivity, part)
        residual = getattr(module, "residual", None)  # convolutions, which read full grids
        if residual is not None:
            residual.forward = _MapResidual(adaptivity, residual)

    def __call__(self, *args: Any, **options: Any) -> Any:
        call = self.adaptivity.call
        if call is None or not call.is_packed:
            return type(self.module).forward(self.module, *args, **options)
        self.view.training = self.module.training
        maps, *_ = self.__signature__.bind(*args, **options).arguments.values()
        return self.adaptivity.run_map_layer(self.module, self.view, maps)


class _MapAttention:
    """Stands in the place of the ``forward`` of attention over maps with relative positions."""

    def __init__(self, adaptivity: InnerAdaptivity, module: Any, window: int) -> None:
        self.adaptivity, self.module, self.window = adaptivity, module, window
        self.num_heads: int = getattr(module, "num_attention_heads", None) or module.num_heads

    def __call__(self, *args: Any, **options: Any) -> Any:
        module, call = self.module, self.adaptivity.call
        if call is None or not call.is_packed:
            return type(module).forward(module, *args, **options)
        (maps,) = args or (options["hidden_states"],)  # (1, 1, T, D)
        windows, key_bias = self.adaptivity.map_windows(self.window)
        tokens = F.pad(maps.flatten(0, 2), (0, 0, 0, 1))  # padding is zeros
        qkv = module.qkv(tokens).unflatten(1, (3, self.num_heads, -1))
        out = windows.attend(qkv, module.scale, self._tables(windows.size), key_bias)
        return module.proj(out)[None, None], None

    def _tables(self, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Embeddings of distances, by the host's own function."""
        module = self.module
        if not hasattr(module, "rel_pos_h"):
            return None
        of_module = getattr(module, "get_rel_pos", None)
        function: Any = of_module or vars(sys.modules[type(module).__module__])["get_rel_pos"]
        return function(size[0], size[0], module.rel_pos_h), function(size[1], size[1], module.rel_pos_w)


class _MapDropPath:
    """Stands in the place of the ``forward`` of stochastic depth: each image skips the branch by itself."""

    def __init__(self, adaptivity: InnerAdaptivity, module: Any) -> None:
        self.adaptivity, self.module = adaptivity, module

    def __call__(self, x: Tensor) -> Tensor:
        module, call = self.module, self.adaptivity.call
        if call is None or not call.is_packed or not module.training:
            return type(module).forward(module, x)
        images, cells = call.plan.shape
        factors = F.dropout(x.new_ones(images), module.drop_prob)
        return x * factors[call.plan.index // cells, None]  # (1, 1, T, D)


class _MapResidual:
    """Stands in the place of the ``forward`` of convolutions behind a layer, which read full grids."""

    def __init__(self, adaptivity: InnerAdaptivity, module: Any) -> None:
        self.adaptivity, self.module = adaptivity, module

    def __call__(self, maps: Tensor) -> Tensor:
        call, inner = self.adaptivity.call, self.adaptivity.inner
        if call is None or not call.is_packed or call.layout is None:
            return type(self.module).forward(self.module, maps)
        plan = call.plan
        full = inner.map_of_rows(plan.restore(inner.rows_of_map(maps)), call.layout.grid_sizes[0])
        out = plan.reduce(inner.rows_of_map(type(self.module).forward(self.module, full)))
        return inner.map_of_rows(out, (1, out.shape[1]))


class _OwnForward:
    """A layer's own forward, without the checkpointing of transformers, which would run it again outside of the call.

    Attributes:
        num_redirected: Expected calls of attention, see `aptvit.layers.attention.run_block`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.num_redirected: int = module.num_redirected  # type: ignore[assignment]

    def __call__(self, *args: Any, **options: Any) -> Any:
        forward: Any = type(self.module).forward
        while forward.__code__.co_name == "forward_with_checkpointing":
            forward = forward.__wrapped__
        return forward(self.module, *args, **options)


class _Core:
    """Stands in the place of the ``forward`` of the module that holds embeddings and layers."""

    def __init__(self, adaptivity: InnerAdaptivity) -> None:
        self.adaptivity = adaptivity
        self.__signature__ = inspect.signature(type(adaptivity.inner.core).forward.__get__(object()))

    def __call__(self, *args: Any, **options: Any) -> Any:
        core = self.adaptivity.inner.core
        if self.adaptivity.call is not None:
            return type(core).forward(core, *args, **options)
        with self.adaptivity.calling():
            return restored(type(core).forward(core, *args, **options))


class _CentrePositions:
    """Stands in the place of V-JEPA 2's ``get_position_ids``: frame, row and column of the centre of each patch."""

    def __init__(self, adaptivity: InnerAdaptivity, module: nn.Module) -> None:
        self.adaptivity, self.module = adaptivity, module

    def __call__(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, ...]:
        call: Any = self.adaptivity.call
        if call is None or not call.is_packed:
            return type(self.module).get_position_ids(self.module, x, masks)  # type: ignore[attr-defined]
        if masks is not None:
            raise ValueError("position masks number the cells of full grids: they cannot be combined with merging")
        plan = call.plan
        positions = call.get("centres", lambda: self.adaptivity.centres(call, plan, self.of_cells(plan)))
        return tuple(part.to(x.dtype) for part in positions)

    def of_cells(self, plan: GridPlan) -> tuple[Tensor, ...]:
        """(N,) the host's own positions of the tokens of a row."""
        shape_only = torch.empty(1, plan.shape[1], 0, device=self.adaptivity.inner.device)
        return type(self.module).get_position_ids(self.module, shape_only)  # type: ignore[attr-defined]


def _install(adaptivity: InnerAdaptivity) -> None:
    """Put these callables in the place of the host's methods."""
    inner = adaptivity.inner
    for layer in inner.layers:
        layer.forward = (_Layer if inner.map_attention is None else _MapLayer)(adaptivity, layer)
    inner.embeddings.forward = _Embeddings(adaptivity)
    if inner.core is not inner.vit:
        inner.core.forward = _Core(adaptivity)
    for module in inner.core.modules():
        if hasattr(module, "get_position_ids"):
            module.get_position_ids = _CentrePositions(adaptivity, module)


class _AroundViT:
    """Base of the classes that `adapt_around` makes; see there."""

    aptvit: InnerAdaptivity
    host_class: type

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the plain host, which transformers alone opens, and ``aptvit.json`` for `aptvit.from_pretrained`.

        Args:
            save_directory: The folder.
            options: As for the host's ``save_pretrained``.

        Raises:
            ValueError: If the model could not be loaded again: transformers does not export its class, or the scorer
                is a function.
        """
        check_exported(self.host_class)
        host: Any = super()
        state = options.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        plain = {name: value for name, value in state.items() if not name.startswith(f"{COARSE_PREFIX}.")}
        host.save_pretrained(save_directory, state_dict=plain, **options)
        save_settings(self, Path(save_directory))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.host_class,), self.__dict__  # pickle cannot find the subclass by its name


@cache
def _subclass_of(kind: Any) -> Any:
    """The subclass of a host's class whose instances have ``aptvit``."""
    signature = inspect.signature(kind.forward)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("layout", *CallBudget.__annotations__)
        if name not in signature.parameters
    ]
    parameters = list(signature.parameters.values())
    ends = parameters[-1:] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    signature = signature.replace(parameters=[*parameters[: len(parameters) - len(ends)], *added, *ends])

    @not_compiled  # which patches there are follows from the pixels
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        budget = {parameter.name: options.pop(parameter.name, None) for parameter in added}
        budget = {name: value for name, value in budget.items() if value is not None}
        if self.aptvit.call is not None and not budget:
            return kind.forward(self, *args, **options)
        with self.aptvit.calling(**budget):
            return restored(kind.forward(self, *args, **options))

    vars(forward).update(__signature__=signature)
    # Under the same name: transformers saves it, and knows by it which outputs a class records.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind)(kind.__name__, (_AroundViT, kind), {**names, "forward": forward, "host_class": kind})


def _rebuilt(kind: Any) -> Any:
    derived = _subclass_of(kind)
    return derived.__new__(derived)


def adapt_around(host: nn.Module, *, processor: Any = None, check: bool = True, **options: Any) -> Any:
    """Adapt the ViT inside a model of transformers.

    Args:
        host: The model; it stays as it is, and shares its parameters with the result.
        processor: The model's own processor, for the normalisation of its images; by default its file beside the
            weights is read, and if there is none, the statistics of the model's family are used.
        check: Compare the result with the host on noise, see `aptvit.models.around_check`.
        options: ``thresholds``, ``keep``, ``scales``, ``scorer``, ``resize_only``, ``init``, ``mean``, ``std``,
            ``attention``, ``area_bias`` and the limits, as for `aptvit.AdaptivePatchTransformer`.

    Returns:
        An instance of a subclass of the host's class. Its forward also takes ``keep=``, ``thresholds=``,
        ``max_tokens=`` and ``layout=``; ``model.aptvit`` holds the settings.

    Raises:
        ValueError: If the model cannot be adapted, an option is out of range, or the result is not the host.
    """
    if processor is not None:
        statistics = zip(("mean", "std"), normalisation(processor), strict=True)
        options = {**dict(statistics), **{key: value for key, value in options.items() if value is not None}}
    model: Any = share_parameters(host)
    adaptivity = InnerAdaptivity(model, **options)
    _install(adaptivity)
    kind: Any = type(host)
    model.__class__ = _subclass_of(kind)
    model.aptvit = adaptivity
    if check:
        check_beside(model, host)
    return model
