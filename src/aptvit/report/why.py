"""The explanation of a patch (`aptvit.patching.explanation`) as text, as a mark in a drawing, and as data of a page."""

from __future__ import annotations

import json
import math

from PIL import Image, ImageDraw

from aptvit.patching.explanation import CandidatePatch, Explanation, MergeDecisions

__all__ = ["as_json", "as_text", "mark_patch"]

_MARK = (255, 40, 60)
_OUTSIDE = "reaches beyond the image"


def as_text(explanation: Explanation, name: str) -> str:
    """Describe a patch: the candidates from coarse to fine with their limits, and the scores of their neighbours.

    Args:
        explanation: From `aptvit.patching.explanation.explain`.
        name: Name of the image.

    Returns:
        Lines of text.
    """
    patch, limit = explanation.patch, _limit(explanation)
    merged = f"merged from {4**patch.scale} base patches" if patch.scale else "a base patch, not merged"
    lines = [
        f"{name}: pixel ({explanation.x}, {explanation.y}) of the resized image is in a patch of {patch.size} x "
        f"{patch.size} pixels at ({patch.left}, {patch.top}), {merged}.",
        _rule(explanation),
        f"{'size':>6}{'score':>10}{limit:>11}  decision",
    ]
    covered = False
    for candidate in explanation.candidates:
        score, bound = _number(candidate.score), _number(candidate.limit)
        lines.append(f"{candidate.size:>6}{score:>10}{bound:>11}  {_decision(candidate, limit, covered)}")
        covered = covered or candidate.chosen
    for candidate in explanation.candidates:
        if candidate.neighbours:
            lines.append(f"scores of patches of {candidate.size} pixels around it, with its own in brackets:")
            lines += ["  " + "".join(_cells(row, i == 1)) for i, row in enumerate(candidate.neighbours)]
    return "\n".join(lines)


def mark_patch(drawing: Image.Image, patch: CandidatePatch, image_width: int) -> Image.Image:
    """Draw a frame around a patch in a copy of a drawing.

    Args:
        drawing: From `aptvit.report.drawing.draw_patches`.
        patch: The patch, in pixels of the image before it was enlarged.
        image_width: Width of that image in pixels.
    """
    zoom, marked = drawing.width // image_width, drawing.copy()
    left, top, side = (value * zoom for value in (patch.left, patch.top, patch.size))
    corners = (left, top, min(left + side, drawing.width) - 1, min(top + side, drawing.height) - 1)
    ImageDraw.Draw(marked).rectangle(corners, outline=_MARK, width=max(3, drawing.width // 200))
    return marked


def as_json(decisions: MergeDecisions) -> str:
    """What the script of the report needs to explain any patch of an image.

    Args:
        decisions: From `aptvit.patching.explanation.merge_decisions`.
    """
    limit = _limit(decisions)
    lines = [
        [[_line(decisions, scale, i, j) for j in range(scores.shape[1])] for i in range(scores.shape[0])]
        for scale, scores in enumerate(decisions.scores, start=1)
    ]
    stays, covered = (CandidatePatch(0, 0, 0, 0, None, None, None, True, chosen, ()) for chosen in (True, False))
    return json.dumps(
        {
            "size": decisions.patch_size,
            "scales": decisions.scales.tolist(),
            "lines": lines,
            "chosen": _decision(stays, limit, covered=False),
            "covered": _decision(covered, limit, covered=True),
            "outside": _OUTSIDE,
            "rule": _rule(decisions),
        },
        separators=(",", ":"),
    )


def _line(decisions: MergeDecisions, scale: int, row: int, col: int) -> str:
    """Score, limit, scores of the neighbours, and the decision about a candidate inside the image."""
    candidate, limit = decisions.candidate(scale, row, col), _limit(decisions)
    covered = int(decisions.scales[row << scale, col << scale]) > scale
    values = [value for line in candidate.neighbours for value in line]
    neighbours = [value for value in (*values[:4], *values[5:]) if value is not None]  # without its own
    parts = [f"score {_number(candidate.score)}, {limit} {_number(candidate.limit)}"]
    if neighbours:
        parts.append(f"{_number(min(neighbours))} to {_number(max(neighbours))} around it")
    return "; ".join([*parts, _decision(candidate, limit, covered)])


def _limit(decided: Explanation | MergeDecisions) -> str:
    return "threshold" if decided.rule == "thresholds" else "cut"


def _rule(decided: Explanation | MergeDecisions) -> str:
    if decided.rule == "thresholds":
        return "A patch is merged where its score is below the threshold of its size; the largest such patch wins."
    return (
        f"The share of the tokens means {decided.merges} merges in this image, those of the lowest scores; a patch "
        "counts as much as the highest score inside it."
    )


def _decision(candidate: CandidatePatch, limit: str, covered: bool) -> str:
    if candidate.scale == 0:
        return "this patch: nothing larger is allowed here" if candidate.chosen else "part of the patch above"
    if candidate.score is None or candidate.cost is None:
        return _OUTSIDE
    text = "score" if candidate.cost == candidate.score else f"a score inside it, {candidate.cost:.4g},"
    if candidate.allowed and candidate.limit is not None and candidate.cost >= candidate.limit:
        return f"{'this patch: ' if candidate.chosen else ''}equal to the {limit}, and the first of those"
    if candidate.chosen:
        return f"this patch: its {text} is below the {limit}" if text == "score" else f"this patch: {text} is below"
    if candidate.allowed and covered:
        return "allowed, but part of the patch above"
    if candidate.allowed:
        return "allowed"
    if covered:
        return "part of the patch above"
    return f"not merged: {'its score' if text == 'score' else text} is not below the {limit}"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isinf(value) else f"{value:.4g}"


def _cells(row: tuple[float | None, ...], is_middle: bool) -> list[str]:
    return [
        f"[{_number(value)}]".rjust(11) if is_middle and i == 1 else f"{_number(value):>11}"
        for i, value in enumerate(row)
    ]
