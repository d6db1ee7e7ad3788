"""With nothing merged, is it the host? Every adaptable timm name against timm's own forward.

    python benchmarks/exactness.py                # all names, writes benchmarks/results/exactness.{json,md}
    python benchmarks/exactness.py "*dinov3*"     # some names, prints only

Two blocks deep, random weights, one image of the model's own size, three scales with negative thresholds, float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track

import aptvit
from aptvit.hosts.catalogue import describe_model, model_names
from aptvit.measuring.tables import Columns, markdown_page, markdown_table
from aptvit.storage.writing import write_json

RESULTS = Path(__file__).parent / "results"
LIMIT = 1e-5


def build(name: str, depth: int = 2) -> Any:
    """The model, two blocks deep."""
    options: dict[str, Any] = {"depth": depth}
    if "sapiens2" in name:  # these give the number of key and value heads block by block
        with torch.device("meta"):
            blocks = timm.create_model(name).blocks
        options["num_kv_heads"] = [getattr(block.attn, "num_kv_heads", None) for block in blocks[:depth]]
    return timm.create_model(name, **options).eval()


@torch.inference_mode()
def relative_error(name: str) -> float:
    """Largest difference of the logits over the largest logit."""
    torch.manual_seed(0)
    host = build(name)
    images = torch.randn(1, 3, *host.patch_embed.img_size)
    expected = host(images)
    difference = aptvit.adapt(host, thresholds=(-1.0, -1.0))(images) - expected
    return float(difference.abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="of timm names; all if there is none")
    patterns = parser.parse_args().patterns
    names = model_names(*patterns)
    adaptable = [name for name in track(names, "building models") if describe_model(name).reason is None]
    errors = {name: relative_error(name) for name in track(adaptable, "comparing outputs")}
    worst = max(errors, key=errors.__getitem__)
    print(f"{len(errors)} names, largest relative error {errors[worst]:.1e} ({worst})")
    if not patterns:
        versions = {"torch": torch.__version__, "timm": timm.__version__, "device": "cpu", "dtype": "float32"}
        record = {"command": "python benchmarks/exactness.py", **versions, "limit": LIMIT, "relative_error": errors}
        write_json(RESULTS / "exactness.json", record, indent=1)
        (RESULTS / "exactness.md").write_text(as_markdown(record))
    wrong = [name for name, error in errors.items() if not error <= LIMIT]
    if wrong:
        raise SystemExit(f"above {LIMIT}: {', '.join(wrong)}")


def as_markdown(record: dict[str, Any]) -> str:
    errors = record["relative_error"]
    about = (
        "Largest difference of the logits over the largest logit, two blocks deep, random weights, one image of the "
        f"model's own size, three scales with negative thresholds. {len(errors)} names, largest error "
        f"{max(errors.values()):.1e}, limit {record['limit']}."
    )
    columns: Columns = (("name", lambda item: f"`{item[0]}`"), ("relative error", lambda item: f"{item[1]:.1e}"))
    environment = {name: record[name] for name in ("torch", "timm", "device", "dtype")}
    table = markdown_table(columns, list(errors.items()))
    return markdown_page("With nothing merged, is it the host?", [record["command"]], environment, about, table)


if __name__ == "__main__":
    main()
