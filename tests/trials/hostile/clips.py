"""Hostile videos and animations."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case, Payload
from .images import encode, names_and_places

__all__ = ["clips"]


def video() -> bytes:
    """A good video of six frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        for i in range(6):
            frame = np.full((48, 64, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def clips(seed: int) -> Iterator[Case]:
    """All hostile clips."""
    rng = random.Random(seed)

    def case(name: str, content: Callable[[], bytes], must_tell: bool = True) -> Case:
        return Case(f"clip {name}", "clip", "hostile.mp4", lambda path, _: path.write_bytes(content()), must_tell)

    yield case("empty", lambda: b"")
    yield case("cut in half", lambda: video()[: len(video()) // 2])
    yield case("cut in its header", lambda: video()[:30])
    yield case("of noise", lambda: bytes(range(256)) * 20)
    for number in range(6):
        state = rng.random()

        def changed(state: float = state) -> bytes:
            content = bytearray(video())
            inner = random.Random(state)
            for _ in range(40):
                content[inner.randrange(len(content))] = inner.randrange(256)
            return bytes(content)

        yield case(f"of changed bytes {number}", changed, must_tell=False)

    def huge() -> bytes:
        content = video()
        place = content.index(b"mp4v") + 28
        return content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :]

    yield case("of 65535 x 65535", huge, must_tell=False)
    for suffix in ("png", "gif", "tif", "webp"):
        yield case(f"of one image, {suffix}", lambda suffix=suffix: encode(suffix))
        yield case(f"of half an image, {suffix}", lambda suffix=suffix: encode(suffix)[: len(encode(suffix)) // 2])

    def playlist(text: str) -> Callable[[Path, Payload], Any]:
        return lambda path, payload: path.write_text(text.replace("URL", payload.url))

    lists = {
        "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nURL/a.ts\n#EXT-X-ENDLIST\n",
        "m3u8 of a file": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile URL/a.mp4\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        '<Representation id="1" mimeType="video/mp4"><BaseURL>URL/a.mp4</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
    }
    for name, text in lists.items():
        yield Case(f"clip that is {name}", "clip", "hostile.mp4", playlist(text))
    for item in names_and_places(b"x", "clip", "mp4"):
        if "folder" not in item.name:
            yield item
