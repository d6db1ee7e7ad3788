"""The page itself, in gradio: a photo, its patches, and what they change."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from aptvit.demo.player import Answers, Look, Player, Settings
from aptvit.files.images import ImageError
from aptvit.files.sample_photos import write_sample_photos

__all__ = ["MAX_BYTES", "build_page", "serve"]

MAX_BYTES = 25_000_000
"""Largest file that is taken."""

_BY_SHARE, _BY_SCORES = "share of the tokens", "thresholds"
_ENTROPY_MOST = 9.0  # bits of 512 bins
_STYLE = """
footer { display: none !important; }
.aptvit-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.aptvit-cards > div { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 16px; }
.aptvit-cards strong { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.aptvit-cards span { opacity: 0.7; font-size: 0.85rem; }
.aptvit-before { opacity: 0.3; }
.aptvit-top { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 8px 32px; }
.aptvit-top h4 { margin: 0 0 4px; }
.aptvit-top p { margin: 0; display: flex; justify-content: space-between; position: relative; padding: 3px 8px; }
.aptvit-top i { position: absolute; inset: 2px auto 2px 0; background: #26c6b6; opacity: 0.25; border-radius: 4px; }
"""


class _Visit:
    """One visitor: the photo, the last settings that were looked at, and the last times and answers."""

    def __init__(self) -> None:
        self.photo: Tensor | None = None
        self.wanted: Settings | None = None
        self.said = ("", "")


def build_page(player: Player, samples: list[Path]) -> Any:
    """A gradio page, not yet served.

    Args:
        player: The model.
        samples: LoadedImages to begin with.
    """
    import gradio as gr

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    buttons: list[Any] = ["download", "fullscreen"]
    with gr.Blocks(title="aptvit", analytics_enabled=False, delete_cache=(60, 600)) as page:
        visit = gr.State(_Visit())
        gr.Markdown(f"# aptvit\n{_introduction(player)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    label="Photo",
                    height=280,
                    buttons=[],
                    elem_id="photo",
                )
                if samples:
                    gr.Examples([str(one) for one in samples], photo, label="Photos to try", api_visibility="private")
                controls = _controls(player)
            with gr.Column(scale=3, min_width=300):
                numbers, times = gr.HTML(elem_id="numbers"), gr.HTML(elem_id="times")
                patches = gr.Image(format="png", label="Patches", interactive=False, buttons=buttons, elem_id="patches")
                top = gr.HTML(elem_id="top")
        about = "Scores of each larger size: merged where they are low"
        scores = gr.Image(format="png", label=about, interactive=False, buttons=buttons, elem_id="scores")
        code = gr.Code(label="The same in Python", language="python", interactive=False, elem_id="code")
        desk = _Desk(player)

        def follow(event: Any) -> None:
            seen = event(
                desk.look,
                [visit, *controls],
                [visit, numbers, patches, scores, code, times, top],
                trigger_mode="always_last",
                **quiet,
            )
            seen.then(desk.ask, [visit, *controls], [visit, times, top], concurrency_limit=1, **quiet)

        scorer, scales, by, keep, *thresholds = controls
        for slider in (keep, *thresholds):
            follow(slider.input)
        for one in (by, scales):
            follow(one.input(desk.shown, [by, scales], [keep, *thresholds], **quiet).then)
        follow(scorer.input(desk.ranges, [visit, scorer], thresholds, **quiet).then)
        follow(photo.change(desk.read, [visit, photo], [visit], **quiet).then)
        if samples:
            page.load(lambda: str(samples[0]), None, photo, **quiet)
    return page


def _controls(player: Player) -> list[Any]:
    """Scorer, patch sizes, what decides, share, thresholds."""
    import gradio as gr

    first, (least, most) = player.settings(), player.scales
    many, by_share = len(player.scorers) > 1, first.keep is not None
    scorer = gr.Dropdown(list(player.scorers), value=first.scorer, label="Scorer", interactive=many, elem_id="scorer")
    scales = gr.Slider(
        least,
        max(most, least + 1),
        first.scales,
        step=1,
        label="Patch sizes",
        interactive=most > least,
        elem_id="scales",
    )
    by = gr.Radio(
        [_BY_SHARE, _BY_SCORES], value=_BY_SHARE if by_share else _BY_SCORES, label="What decides", elem_id="by"
    )
    share = first.keep if first.keep is not None else 0.5
    keep = gr.Slider(0.1, 1.0, share, step=0.01, label="Share of the tokens", visible=by_share, elem_id="keep")
    thresholds = [
        gr.Slider(
            0.0,
            max(_ENTROPY_MOST, value),
            value,
            step=0.05,
            label=f"Threshold of patches of {2 << i} x {2 << i}",
            visible=not by_share and i < first.scales - 1,
            elem_id=f"threshold{i + 1}",
        )
        for i, value in enumerate(_begin(first))
    ]
    return [scorer, scales, by, keep, *thresholds]


def _begin(first: Settings) -> tuple[float, ...]:
    """A threshold for each slider, at least for as many sizes as can be chosen."""
    return first.thresholds + Settings().thresholds[len(first.thresholds) :]


class _Desk:
    """What happens when a control is moved. Values of the controls come in the order of `_controls`."""

    def __init__(self, player: Player) -> None:
        self.player, self.begin = player, _begin(player.settings())

    def read(self, visit: _Visit, path: str | None) -> _Visit:
        import gradio as gr

        visit.photo = None
        try:
            visit.photo = None if path is None else self.player.read(Path(path))
        except ImageError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return visit

    def shown(self, decides: str, scales: int) -> list[Any]:
        """The sliders that decide something."""
        import gradio as gr

        some = [decides == _BY_SCORES and i < scales - 1 for i in range(len(self.begin))]
        return [gr.update(visible=one) for one in (decides == _BY_SHARE, *some)]

    def ranges(self, visit: _Visit, scorer: str) -> list[Any]:
        """Scorers other than entropy have units of their own: up to the largest score of this photo."""
        import gradio as gr

        if scorer == "entropy":
            return [gr.update(maximum=_ENTROPY_MOST, step=0.05, value=value) for value in self.begin]
        found = [1.0] if visit.photo is None else self.player.most(visit.photo, scorer, self.player.scales[1])
        found += [found[-1]] * (len(self.begin) - len(found))
        return [gr.update(maximum=one, step=max(one / 200, 1e-6), value=one / 4) for one in found]

    def look(self, visit: _Visit, *values: Any) -> tuple[Any, ...]:
        visit.wanted = _told(*values)
        if visit.photo is None:
            return visit, _EMPTY, None, None, "", "", ""
        found = self.player.look(visit.photo, visit.wanted)
        before = (f'<div class="aptvit-before">{one}</div>' for one in visit.said)
        return visit, _numbers(found), found.patches, found.scores, self.player.snippet(visit.wanted), *before

    def ask(self, visit: _Visit, *values: Any) -> tuple[Any, ...]:
        import gradio as gr

        if visit.photo is None or visit.wanted != _told(*values):  # the slider has moved on
            return gr.skip(), gr.skip(), gr.skip()
        found = self.player.ask(visit.photo, visit.wanted)
        visit.said = _times(found), _top(found)
        return visit, *visit.said


def _told(scorer: str, scales: int, decides: str, keep: float, *thresholds: float) -> Settings:
    return Settings(scorer, int(scales), keep if decides == _BY_SHARE else None, thresholds)


_EMPTY = "<p>Drop a photo, take one, or choose one of those beside.</p>"


def _introduction(player: Player) -> str:
    about = f"`{player.name}` on adaptive patches. Smooth regions are read in big patches, busy ones in small."
    if player.weights == "random":
        about += " **No trained weights were found: patches, operations and times are real, answers would not be.**"
    return about


def _cards(*cards: tuple[str, str, str]) -> str:
    """(name, value, what it is) of each."""
    each = (f'<div><strong id="{name}">{value}</strong><span>{about}</span></div>' for name, value, about in cards)
    return f'<div class="aptvit-cards">{"".join(each)}</div>'


def _numbers(look: Look) -> str:
    share = look.tokens / look.tokens_uniform
    less = look.gflops_uniform / look.gflops
    return _cards(
        ("tokens", f"{look.tokens}", f"of {look.tokens_uniform} tokens, {share:.0%}"),
        ("gflops", f"{look.gflops:.2f}", f"of {look.gflops_uniform:.2f} GFLOPs, {less:.2f} times fewer"),
    )


def _times(answers: Answers) -> str:
    fast, slow = 1e3 * answers.seconds, 1e3 * answers.seconds_uniform
    spread = f"{answers.speedup.least:.2f} to {answers.speedup.most:.2f}"
    return _cards(
        ("time", f"{fast:.0f} ms", f"beside {slow:.0f} ms of the uniform model"),
        ("speedup", f"{answers.speedup.median:.2f}x", f"as fast ({spread})"),
    )


def _top(answers: Answers) -> str:
    if answers.top is None or answers.top_uniform is None:
        return ""
    columns = []
    for title, rows in (("Uniform", answers.top_uniform), ("Adaptive", answers.top)):
        bars = (
            f'<p><i style="width:{share:.0%}"></i><span>{html.escape(name)}</span><span>{share:.0%}</span></p>'
            for name, share in rows
        )
        columns.append(f"<div><h4>{title}</h4>{''.join(bars)}</div>")
    return f'<div class="aptvit-top">{"".join(columns)}</div>'


@contextmanager
def serve(
    player: Player, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False
) -> Iterator[str]:
    """Serve the page until the context ends; what was uploaded goes with it.

    Args:
        player: The model.
        host: Address to bind to.
        port: Its port; by default the first free one from 7860 on.
        open_browser: Open the page in a browser.

    Yields:
        The page's address.

    Raises:
        ImportError: If gradio is not installed.
        ValueError: If the port is taken.
    """
    try:
        import gradio as gr
    except ImportError:
        raise ImportError("the page needs gradio: pip install 'aptvit[demo]'") from None
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="aptvit-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read by gradio as its components are made
        page = None
        try:
            page = build_page(player, write_sample_photos(Path(folder) / "samples"))
            fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=MAX_BYTES,
                footer_links=[],
                ssr_mode=False,
                run_history=False,
                enable_monitoring=False,
                allowed_paths=[folder],
                theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
                css=_STYLE,
            )
            yield address
        except OSError as error:
            raise ValueError(f"cannot serve on {host}:{port}: {error}; choose another --port") from None
        finally:
            if page is not None:
                page.close(verbose=False)
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before
