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
    cached: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The kept value of ``compute`` for this key, or a new one."""
        value = self.cached.get(key)
        if value is None:  # threads that compute at once compute the same
            value = self.cached[key] = compute()
            for oldest in list(self.cached)[:-_CAPACITY]:
                self.cached.pop(oldest, None)
        return value


@dataclass(frozen=True, eq=False)
class FreshnessCheck:
    """Whether kept values are those of the host as it is now.

    Attributes:
        values: The kept values; None where there are none.
        fingerprint: (n,) of the host as it is now.
        same: () bool on the CPU. Of a GPU it is there when the stream has been waited for.
    """

    values: DerivedValues | None
    fingerprint: Tensor
    is_fresh: Tensor


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
    def check(self) -> FreshnessCheck:
        """Compare what is kept with the host. Does not wait for the device."""
        values, now = self._values, self._fingerprint()
        if values is None or (values.fingerprint.shape, values.fingerprint.device) != (now.shape, now.device):
            return FreshnessCheck(None, now, torch.zeros((), dtype=torch.bool))
        return FreshnessCheck(values, now, (values.fingerprint == now).all().to("cpu", non_blocking=now.is_cuda))

    @torch.no_grad()
    def fresh(self, check: FreshnessCheck, waited: bool) -> DerivedValues:
        """The values of the host as it is now.

        Args:
            check: From `check`.
            waited: The device was waited for since; otherwise this waits.
        """
        if check.values is None:
            return self._derive(check)
        if not waited and check.fingerprint.is_cuda:
            torch.cuda.current_stream(check.fingerprint.device).synchronize()
        return check.values if bool(check.is_fresh) else self._derive(check)

    def maps_for_scoring(self) -> AffineMaps:
        """The affine maps of the host as it is now. Does not wait for a GPU: there they are found anew."""
        if self._adapter.device.type == "cpu" and not self._adapter.vit.training:
            return self.fresh(self.check(), waited=False).maps
        return self._find_maps()

    def clear(self) -> None:
        """Forget what is kept."""
        self._values = self._noise = None

    def _derive(self, check: FreshnessCheck) -> DerivedValues:
        values = DerivedValues(check.fingerprint, self._find_maps())
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

    def _fingerprint(self) -> Tensor:
        """(n,) embeddings of two 2x patches of noise, which are eight base patches, and the tables of positions."""
        adapter, noise, side = self._adapter, self._noise, 2 * self._adapter.patch_size
        if noise is None:
            noise = torch.randn(2, adapter.in_chans, side, side, generator=torch.Generator().manual_seed(0))
            self._noise = noise = noise.to(adapter.device, adapter.dtype)
        # Book-keeping, and no operation of the model: modes that count operations do not see it.
        with torch.autocast(adapter.device.type, enabled=False), _disable_current_modes():
            cells = adapter.patch_embed(noise)  # (2, D, 2, 2)
            parts = [cells, *adapter.position_parameters()]
            if self._coarse is not None:
                parts.append(self._coarse(cells))
        return torch.cat([part.flatten() for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None, "_noise": None}
