"""The map: accuracy against measured time, tokens and operations, for adaptive patches and their rivals.

record = run_evaluation(Path("photos"), load, "vit_tiny_patch16_224", parse_methods(["apt-entropy", "tome"], [0.67]))

May import `aptvit.training`, `aptvit.report` and all below them.
"""

from aptvit.evaluation.bootstrap import Interval, bootstrap_mean
from aptvit.evaluation.methods import DEFAULT_METHODS, RIVALS, Method, parse_methods
from aptvit.evaluation.plot import write_plot
from aptvit.evaluation.record import Record, Row
from aptvit.evaluation.run import Conditions, run_evaluation
from aptvit.evaluation.table import as_markdown, as_tables
from aptvit.evaluation.write import write_results
from aptvit.files.labelled import LabelledImages, find_labelled

__all__ = [
    "DEFAULT_METHODS",
    "RIVALS",
    "Conditions",
    "Interval",
    "LabelledImages",
    "Method",
    "Record",
    "Row",
    "as_markdown",
    "as_tables",
    "bootstrap_mean",
    "find_labelled",
    "parse_methods",
    "run_evaluation",
    "write_plot",
    "write_results",
]
