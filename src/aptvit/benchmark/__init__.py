"""Speed of adaptive models against their uniform hosts, case by case, for inference and for training.

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.benchmark.record import Case, Memory, Record, Row
from aptvit.benchmark.report import as_markdown, as_table, write_plots
from aptvit.benchmark.run import run_benchmark

__all__ = ["Case", "Memory", "Record", "Row", "as_markdown", "as_table", "run_benchmark", "write_plots"]
