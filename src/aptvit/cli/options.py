"""Shared options of the commands: the same name, meaning and default in all of them. Imports neither torch nor timm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODEL = "vit_base_patch16_384"
KEEPS = "0.83,0.67,0.51"
ImagesArgument = Annotated[list[Path], typer.Argument(help="Images, and folders of images.", metavar="IMAGES...")]
OptionalImagesArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Images, and folders of images; by default the photos that scikit-image and scikit-learn install.",
        metavar="[IMAGES...]",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Name of a timm model, or a folder that heal, finetune or save_pretrained wrote. compare, calibrate and "
        "demo also take models of transformers: a folder, or a name (owner/name) on the Hugging Face hub.",
        metavar="NAME",
    ),
]
TextOption = Annotated[
    str | None,
    typer.Option("--text", help="What models of open vocabulary look for.", metavar='"a cat,a dog"'),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Folder of a finished training.", metavar="FOLDER")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="File with weights to load instead of timm's.", metavar="FILE")
]
ImgSizeOption = Annotated[
    int | None, typer.Option("--img-size", help="Side of the input in pixels; the model's own by default.", min=1)
]
SizesOption = Annotated[
    str | None,
    typer.Option("--sizes", help="Sides of the input in pixels; the model's own by default.", metavar="224,384"),
]
KeepOption = Annotated[
    float | None,
    typer.Option(
        "--keep",
        help="Share of the patch tokens to keep; by default that of the recipe or of the saved model, else 0.5.",
        metavar="SHARE",
    ),
]
GflopsOption = Annotated[
    float | None,
    typer.Option("--gflops", help="Another target: mean billions of operations per image, two per multiply-add."),
]
KeepsOption = Annotated[str, typer.Option("--keeps", help="Shares of the patch tokens to measure.", metavar="0.67,0.5")]
ThresholdsOption = Annotated[
    str | None,
    typer.Option(
        "--thresholds",
        help="Thresholds instead of --keep, from fine to coarse, one for each size above the base patch.",
        metavar="5.5 4.0",
    ),
]
PerImageOption = Annotated[
    bool, typer.Option("--per-image", help="Every image keeps the share of --keep, not only the average.")
]
ScalesOption = Annotated[
    int | None,
    typer.Option(
        "--scales",
        help="Number of patch sizes, the base size included; 2, or one more than the thresholds.",
        min=1,
        max=6,
    ),
]
ScorerName = Literal["entropy", "laplacian", "upsample", "exact", "embedding", "glance"]
ScorerOption = Annotated[
    ScorerName,
    typer.Option(
        "--scorer",
        help="How patches are scored. glance is trained on the images first; export has the first three only.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="File that calibrate wrote, instead of --keep, --thresholds and --scales.", metavar="FILE"
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Floating-point type to compute in.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="Device to run on: cpu, cuda, cuda:1; by default a GPU if there is one.", metavar="DEVICE"
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        help="Images per batch; in training, per update of all processes. By default 8, or that of the recipe.",
        min=1,
    ),
]
RoundsOption = Annotated[
    int | None,
    typer.Option("--rounds", help="Number of timed rounds; by default 5, in compare fewer for many images.", min=1),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the results; by default the name of the command.", metavar="FOLDER"),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Name of the files, without suffix; by default the device.", metavar="NAME"),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Repeat measurements that are in the files already.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output, and all messages to standard error.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Name of a recipe, or a YAML file; by default the usual recipe of the command.", metavar="NAME"
    ),
]
TrainSplitOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Training split: a folder, file, list or shards, by itself or inside DATA, or the name of a split of a "
        "dataset of the hub. By default what names in DATA say.",
        metavar="SPLIT",
    ),
]
ValSplitOption = Annotated[
    str | None,
    typer.Option(
        "--val", help="Validation split to evaluate on, in the same way; else the test split.", metavar="SPLIT"
    ),
]
EpochsOption = Annotated[
    int | None, typer.Option("--epochs", help="Number of passes over the images; by default that of the recipe.", min=1)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the recipe; can be repeated.", metavar="NAME=VALUE"),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")]
AllowChangesOption = Annotated[
    bool,
    typer.Option(
        "--allow-changes",
        help="With --resume: continue also if recipe, model or data are not those of the checkpoint.",
    ),
]
PrintConfigOption = Annotated[bool, typer.Option("--print-config", help="Print all settings of the recipe, and stop.")]
StartOption = Annotated[
    Path | None,
    typer.Option("--start", help="Folder of a training to start from, usually of the uniform model.", metavar="FOLDER"),
]
MethodOption = Annotated[
    Literal["apt", "uniform", "resize", "downscale", "tome", "random"] | None,
    typer.Option(
        "--method",
        help="Method to train; resize is apt without the sub-patch branch, the last three are baselines, for heal "
        "only. By default that of the recipe.",
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option("--size", help="Side of the training crops in pixels; by default that of the recipe.", min=32),
]


class NumbersAfterThresholds(typer.core.TyperCommand):
    """A command in which ``--thresholds 5.5 4.0`` takes all numbers that follow."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", arg) and "--thresholds" in (joined[-1:] + joined[-2:-1]):
                if joined[-1] == "--thresholds":
                    joined.append(arg)
                else:
                    joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)
