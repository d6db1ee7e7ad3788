"""Fill the tables of README and docs from benchmarks/results: python docs/make_tables.py

A page marks a table with ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between is written here, from the
files that benchmarks wrote. No number is typed. `tests/test_docs.py` fails where a page and the files differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

MINUS = "\N{MINUS SIGN}"

Row = dict[str, str]


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(page, text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(page.relative_to(ROOT))


def fill(page: Path, text: str) -> str:
    """The text of a page with all its tables written anew."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]](page) + "\n" + found[3], text)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def link(page: Path, name: str) -> str:
    """From a page to a file of results."""
    return Path(os.path.relpath(RESULTS / f"{name}.md", page.parent)).as_posix()


def read_json(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_rows(name: str, section: str = "") -> list[Row]:
    """The first table of a file of results, or of one of its sections, as one dictionary for each row.

    Raises:
        ValueError: There is no such table.
    """
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    _, heading, rest = text.partition(f"\n## {section}") if section else ("", "all", text)
    table = re.search(r"(?:^\|.*\n?)+", rest, re.MULTILINE)
    if not heading or table is None:
        raise ValueError(f"{name}.md has no table in a section {section!r}")
    headings, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in table[0].splitlines()]
    return [dict(zip(headings, cells, strict=True)) for cells in found]


