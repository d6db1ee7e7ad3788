"""Export of adaptive models as ONNX and torch.export graphs, and the comparison of a graph with its model.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.export.graphs import Exported, Reader, ScaleSelector, WholePath, export_onnx, export_torch

__all__ = ["Exported", "Reader", "ScaleSelector", "WholePath", "export_onnx", "export_torch"]
