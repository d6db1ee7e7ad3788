"""What a user sets of an adaptive model at any time: thresholds, the share to keep, all limits."""

from __future__ import annotations

from collections.abc import Sequence

from aptvit.patching.budget import Budget
from aptvit.patching.patchifier import Patchifier

__all__ = ["WEIGHTS_FILE", "BudgetSettings"]

WEIGHTS_FILE = "aptvit.safetensors"
"""The sub-patch branch beside `aptvit.files.model_folders.SETTINGS_FILE`."""


class BudgetSettings:
    """Settings of a patchifier, as attributes of the model that holds it.

    Settings can be changed at any time; a call reads them once, at its start.

    Attributes:
        patchifier: Cuts images into patches.
    """

    patchifier: Patchifier

    @property
    def budget(self) -> Budget:
        """Thresholds, share and limits."""
        return self.patchifier.budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self.patchifier.budget = value

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Thresholds from fine to coarse; None if ``keep`` alone is set."""
        return self.budget.thresholds

    @thresholds.setter
    def thresholds(self, value: float | Sequence[float]) -> None:
        self.budget = self.budget.with_thresholds(value)

    @property
    def keep(self) -> float | None:
        """Share of its patch tokens that every image keeps; None if thresholds alone are set."""
        return self.budget.keep

    @keep.setter
    def keep(self, value: float) -> None:
        self.budget = self.budget.with_keep(value)

    @property
    def num_scales(self) -> int:
        """Number of patch sizes, the base size included."""
        return self.patchifier.num_scales

    @property
    def patch_size(self) -> int:
        """Side of a base patch in pixels."""
        return self.patchifier.patch_size