def origin(page: Path, *names: str) -> str:
    """Which commands made files of results, on what, and where they are."""
    lines = []
    for name in names:
        text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
        facts = dict(re.findall(r"^- ([\w ]+): (.+)$", text, re.MULTILINE))
        versions = [f"{part} {facts[part]}" for part in ("python", "torch", "timm", "transformers") if part in facts]
        where = ", ".join([facts["device"], facts["machine"].removesuffix(", Linux x86_64"), *versions])
        commands = re.search(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        made = commands[1].splitlines() if commands else []
        first = f"`{shortened(made[0])}`" + (f" and {len(made) - 1} more" if len(made) > 1 else "")
        lines.append(f"- [{name}]({link(page, name)}): {first}; {where}")
    return "\n".join(lines)


def shortened(command: str) -> str:
    return command if len(command) <= 150 else f"{command[:150].rsplit(' ', 1)[0]} …"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", MINUS)


def accuracy(name: str, method: str, keep: float | None) -> Any:
    (row,) = [
        row
        for row in read_json(name)["rows"]
        if (row["method"]["name"], row["method"]["keep"]) == (method, keep) and row["size"] == 224
    ]
    return row


def readme(page: Path) -> str:
    test, streets, cells = "accuracy-test-cpu", "dense-speed-720-float32-cpu", "dense-speed-heads-cpu"
    uniform = accuracy(test, "uniform", None)["top1_share"]["mean"]
    rows = []
    for keep in (0.67, 0.51):
        row = [f"500 ImageNet photos, ViT-Ti/16 at 224 px: top-1 {100 * uniform:.1f}", f"{keep:.0%}".replace("%", " %")]
        for method in ("apt-glance", "downscale", "tome"):
            found = accuracy(test, method, keep)
            lost, faster = 100 * (found["top1_share"]["mean"] - uniform), 1 / found["time"]["median"]
            row.append(f"{signed(lost)}, {faster:.2f}x")
        rows.append(row)
    street_scenes = ("CamVid, UperNet on ViT-Ti/16 at 720 px: mean IoU", "dense-720-cpu", "Segmentation", "preview")
    blood_cells = ("BCCD, Faster R-CNN on ViT-Ti/16 at 480 px: mAP", "dense-480-long-cpu", "Detection", _BIASED)
    timed = {street_scenes: (streets, "segmenter", "720x512"), blood_cells: (cells, "detector", "512x384")}
    for task in (street_scenes, blood_cells):
        what, name, section, method = task
        measured = read_rows(name, section)
        whole = next(row for row in measured if row["method"] == "start")
        for share in (70, 50):
            pair = near(measured, method, share), near(measured, "downscaled", share)
            found = [f"{difference(row)}, {faster_by(*timed[task], row is pair[1], share)}x" for row in pair]
            rows.append([f"{what} {score(whole)}", tokens(pair[0]), *found, "not available"])
    headings = ("data, model, uniform", "tokens", "adaptive patches", "smaller image", "ToMe")
    sources = ", ".join(
        f"[{name}]({link(page, name)})" for name in (test, "dense-720-cpu", streets, "dense-480-long-cpu", cells)
    )
    return f"{markdown(headings, rows)}\n\nPoints to the uniform model, and times as fast. From {sources}."


_BIASED = "spread, area bias 0.5"
_CELLS = "dense-480-two-passes-cells-cpu"


def near(rows: list[Row], method: str, share: int) -> Row:
    """The row of a method whose share of the tokens is at most two points from the one asked for."""
    (row,) = [row for row in rows if row["method"] == method and abs(int(tokens(row)[:-2]) - share) <= 2]
    return row


def tokens(row: Row) -> str:
    """Of a row of results: 70 % for "70% (70%)"."""
    return re.sub(r"%.*", " %", row["tokens"])


def score(row: Row) -> str:
    return row.get("after: miou") or row["after: map"]


def difference(row: Row) -> str:
    return row["to uniform"].replace("-", MINUS)


def faster_by(name: str, part: str, size: str, smaller: bool, share: int) -> str:
    """Speed-up of a detector or segmenter."""
    wanted = re.compile(r"smaller \w+, ([\d.]+)" if smaller else r"keep ([\d.]+)")
    matched = [(row, wanted.fullmatch(row["patches"])) for row in read_rows(name)]
    (speed_up,) = [
        row["speed-up (rounds)"].split()[0]
        for row, found in matched
        if found and abs(100 * float(found[1]) - share) <= 1 and (row["part"], row["size"]) == (part, size)
    ]
    return speed_up


def methods(name: str) -> Callable[[Path], str]:
    """Time, top-1 and agreement of the methods at 224 pixels."""

    def write(page: Path) -> str:
        columns = ("method", "setting", "tokens", "time", "top-1", "agreement")
        rows = [[row[column] for column in columns] for row in read_rows(name, "224 px")]
        return f"{markdown(columns, rows)}\n\n{origin(page, name)}"

    return write


def part(
    name: str, section: str, columns: Sequence[str], cited: bool = True, headings: Sequence[str] | None = None
) -> Callable[[Path], str]:
    """Some columns of a table of results, as it is, and where it is from."""

    def write(page: Path) -> str:
        rows = [[row[column] for column in columns] for row in read_rows(name, section)]
        table = markdown(headings or columns, rows)
        return f"{table}\n\n{origin(page, name)}" if cited else table

    return write


DENSE = (
    # what, file, section, method
    ("CamVid at 480 px, `spread`", "dense-chosen-cpu", "Segmentation", "chosen"),
    ("CamVid at 480 px, second seed, `preview`", "dense-480-preview-cpu", "Segmentation", "preview"),
    ("CamVid at 720 px, `preview`", "dense-720-cpu", "Segmentation", "preview"),
    ("CamVid at 960 px, `preview` on top", "dense-960", "Segmentation", "preview-choice"),
    ("CamVid at 960 px, `preview` on top, area bias 0.5", "dense-960", "Segmentation", "preview-choice, area bias 0.5"),
    ("CamVid at 1440 px, `preview` on top", "dense-1440", "Segmentation", "preview-choice"),
    ("BCCD at 480 px, entropy, healed", "dense-480-cpu", "Detection", "heal"),
    ("BCCD at 480 px, `spread`, healed", "dense-480-cpu", "Detection", "spread"),
    ("BCCD at 480 px, `spread`, area bias 0.5, healed four times as long", "dense-480-long-cpu", "Detection", _BIASED),
    ("BCCD at 480 px, `preview`, area bias 0.5", _CELLS, "Detection", "preview, area bias 0.5"),
)


def dense(page: Path) -> str:
    rows = []
    for what, name, section, method in DENSE:
        found = read_rows(name, section)
        cells = [f"[{what}]({link(page, name)})", score(next(row for row in found if row["method"] == "start"))]
        for share in (70, 50):
            for which in (method, "downscaled"):
                try:
                    row = near(found, which, share)
                    cells.append(difference(row) if which != method else f"{difference(row)} at {tokens(row)}")
                except ValueError:
                    cells.append("")
        rows.append(cells)
    headings = ("data, scorer", "uniform", "about 70 %", "smaller image", "about 50 %", "smaller image")
    return markdown(headings, rows)


def two_passes(page: Path) -> str:
    speeds = ("dense-speed-720-float32-cpu", "dense-speed-720-bfloat16-cpu", "dense-speed-720-bfloat16-one-core-cpu")
    found = read_rows("dense-720-cpu", "Segmentation")
    rows = []
    for method, share in (("preview", 69), ("preview", 57), ("preview", 50), ("downscaled", 70), ("downscaled", 50)):
        row = near(found, method, share)
        smaller = method == "downscaled"
        times = [faster_by(name, "segmenter", "720x512", smaller, share) for name in speeds]
        rows.append(["smaller image" if smaller else "`preview`", tokens(row), difference(row), *times])
    headings = ("", "tokens", "mean IoU to uniform", "float32, two cores", "bfloat16, two cores", "bfloat16, one core")
    return f"{markdown(headings, rows)}\n\n{origin(page, 'dense-720-cpu', *speeds)}"


def dense_speed(*names: str) -> Callable[[Path], str]:
    """Speed-up, ratio of operations and eta of a network's parts."""

    def write(page: Path) -> str:
        cells: dict[str, list[str]] = {}
        for name in names:
            for row in read_rows(name):
                if row["patches"] not in ("nothing merged", "timm"):
                    found = ", ".join([row["speed-up (rounds)"].split()[0], row["FLOP ratio"], row["eta"]])
                    cells.setdefault(f"{row['part']}, {row['size'].replace('x', ' x ')}", []).append(found)
        count = max(map(len, cells.values()))
        headings = ("", "70 % of the tokens", "50 %", "smaller image, 70 %", "50 %")[: count + 1]
        rows = [[what, *found, *[""] * (count - len(found))] for what, found in cells.items()]
        return f"{markdown(headings, rows)}\n\n{origin(page, *names)}"

    return write


def data_sets(page: Path) -> str:
    spec = importlib.util.spec_from_file_location("benchmarks_data", ROOT / "benchmarks" / "data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    rows = []
    for entry in module.ENTRIES.values():
        sources = [f"[{entry.source}]({entry.page})"]
        sources += [f"[{other}](https://github.com/{other})" for other in entry.others]
        rows.append([f"`{entry.name}`", entry.content, ", ".join(sources), entry.licence, entry.derivation])
    return markdown(("name", "content", "source", "licence", "made from the source"), rows)


_KEPT = ("kept (image by image)", "FLOP ratio", "speed-up (rounds)", "eta")
_SPEED = ("model", "type", "batch", *_KEPT, "both, of the forward")
_NOTHING = ("model", "px", "type", "batch", "cost (rounds)", "difference, of the uniform forward", "difference")
_NOTHING_HEADINGS = (*_NOTHING[:4], "whole forwards (rounds)", "without blocks, all scored", "merging disabled")
_GROWTH = ("model", "px", *_KEPT)
_TRAINING = ("model", "type", "batch", *_KEPT, "ratio")
_HEALING = ("method", "tokens", "before: top-1 / agreement / KL", "after", "training")
_LABELS = ("method", "tokens", "before: top-1", "after", "speed-up of a step")
_NEW_HEAD = ("method", "tokens", "updates", "seeds", "before: top-1", "after")
_VIDEO = ("clip", "tolerance", "tokens (frame by frame)", "agreement", "speed-up", "beside uniform")
_LLAVA = ("part", "patches", "visual tokens", "speed-up (rounds)", "FLOP ratio", "eta")
TABLES: dict[str, Callable[[Path], str]] = {
    "readme": readme,
    "accuracy_test": methods("accuracy-test-cpu"),
    "accuracy": methods("accuracy-cpu"),
    "scorers": part("accuracy-scorers-cpu", "224 px", ("method", "tokens", "agreement", "KL")),
    "speed": part("cpu", "Inference", _SPEED),
    "nothing_merged": part("cpu-zen4", "Nothing merged", _NOTHING, headings=_NOTHING_HEADINGS),
    "growth": part("cpu", "Growth with resolution", _GROWTH, cited=False),
    "training_step": part("cpu", "Training", _TRAINING, cited=False),
    "scoring_share": lambda page: markdown(
        ("model", "scorer", "share"), [list(row.values()) for row in read_rows("scoring-share-cpu")]
    ),
    "healing": part("healing-cpu", "Healing", _HEALING),
    "healing_updates": part("healing-updates-cpu", "Healing", _HEALING),
    "labels": part("training-cpu", "One epoch", _LABELS),
    "safety": part("safety-cpu", "", ("command", "rounds", "other", "this", "paired difference")),
    "safety_embed": part("safety-embed-cpu", "", ("command", "rounds", "other", "this", "paired difference")),
    "around": part("around-cpu", "", ("host, px", "part", "tokens", "speed-up", "FLOP ratio", "eta")),
    "naflex": part(
        "naflex-cpu", "", ("images", "tokens of the padded batch", "keep", "times as fast as timm's padded batch")
    ),
    "commands_whole": part("commands-whole-cpu", "", ("command", "memory, GB", "minutes", "scores")),
    "load": part("load", "", ("load", "outcome", "measured")),
    "trials": part("trials", "", ("trial", "tries", "lost", "silently wrong", "hung", "code run", "crashed")),
    "commands": part("commands-memory-cpu", "", ("command", "memory, GB")),
    "new_head": part("new-head-cpu", "A new classifier", _NEW_HEAD),
    "dense": dense,
    "two_passes": two_passes,
    "dense_speed_cpu": dense_speed("dense-speed-heads-cpu"),
    "dense_speed_cuda": dense_speed("dense-speed-1536-eva02-keep-cuda", "dense-speed-640-eva02-keep-cuda"),
    "llava": part("llava-cpu", "", _LLAVA),
    "video": part("video-cpu", "", _VIDEO),
    "data_sets": data_sets,
}

if __name__ == "__main__":
    main()
