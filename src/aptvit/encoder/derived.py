"""Values derived from a host's parameters, cached between calls and checked in each call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack, _pop_mode_temporarily

from aptvit.hosts.adapter import Adapter
from aptvit.layers.patch_embed import COARSE_PREFIX, AffineMaps

__all__ = ["DerivedValues", "DerivedWeights"]

T = TypeVar("T")
_CAPACITY = 32  # most cached values, such as positions of grids
_STATES = 2  # of a host, whose values are cached


@dataclass(frozen=True, eq=False)
class DerivedValues:
    """Values derived from one state of a host.

    Attributes:
        fingerprint: (n,) outputs of the host's modules in this state, and its position parameters.
        maps: The affine maps of patches.
        cached: Other values by key.
    """

    fingerprint: Tensor
    maps: AffineMaps
    cached: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The cached value for a key; ``compute`` makes it if there is none."""
        value = self.cached.get(key)
        if value is None:  # threads may compute the same value at the same time
            value = self.cached[key] = compute()
            for oldest in list(self.cached)[:-_CAPACITY]:
                self.cached.pop(oldest, None)
        return value


class FreshnessCheck(NamedTuple):
    """Comparison of cached values with the host's current state.

    Attributes:
        values: The cached values of each state that is known.
        fingerprint: (n,) fingerprint of the host's current state.
        are_fresh: For each of the values, bool on the CPU; with a host on a GPU, valid after a synchronisation.
    """

    values: Sequence[DerivedValues]
    fingerprint: Tensor
    are_fresh: Tensor

    def current(self, waited: bool) -> DerivedValues | None:
        """The values of the current state, if they are cached. Synchronises with the device unless that is done."""
        if not waited and self.fingerprint.is_cuda:
            torch.cuda.current_stream(self.fingerprint.device).synchronize()
        fresh = zip(self.values, self.are_fresh.tolist(), strict=True)
        return next((values for values, is_fresh in fresh if is_fresh), None)


class DerivedWeights:
    """Caches the `DerivedValues` of one host, and checks in each call whether they are current.

    Comparing parameters is not enough: disabling an adapter (LoRA) leaves them equal, and ``parameter.data`` can be
    changed without a trace. So the modules run on a few fixed random patches, and their outputs must be equal bit for
    bit. The values of two states are cached: with and without an adapter, for example, or while another thread records
    a graph, for which PyTorch computes convolutions otherwise in all threads.

    Args:
        adapter: The host's adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._values: tuple[DerivedValues, ...] = ()
        self._noise: Tensor | None = None
        self._lock = Lock()

    @torch.no_grad()
    def check(self, maps: bool = True) -> FreshnessCheck:
        """Compare the cached values with the host's current state. Does not synchronise with the device.

        Args:
            maps: Whether the affine maps will be used, not positions alone.
        """
        now = self._fingerprint(maps)
        kind = now.shape, now.device, now.dtype
        pairs = [(values, values.fingerprint[: len(now)]) for values in self._values]
        pairs = [(values, cached) for values, cached in pairs if (cached.shape, cached.device, cached.dtype) == kind]
        equal = torch.stack([cached for _, cached in pairs]) == now if pairs else torch.zeros(0, 1, dtype=torch.bool)
        return FreshnessCheck([values for values, _ in pairs], now, equal.all(1).to("cpu", non_blocking=now.is_cuda))

    @torch.no_grad()
    def fresh(self, check: FreshnessCheck, waited: bool) -> DerivedValues:
        """The values of the host's current state: the cached ones, or new ones.

        Args:
            check: From `check`.
            waited: Whether the device was synchronised since; otherwise this synchronises.
        """
        return check.current(waited) or self._derive(check)

    def maps_for_scoring(self) -> AffineMaps:
        """The affine maps of the host's current state. Never synchronises: on a GPU they are computed anew."""
        if self._adapter.device.type == "cpu" and not self._adapter.vit.training:
            return self.fresh(self.check(), waited=False).maps
        return self._find_maps()

    def clear(self) -> None:
        """Drop all cached values."""
        self._values, self._noise = (), None

    def _derive(self, check: FreshnessCheck) -> DerivedValues:
        with self._lock:  # other threads wait, and take what this one derives
            is_late = bool(self._values) and self._values[0] not in check.values
            check = self.check() if is_late else check
            values = check.current(not is_late) or DerivedValues(self._fingerprint(maps=True), self._find_maps())
            self._values = (values, *(old for old in self._values if old is not values))[:_STATES]
            return values

    @torch.no_grad()
    def _find_maps(self) -> AffineMaps:
        adapter = self._adapter
        shape = (1, adapter.in_chans, adapter.patch_size, adapter.patch_size)
        black = torch.zeros(shape, device=adapter.device, dtype=adapter.dtype)
        return AffineMaps(adapter.patch_embed, getattr(adapter.vit, COARSE_PREFIX, None), black)

    def _fingerprint(self, maps: bool) -> Tensor:
        """(n,) position parameters; for the maps also embeddings of eight base patches of noise and of a 2x patch."""
        adapter, noise, side = self._adapter, self._noise, 2 * self._adapter.patch_size
        if noise is None:
            noise = torch.randn(2, adapter.in_chans, side, side, generator=torch.Generator().manual_seed(0))
            self._noise = noise = noise.to(adapter.device, adapter.dtype)
        parts = [noise[:0], *adapter.position_parameters()]
        # Not an operation of the model, so modes that count operations must not see it: those of this thread.
        with torch.autocast(adapter.device.type, enabled=False), ExitStack() as without_modes:
            for _ in range(_len_torch_dispatch_stack()):
                without_modes.enter_context(_pop_mode_temporarily())
            if maps:
                parts.append(adapter.patch_embed(noise))  # (2, D, 2, 2)
            if maps and (coarse := getattr(adapter.vit, COARSE_PREFIX, None)) is not None:
                parts.append(coarse(parts[-1][:1]))
        return torch.cat([part.flatten() for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": (), "_noise": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())
