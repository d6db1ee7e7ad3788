"""HTML page about a finished training: curves, evaluations, problems and the recipe."""

from __future__ import annotations

import html
import io
import json
from pathlib import Path
from typing import Any

from aptvit.storage.writing import write_text
from aptvit.training.log import read_log
from aptvit.training.recipes.common import Recipe

__all__ = ["write_page"]

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .25rem .8rem; text-align: right;
  border-bottom: 1px solid #ddd }} th:first-child, td:first-child {{ text-align: left }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1>{body}</body></html>
"""


def write_page(run: Path, recipe: Recipe) -> Path:
    """Write ``RUN/index.html`` from the log.

    Args:
        run: Folder of the training.
        recipe: Recipe of the training.

    Returns:
        Path of the page.
    """
    lines = read_log(run)
    parts = [_gain(lines), _summary(lines), _table(lines), _curves(lines), _problems(lines)]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(recipe.to_yaml())}</pre>"]
    page = run / "index.html"
    title = f"Training: {recipe.method}, {recipe.keep:.0%} of the tokens"
    write_text(page, _PAGE.format(title=html.escape(title), body="".join(parts)))
    return page


def _lines_of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["what"] == kind]


_GOALS = ("top1", "agreement", "map", "miou")  # of the tasks; an evaluation has one or two of them


def _gain(lines: list[dict[str, Any]]) -> str:
    """What the training bought: the metric of the task before and after, with the number of images."""
    rows, items = _lines_of(lines, "eval"), []
    for share in dict.fromkeys(row["share"] for row in rows):
        of_share = [row for row in rows if row["share"] == share]
        first, last = of_share[0], of_share[-1]
        goal = next((name for name in _GOALS if name in first), None)
        if goal is None or first is last:
            continue
        before, after = first[goal], last.get(f"ema_{goal}", last[goal])
        text = f"At {share:.0%} of the tokens: {goal} {before:.1%} before, {after:.1%} after"
        count = last.get("images")
        if count and goal in ("top1", "agreement"):
            text += f" ({round(before * count)} and {round(after * count)} of {count} validation images)"
        elif count:
            text += f" (on {count} validation images)"
        items.append(f"<li>{text}.</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _summary(lines: list[dict[str, Any]]) -> str:
    trained = _lines_of(lines, "train")
    if not trained:
        return "<p>No updates were made.</p>"
    text = f"{trained[-1]['update']} updates in {trained[-1]['seconds']:.0f} seconds of training"
    for start in _lines_of(lines, "start"):
        text += f", {start['median']:.2f} times as fast as uniform ({start['least']:.2f} to {start['most']:.2f})"
    return f"<p>{text}.</p>"


def _table(lines: list[dict[str, Any]]) -> str:
    rows = _lines_of(lines, "eval")
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in ("update", "what")]
    if not rows:
        return "<p>There were no validation images.</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("updates", *names))
    body = ""
    for row in rows:
        values = "".join(f"<td>{row[name]:.4f}</td>" if name in row else "<td></td>" for name in names)
        body += f"<tr><td>{row['update']}</td>{values}</tr>"
    return f"<h2>Evaluation</h2><table><tr>{head}</tr>{body}</table>"


def _curves(lines: list[dict[str, Any]]) -> str:
    trained = _lines_of(lines, "train")
    if len(trained) < 2:
        return ""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Curves need matplotlib: pip install 'aptvit[plot]'.</p>"
    panels = [
        ("loss", "loss"),
        ("lr", "learning rate"),
        ("kept", "share of the tokens"),
        ("images_per_second", "images/s"),
    ]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for panel, (name, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        panel.plot([line["update"] for line in trained], [line[name] for line in trained], color="#0072B2")
        panel.set_ylabel(label)
        panel.set_xlabel("updates")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if name in ("kept", "images_per_second"):
            panel.set_ylim(bottom=0)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "aptvit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "<h2>Curves</h2>" + buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _problems(lines: list[dict[str, Any]]) -> str:
    problems = [json.dumps(line["message"]) for line in _lines_of(lines, "problem")]
    if not problems:
        return ""
    items = "".join(f"<li>{html.escape(problem)}</li>" for problem in dict.fromkeys(problems))
    return f"<h2>Problems</h2><ul>{items}</ul>"
