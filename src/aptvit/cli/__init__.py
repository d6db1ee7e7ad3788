"""The command line: one file for each command, and `options.py` for what they share.

May import every other package, inside the commands only: `aptvit --help` needs neither torch nor timm.
"""

from __future__ import annotations

import sys

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
from aptvit.cli.show import show
from aptvit.cli.train_dense import train_detector, train_segmenter
from aptvit.cli.vqa import vqa

__all__ = ["app", "main"]

app = typer.Typer(
    name="aptvit",
    help="Adaptive patch sizes for pretrained Vision Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command(cls=NumbersAfterThresholds)(compare)
app.command()(calibrate)
app.command()(evaluate)
app.command()(embed)
app.command()(finetune)
app.command()(heal)
app.command(cls=NumbersAfterThresholds)(export)
app.command()(train_detector)
app.command()(train_segmenter)
app.command()(detect)
app.command()(segment)
app.command()(benchmark)
app.command(cls=NumbersAfterThresholds)(show)
app.command(cls=NumbersAfterThresholds)(vqa)
app.command()(demo)
app.command()(models)


def main() -> None:
    """Entry point: a wrong value is one line and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"aptvit: {error}", file=sys.stderr)
        raise SystemExit(2) from None
