"""The demo page, built with gradio: upload a photo, move sliders, and see patches, tokens, time and predictions."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from aptvit.demo.demo_model import DemoModel, PatchView, Predictions, Settings
from aptvit.files.images import ImageError
from aptvit.report.drawing import to_data_uri

__all__ = ["STYLE", "build_page"]

_BY_SHARE, _BY_THRESHOLDS = "share of the tokens", "thresholds"
_ENTROPY_RANGE: dict[str, Any] = {"maximum": 9.0, "step": 0.05}  # bits, of a histogram with 512 bins
STYLE = """
footer { display: none !important; }
.aptvit-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.aptvit-cards > div { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 16px; }
.aptvit-cards strong { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.aptvit-cards span { opacity: 0.7; font-size: 0.85rem; }
.aptvit-outdated { opacity: 0.3; }
.aptvit-answers { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; margin-bottom: 12px; }
.aptvit-answers figure { margin: 0; text-align: center; }
.aptvit-answers img { width: 100%; border-radius: 8px; }
.aptvit-top { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 8px 32px; }
.aptvit-top h4 { margin: 0 0 4px; }
.aptvit-top p { margin: 0; display: flex; justify-content: space-between; position: relative; padding: 3px 8px; }
.aptvit-top i { position: absolute; inset: 2px auto 2px 0; background: #26c6b6; opacity: 0.25; border-radius: 4px; }
"""


class _Session:
    """State of a visitor: the photo and its file, the settings of the last view, the HTML of the last results."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.photo: Tensor | None = None
        self.settings: Settings | None = None
        self.results = ("", "")


def build_page(model: DemoModel, samples: list[Path]) -> Any:
    """Build the gradio page. It is not served yet.

    Args:
        model: The model of the page.
        samples: Photos offered on the page; the first is shown at the start.

    Returns:
        The ``gradio.Blocks`` of the page.
    """
    import gradio as gr

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    buttons: list[Any] = ["download", "fullscreen"]
    with gr.Blocks(title="aptvit", analytics_enabled=False) as page:
        session = gr.State(_Session())
        gr.Markdown(f"# aptvit\n{_introduction(model)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo: Any = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    label="Photo",
                    height=280,
                    buttons=[],
                    elem_id="photo",
                )
                # gradio would open the file itself, and show no message where it cannot.
                photo.preprocess = lambda upload: None if upload is None else upload.path
                if samples:
                    gr.Examples(
                        [str(sample) for sample in samples], photo, label="Photos to try", api_visibility="private"
                    )
                controls = _controls(model)
            with gr.Column(scale=3, min_width=300):
                numbers, times = gr.HTML(elem_id="numbers"), gr.HTML(elem_id="times")
                patches = gr.Image(format="png", label="Patches", interactive=False, buttons=buttons, elem_id="patches")
                top = gr.HTML(elem_id="top")
        about = "Scores of each larger size: patches with low scores are merged"
        scores = gr.Image(format="png", label=about, interactive=False, buttons=buttons, elem_id="scores")
        code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="code")
        handlers = _Handlers(model)

        def follow(event: Any) -> None:
            viewed = event(
                handlers.view,
                [session, *controls],
                [session, numbers, patches, scores, code, times, top],
                trigger_mode="always_last",
                **quiet,
            )
            viewed.then(handlers.predict, [session, *controls], [session, times, top], concurrency_limit=1, **quiet)

        scorer, scales, by, keep, *thresholds = controls
        for slider in (keep, *thresholds):
            follow(slider.input)
        for control in (by, scales):
            follow(control.input(handlers.visible_sliders, [by, scales], [keep, *thresholds], **quiet).then)
        follow(scorer.input(handlers.slider_ranges, [session, scorer], thresholds, **quiet).then)
        follow(photo.change(handlers.read, [session, photo], [session], **quiet).then)
        if samples:
            page.load(lambda: str(samples[0]), None, photo, **quiet)
    return page


def _controls(model: DemoModel) -> list[Any]:
    """Controls in order: scorer, patch sizes, share or thresholds, the share, and each threshold."""
    import gradio as gr

    initial, (least, most) = model.settings(), model.scales
    many, by_share = len(model.scorers) > 1, initial.keep is not None
    scorer = gr.Dropdown(list(model.scorers), value=initial.scorer, label="Scorer", interactive=many, elem_id="scorer")
    scales = gr.Slider(
        least,
        max(most, least + 1),
        initial.scales,
        step=1,
        label="Patch sizes",
        interactive=most > least,
        elem_id="scales",
    )
    by = gr.Radio(
        [_BY_SHARE, _BY_THRESHOLDS],
        value=_BY_SHARE if by_share else _BY_THRESHOLDS,
        label="Patches by",
        elem_id="by",
    )
    share = round(initial.keep, 3) if initial.keep is not None else 0.5
    keep = gr.Slider(0.1, 1.0, share, step=0.01, label="Share of the tokens", visible=by_share, elem_id="keep")
    thresholds = [
        gr.Slider(
            0.0,
            value=value,
            **(_ENTROPY_RANGE if initial.scorer == "entropy" else _range(4 * value)),
            label=f"Threshold of patches of {2 << i} x {2 << i}",
            visible=not by_share and i < initial.scales - 1,
            elem_id=f"threshold{i + 1}",
        )
        for i, value in enumerate(_initial_thresholds(initial))
    ]
    return [scorer, scales, by, keep, *thresholds]


def _initial_thresholds(initial: Settings) -> tuple[float, ...]:
    """A threshold for each slider: there are sliders for the largest number of patch sizes that can be chosen."""
    thresholds = initial.thresholds + Settings().thresholds[len(initial.thresholds) :]
    return tuple(float(f"{threshold:.4g}") for threshold in thresholds)


def _range(largest: float) -> dict[str, Any]:
    """Maximum and step of a slider up to about `largest`: round numbers, 20 to 200 steps."""
    digits = math.floor(math.log10(largest)) if largest > 0 else 0
    step = 10.0**digits / 20
    maximum = math.ceil(largest / step) * step if largest > 0 else 1.0
    return {"maximum": round(maximum, 2 - digits), "step": round(step, 2 - digits)}


def _quarter(maximum: float, step: float) -> float:
    """The step that is nearest to a quarter of a slider."""
    return float(f"{round(maximum / 4 / step) * step:.4g}")


class _Handlers:
    """Event handlers of the page. Values of the controls are in the order of `_controls`."""

    def __init__(self, model: DemoModel) -> None:
        self.model, self.thresholds = model, _initial_thresholds(model.settings())

    def read(self, session: _Session, path: str | None) -> _Session:
        import gradio as gr

        if path is not None and path == session.path:  # gradio tells of an upload twice
            return session
        session.path, session.photo = path, None
        try:
            session.photo = None if path is None else self.model.read(Path(path))
        except ImageError as error:
            gr.Warning(str(error), title="Not read")
        return session

    def visible_sliders(self, selection: str, scales: int) -> list[Any]:
        """Show only the sliders that have an effect: the share, or a threshold for each larger size."""
        import gradio as gr

        thresholds = [selection == _BY_THRESHOLDS and i < scales - 1 for i in range(len(self.thresholds))]
        return [gr.update(visible=visible) for visible in (selection == _BY_SHARE, *thresholds)]

    def slider_ranges(self, session: _Session, scorer: str) -> list[Any]:
        """Ranges of the threshold sliders: fixed for entropy, else up to the largest score of the current photo."""
        import gradio as gr

        if scorer == "entropy":
            return [gr.update(**_ENTROPY_RANGE, value=value) for value in self.thresholds]
        largest = (
            [1.0] if session.photo is None else self.model.largest_scores(session.photo, scorer, self.model.scales[1])
        )
        largest += [largest[-1]] * (len(self.thresholds) - len(largest))
        ranges = [_range(score) for score in largest]
        return [gr.update(**limits, value=_quarter(**limits)) for limits in ranges]

    def view(self, session: _Session, *values: Any) -> tuple[Any, ...]:
        """Update patches, scores, tokens and code; the old times and predictions stay, in gray."""
        session.settings = _settings(*values)
        if session.photo is None:
            return session, _EMPTY, None, None, "", "", ""
        view, code = self.model.view(session.photo, session.settings), self.model.snippet(session.settings)
        outdated = (f'<div class="aptvit-outdated">{result}</div>' for result in session.results)
        return session, _numbers(view), view.patches, view.scores, code, *outdated

    def predict(self, session: _Session, *values: Any) -> tuple[Any, ...]:
        """Update times and predictions."""
        import gradio as gr

        if session.photo is None or session.settings != _settings(*values):  # a control was moved since
            return gr.skip(), gr.skip(), gr.skip()
        predictions = self.model.predict(session.photo, session.settings)
        session.results = _times(predictions), _top(predictions) or _drawings(predictions)
        return session, *session.results


def _settings(scorer: str, scales: int, selection: str, keep: float, *thresholds: float) -> Settings:
    return Settings(scorer, int(scales), keep if selection == _BY_SHARE else None, thresholds)


_EMPTY = "<p>Drop a photo, take one with the camera, or choose one of the photos to try.</p>"


def _introduction(model: DemoModel) -> str:
    about = f"`{model.label}` on adaptive patches. Smooth regions get large patches, detailed ones small patches."
    if model.weights == "random":
        about += (
            " **No trained weights were found: patches, operations and times are real, but there are no predictions.**"
        )
    return about


def _cards(*cards: tuple[str, str, str]) -> str:
    """HTML of cards, each a (name, value, description)."""
    items = (f'<div><strong id="{name}">{value}</strong><span>{about}</span></div>' for name, value, about in cards)
    return f'<div class="aptvit-cards">{"".join(items)}</div>'


def _numbers(view: PatchView) -> str:
    share = view.tokens / view.tokens_uniform
    cards = [("tokens", f"{view.tokens}", f"of {view.tokens_uniform} tokens, {share:.0%}")]
    if view.gflops is not None and view.gflops_uniform is not None:
        factor = view.gflops_uniform / view.gflops
        cards.append(("gflops", f"{view.gflops:.2f}", f"of {view.gflops_uniform:.2f} GFLOPs, {factor:.2f} times fewer"))
    return _cards(*cards)


def _times(predictions: Predictions) -> str:
    adaptive, uniform = 1e3 * predictions.seconds, 1e3 * predictions.seconds_uniform
    rounds = f"{predictions.speedup.least:.2f} to {predictions.speedup.most:.2f}"
    return _cards(
        ("time", f"{adaptive:.0f} ms", f"uniform model: {uniform:.0f} ms"),
        ("speedup", f"{predictions.speedup.median:.2f}x", f"as fast ({rounds})"),
    )


def _top(predictions: Predictions) -> str:
    if predictions.top is None or predictions.top_uniform is None:
        return ""
    columns = []
    for title, rows in (("Uniform", predictions.top_uniform), ("Adaptive", predictions.top)):
        bars = (
            f'<p><i style="width:{share:.0%}"></i><span>{html.escape(name)}</span><span>{share:.0%}</span></p>'
            for name, share in rows
        )
        columns.append(f"<div><h4>{title}</h4>{''.join(bars)}</div>")
    return f'<div class="aptvit-top">{"".join(columns)}</div>'


def _drawings(predictions: Predictions) -> str:
    """HTML of both answers and their difference, side by side."""
    if predictions.drawings is None or predictions.likeness is None:
        return ""
    images = "".join(
        f'<figure><img src="{to_data_uri(getattr(predictions.drawings, name))}" alt="{about}">'
        f"<figcaption>{about}</figcaption></figure>"
        for name, about in (("uniform", "Uniform"), ("adaptive", "Adaptive"), ("difference", "Where they differ"))
    )
    about, value = predictions.likeness
    return f'<div class="aptvit-answers">{images}</div>{_cards(("likeness", f"{value:.3f}", about))}'
