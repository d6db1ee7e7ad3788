"""Adaptive models as graphs for ONNX and torch.export, and the check that a graph answers as its model does.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.export.graphs import Chooser, Exported, Reader, WholePath, export_onnx, export_torch

__all__ = ["Chooser", "Exported", "Reader", "WholePath", "export_onnx", "export_torch"]
