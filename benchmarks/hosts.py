"""Models around a ViT beside their own forward: what docs/hosts.md lists, with the largest errors.

    python benchmarks/hosts.py            # writes results/hosts-VERSION.{json,md} and docs/hosts.md

Tiny random configurations of the tests (tests/models/around_hosts.py), float32, CPU. The page joins the records of all
versions of transformers; `make hosts-matrix` makes them in two environments.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.models.around_hosts import HOSTS, make  # noqa: E402
from tests.models.test_around import as_rows, random_layout  # noqa: E402

import aptvit  # noqa: E402
from aptvit.models.around_check import largest_difference, run_on_full_grids  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "hosts.md"
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
NOT_MEASURED = "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    transformers.logging.set_verbosity_error()
    record = {
        "command": "python benchmarks/hosts.py",
        "environment": {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": sys.version.split()[0],
        },
        "hosts": [measure(name) for name in HOSTS],
        "refused": [refusal(name, build) for name, build in REFUSED.items()],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"hosts-{transformers.__version__}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{file.stem}.md").write_text(as_markdown([record]), encoding="utf-8")
    files = sorted(RESULTS.glob("hosts-*.json"), key=lambda path: [int(n) for n in path.stem[6:].split(".")[:3]])
    records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    PAGE.write_text(as_markdown(records), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def measure(name: str) -> dict[str, Any]:
    """A host of the tests: its class, how it is adapted, and its errors; or why this version has none."""
    try:
        example = make(name)
    except Exception as error:  # a version of transformers that has no such class, or other options
        return {"name": name, "missing": " ".join(str(error).split())[:120] or type(error).__name__}
    row: dict[str, Any] = {"name": name, "class": type(example.host).__name__}
    try:
        start = time.perf_counter()
        model = aptvit.adapt(example.host, scales=2, init="nonzero")
        row["seconds"] = time.perf_counter() - start
    except ValueError as error:
        return {**row, "refused": " ".join(str(error).split())}
    inner, images = model.aptvit.inner, example.images()
    row |= {"vit": type(inner.core).__name__, "reads": reads_of(inner)}
    with torch.no_grad():
        expected = example(example.host, images)
        with model.aptvit.calling(model.aptvit.layout(images, keep=1.0), packs_always=True):
            row["nothing merged"] = largest_difference(example(model, images), expected)
        layout, layers = random_layout(model, images), []
        hook = inner.layers[-1].register_forward_hook(
            lambda _m, _i, out: layers.append(out[0] if isinstance(out, tuple) else out)
        )
        with model.aptvit.calling(layout):
            inner.core(images)
        hook.remove()
        oracle = run_on_full_grids(model, example.host, images, layout)
    assert oracle.kept is not None
    kept = nn.functional.pad(oracle.kept, (oracle.layers[-1].shape[1] - oracle.kept.shape[1], 0), value=True)
    row["merged"] = largest_difference(as_rows(model, layers[0])[kept], oracle.layers[-1][kept])
    return row


def reads_of(inner: Any) -> str:
    """What is special about a ViT, in words."""
    kinds = [
        ("clips", inner.depth > 1),
        ("windows", inner.num_windows > 1),
        ("maps in padded windows", inner.map_attention is not None),
        ("rotary positions", inner.has_rotation or inner.rotates_in_attention),
        ("bias of positions", any("RelativePositionBias" in type(m).__name__ for m in inner.core.modules())),
        ("padded patches", bool(inner.shift)),
    ]
    return ", ".join(word for word, applies in kinds if applies) or "images"


def refusal(name: str, build: Any) -> dict[str, str]:
    """The message with which a model is refused."""
    try:
        host = build()
    except Exception as error:
        return {"name": name, "missing": " ".join(str(error).split())[:120] or type(error).__name__}
    try:
        aptvit.adapt(host.eval(), keep=0.5)
    except ValueError as error:
        reason = " ".join(str(error).split()).removeprefix("cannot adapt this model: ")
        return {"name": name, "reason": reason.split(". docs/")[0].split(". check=False")[0]}
    raise AssertionError(f"{name} was not refused")


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", **TINY, "image_size": 32, "patch_size": 8}
    text = {"model_type": "llama", **TINY, "vocab_size": 32}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def _swin() -> Any:
    return transformers.SwinModel(
        transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


def _small(kind: str, **options: Any) -> Any:
    def build() -> Any:
        name = getattr(transformers, kind)
        return name(name.config_class(**{**TINY, "image_size": 64, "patch_size": 8, **options}))

    return build


REFUSED = {
    "LlavaForConditionalGeneration": _llava,
    "SwinModel": _swin,
    "YolosModel": _small("YolosModel", image_size=[64, 64]),
    "ViTMAEModel": _small("ViTMAEModel"),
    "VideoMAEForPreTraining": _small("VideoMAEForPreTraining", num_frames=4, decoder_num_hidden_layers=1),
    "BlipVisionModel": _small("BlipVisionModel"),
    "FlavaImageModel": _small("FlavaImageModel"),
    "GitVisionModel": _small("GitVisionModel"),
}


def as_markdown(records: list[dict[str, Any]]) -> str:
    """The page of all versions of transformers."""
    versions = [record["environment"]["transformers"] for record in records]
    newest = records[-1]
    lines = [
        "# Models with a ViT inside",
        "",
        "`aptvit.adapt` takes these models of transformers as they are ([how](how-to/models-around-a-vit.md)). Made by",
        "`python benchmarks/hosts.py`, on tiny random configurations in float32, with "
        + "; ".join(
            f"transformers {r['environment']['transformers']} and torch {r['environment']['torch']}" for r in records
        )
        + ".",
        "",
        "*Nothing merged* is the largest difference of the host's output, relative to its largest value, when all",
        "layers run on packed tokens; *merged* that of the last layer beside the host on full grids whose hidden cells",
        "nobody reads. *Check* is the time in seconds of the comparison that `adapt` makes itself.",
        "",
        f"| class | ViT inside | reads | {' | '.join(f'nothing merged, {v}' for v in versions)} | merged | check |",
        f"|---|---|---|{'---:|' * len(versions)}---:|---:|",
    ]
    by_version = [{row["name"]: row for row in record["hosts"]} for record in records]
    for row in newest["hosts"]:
        errors = " | ".join(_error(rows.get(row["name"], {}), "nothing merged") for rows in by_version)
        if "refused" in row or "missing" in row:
            lines.append(
                f"| `{row.get('class', row['name'])}` | | {row.get('refused', row.get('missing'))} | {errors} | | |"
            )
            continue
        lines.append(
            f"| `{row['class']}` | `{row['vit']}` | {row['reads']} | {errors} | {_error(row, 'merged')} | "
            f"{row['seconds']:.1f} |"
        )
    lines += [
        "",
        "Also: bare towers and classifiers ([Hugging Face towers](how-to/hugging-face.md)), [timm's names]"
        "(reference/models.md) with NaFlexVit, the VisionTransformer of torchvision and of open_clip, models of "
        "open_clip around it or around a model of timm, and `TimmWrapperForImageClassification`.",
        "",
        "## Refused",
        "",
        "| class | because |",
        "|---|---|",
    ]
    lines += [f"| `{row['name']}` | {row.get('reason', row.get('missing'))} |" for row in newest["refused"]]
    return "\n".join(lines) + "\n"


def _error(row: dict[str, Any], key: str) -> str:
    if "missing" in row or not row:
        return "no such class"
    return "refused" if "refused" in row else f"{row[key]:.0e}" if row[key] else "0"


if __name__ == "__main__":
    main()
