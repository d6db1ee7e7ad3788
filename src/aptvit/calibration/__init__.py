"""Thresholds from a target: a share of the tokens, operations or a speed-up, on given images.

May import `aptvit.api` and all below it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aptvit.calibration.calibrator import Calibration, Calibrator, HeldBack, Target, calibrate

if TYPE_CHECKING:
    from aptvit.calibration.files import (
        FilesCalibration,
        ImageStream,
        calibrate_files,
        write_config,
    )

__all__ = [
    "Calibration",
    "Calibrator",
    "FilesCalibration",
    "HeldBack",
    "ImageStream",
    "Target",
    "calibrate",
    "calibrate_files",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # names of files.py need timm, which takes seconds to import
        return getattr(importlib.import_module("aptvit.calibration.files"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
