"""The command line. Each command has a file that parses options and prints results; `options.py` has the shared parts.

May import every other package, but only inside the commands: `aptvit --help` needs neither torch nor timm.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from aptvit.cli.benchmark import benchmark
from aptvit.cli.calibrate import calibrate
from aptvit.cli.compare import compare
from aptvit.cli.demo import demo
from aptvit.cli.embed import embed
from aptvit.cli.evaluate import evaluate
from aptvit.cli.export import export
from aptvit.cli.find import detect, segment
from aptvit.cli.finetune import finetune
from aptvit.cli.heal import heal
from aptvit.cli.models import models
from aptvit.cli.options import NumbersAfterThresholds
from aptvit.cli.output import BAD_INPUT, FAILED
from aptvit.cli.reference import reference_command
from aptvit.cli.show import show
from aptvit.cli.train_dense import train_detector, train_segmenter
from aptvit.cli.tune import tune
from aptvit.cli.vqa import vqa
from aptvit.storage.writing import WriteError

__all__ = ["app", "main"]

app = typer.Typer(
    name="aptvit",
    help="Adaptive patch sizes for pretrained Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(compare, show, calibrate, tune, evaluate, benchmark, models, demo, embed, export, vqa),
    *(heal, finetune, train_detector, train_segmenter, detect, segment),
)
for _command in _COMMANDS:
    app.command(cls=NumbersAfterThresholds)(_command)
app.command(hidden=True)(reference_command(app))


_format_warning = warnings.formatwarning


def _one_line(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> str:
    """A warning of aptvit without the place in the source; others as Python prints them."""
    if category.__module__.partition(".")[0] == "aptvit":
        return f"aptvit: {message}\n"
    return _format_warning(message, category, *place, **options)


def main() -> None:
    """Run the command line.

    Wrong input and missing extras print one line and end with exit code 2; files that cannot be written, and processes
    that cannot be reached, with 1.
    """
    warnings.formatwarning = _one_line
    try:
        app()
    except (ValueError, ImportError) as error:
        if isinstance(error, ImportError) and "pip install" not in str(error):
            raise
        print(f"aptvit: {error}", file=sys.stderr)
        raise SystemExit(BAD_INPUT) from None
    except (WriteError, ConnectionError) as error:
        print(f"aptvit: {error}", file=sys.stderr)
        raise SystemExit(FAILED) from None
