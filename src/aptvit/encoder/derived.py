"""Values that follow from a host's parameters, kept between calls and never stale."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from aptvit.hosts.adapter import Adapter
from aptvit.layers.patch_embed import COARSE_PREFIX, AffineMaps

__all__ = ["DerivedValues", "DerivedWeights"]

T = TypeVar("T")
_CAPACITY = 32  # grids whose positions are kept


@dataclass(frozen=True, eq=False)
class DerivedValues:
    """What was derived from a host in one state.

    Attributes:
        fingerprint: (n,) what the host's modules gave in that state, and the tables that positions are made of.
        maps: The affine maps of patches.
        kept: Other values by their key.
    """

    fingerprint: Tensor
    maps: AffineMaps
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The kept value of ``compute`` for this key, or a new one."""
        value = self.kept.get(key)
        if value is None:  # threads that compute at once compute the same
            value = self.kept[key] = compute()
            for oldest in list(self.kept)[:-_CAPACITY]:
                self.kept.pop(oldest, None)
        return value


@dataclass(frozen=True, eq=False)
class Check:
    """Whether kept values are those of the host as it is now.

    Attributes:
        values: The kept values; None where there are none.
        fingerprint: (n,) of the host as it is now.
        same: () bool on the CPU. Of a GPU it is there when the stream has been waited for.
    """

    values: DerivedValues | None
    fingerprint: Tensor
    same: Tensor


class DerivedWeights:
    """Keeps the `DerivedValues` of one host, and finds out in each call whether they still hold.

    Parameters alone do not tell: an adapter that is switched off leaves them as they were, and ``parameter.data`` can
    be changed unnoticed. So the modules run on a few fixed random patches, whose embeddings must be the same bit for
    bit.

    Args:
        adapter: The host's.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._values: DerivedValues | None = None
        self._noise: Tensor | None = None

    @torch.no_grad()
    def check(self, maps: bool = True) -> Check:
        """Compare what is kept with the host. Does not wait for the device.

        Args:
            maps: The affine maps will be used, not positions alone.
        """
        values, now = self._values, self._fingerprint(maps)
        kept = now[:0] if values is None else values.fingerprint[: len(now)]
        if values is None or (kept.shape, kept.device) != (now.shape, now.device):
            return Check(None, now, torch.zeros((), dtype=torch.bool))
        return Check(values, now, (kept == now).all().to("cpu", non_blocking=now.is_cuda))

    @torch.no_grad()
    def fresh(self, check: Check, waited: bool) -> DerivedValues:
        """The values of the host as it is now.

        Args:
            check: From `check`.
            waited: The device was waited for since; otherwise this waits.
        """
        if not waited and check.fingerprint.is_cuda:
            torch.cuda.current_stream(check.fingerprint.device).synchronize()
        return check.values if check.values is not None and bool(check.same) else self._derive()

    def maps_for_scoring(self) -> AffineMaps:
        """The affine maps of the host as it is now. Does not wait for a GPU: there they are found anew."""
        if self._adapter.device.type == "cpu" and not self._adapter.vit.training:
            return self.fresh(self.check(), waited=False).maps
        return self._find_maps()

    def clear(self) -> None:
        """Forget what is kept."""
        self._values = self._noise = None

    def _derive(self) -> DerivedValues:
        values = DerivedValues(self._fingerprint(maps=True), self._find_maps())
        self._values = values
        return values

    @torch.no_grad()
    def _find_maps(self) -> AffineMaps:
        adapter = self._adapter
        shape = (1, adapter.in_chans, adapter.patch_size, adapter.patch_size)
        black = torch.zeros(shape, device=adapter.device, dtype=adapter.dtype)
        return AffineMaps(adapter.patch_embed, self._coarse, black)

    @property
    def _coarse(self) -> Any:
        return getattr(self._adapter.vit, COARSE_PREFIX, None)

    def _fingerprint(self, maps: bool) -> Tensor:
        """(n,) tables of positions; for the maps also embeddings of eight base patches of noise and a 2x patch."""
        adapter, noise, side = self._adapter, self._noise, 2 * self._adapter.patch_size
        if noise is None:
            noise = torch.randn(2, adapter.in_chans, side, side, generator=torch.Generator().manual_seed(0))
            self._noise = noise = noise.to(adapter.device, adapter.dtype)
        parts = [noise[:0], *adapter.position_parameters()]
        # Book-keeping, and no operation of the model: modes that count operations do not see it.
        with torch.autocast(adapter.device.type, enabled=False), _disable_current_modes():
            if maps:
                parts.append(adapter.patch_embed(noise))  # (2, D, 2, 2)
            if maps and self._coarse is not None:
                parts.append(self._coarse(parts[-1][:1]))
        return torch.cat([part.flatten() for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None, "_noise": None}
