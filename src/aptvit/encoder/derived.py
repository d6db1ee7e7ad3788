"""Values that follow from a host's parameters, kept between calls and never stale."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from aptvit.hosts.adapter import Adapter
from aptvit.layers.patch_embed import COARSE_PREFIX, AffineMaps, embed_directly

__all__ = ["DerivedValues", "DerivedWeights"]

T = TypeVar("T")
_CAPACITY = 32  # grids whose positions are kept


@dataclass(frozen=True, eq=False)
class DerivedValues:
    """What was derived from a host in one state.

    Attributes:
        fingerprint: What the host's modules gave in that state, and copies of the tables that positions are made of.
        maps: The affine maps of patches.
        kept: Other values by their key.
    """

    fingerprint: list[Tensor]
    maps: AffineMaps
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The kept value of ``compute`` for this key, or a new one."""
        if key not in self.kept:
            while len(self.kept) >= _CAPACITY:
                self.kept.pop(next(iter(self.kept)), None)
            self.kept[key] = compute()
        return self.kept[key]


@dataclass(frozen=True, eq=False)
class Check:
    """Whether kept values are those of the host as it is now.

    Attributes:
        values: The kept values; None where there are none.
        fingerprint: Of the host as it is now.
        same: () bool on the CPU. Of a GPU it is there when the stream has been waited for.
    """

    values: DerivedValues | None
    fingerprint: list[Tensor]
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

    @torch.no_grad()
    def check(self) -> Check:
        """Compare what is kept with the host. Does not wait for the device."""
        values, now = self._values, self._fingerprint()
        same = torch.zeros((), dtype=torch.bool)
        if values is not None and [t.shape for t in values.fingerprint] == [t.shape for t in now]:
            pairs = zip(values.fingerprint, now, strict=True)
            same = torch.stack([(a == b).all() for a, b in pairs if a.device == b.device] or [same]).all()
            same = same.to("cpu", non_blocking=same.is_cuda)
        return Check(values, now, same)

    @torch.no_grad()
    def fresh(self, check: Check, waited: bool) -> DerivedValues:
        """The values of the host as it is now.

        Args:
            check: From `check`.
            waited: The device was waited for since; otherwise this waits.
        """
        if check.values is None:
            return self._derive(check)
        if not waited and check.fingerprint[0].is_cuda:
            torch.cuda.current_stream(check.fingerprint[0].device).synchronize()
        return check.values if bool(check.same) else self._derive(check)

    def maps_for_scoring(self) -> AffineMaps:
        """The affine maps of the host as it is now. Does not wait for a GPU: there they are found anew."""
        if self._adapter.device.type == "cpu" and not self._adapter.vit.training:
            return self.fresh(self.check(), waited=False).maps
        return self._find_maps()

    def clear(self) -> None:
        """Forget what is kept."""
        self._values = None

    def _derive(self, check: Check) -> DerivedValues:
        values = DerivedValues([tensor.clone() for tensor in check.fingerprint], self._find_maps())
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

    def _fingerprint(self) -> list[Tensor]:
        """Embeddings of two 2x patches of noise, eight base patches, and the tables of positions."""
        adapter, side = self._adapter, 2 * self._adapter.patch_size
        noise = torch.randn(2, adapter.in_chans, side, side, generator=torch.Generator().manual_seed(0))
        index = torch.arange(2)
        places = (index, index * 0, index * 0)
        with torch.autocast(adapter.device.type, enabled=False):
            images = noise.to(adapter.device, adapter.dtype)
            rows = embed_directly(adapter.patch_embed, self._coarse, images, [places, places])
        return [*rows, *adapter.position_parameters()]

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivedWeights:
        import copy

        return DerivedWeights(copy.deepcopy(self._adapter, memo))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None}
