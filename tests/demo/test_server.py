"""The served demo page as visitors meet it over HTTP, well-meaning and other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("gradio")

import httpx
from demo.visitor import Busy, Visitor, png

import aptvit
from aptvit.demo import guard, server
from aptvit.demo.access import Access
from aptvit.demo.demo_model import DemoModel
from aptvit.demo.server import serve

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks for 64 x 64 pixels."""
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=10, global_pool="avg").eval()
    with torch.no_grad():
        host.head.weight.normal_(std=1.0)
    folder = tmp_path_factory.mktemp("models") / "a-private-folder" / "small"
    aptvit.adapt(host, keep=0.5, scales=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> Iterator[DemoModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aptvit.demo.demo_model._TIMING_SECONDS", 0.0)
        patch.setattr("aptvit.demo.server.write_sample_photos", lambda folder: [])  # they take seconds
        yield DemoModel(str(saved), with_paths=False)


@pytest.fixture(scope="module")
def address(model: DemoModel) -> Iterator[str]:
    with serve(model) as address:
        yield address


@pytest.fixture
def visitor(address: str) -> Visitor:
    return Visitor(address)


def noise(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def raw(address: str, request: bytes) -> bytes:
    """The answer to a request that HTTP libraries would not send."""
    place = urlsplit(address)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize("name", ["page.html", "page.svg", "page.xhtml", "page.png", "page", "page.js", "page.pdf"])
def test_uploads_are_never_pages(visitor: Visitor, name: str) -> None:
    response = visitor.client.get(f"gradio_api/file={visitor.upload(SVG, name)}")
    assert response.status_code == 200 and response.content == SVG
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-type"] in ("application/octet-stream", "image/png")
    assert response.headers["content-security-policy"] == "sandbox"


def test_only_the_page_s_files_are_served(visitor: Visitor, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(noise(0)))
    upload = visitor.upload(png(noise(0)))
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    (folder / "link.png").symlink_to(secret)
    inside = upload.rsplit("/", 2)[0]
    for name in (
        secret,
        "/etc/passwd",
        folder / Path(upload).relative_to(inside),  # by its path, not by its name for visitors
        f"{inside}/link.png",
        f"{inside}/../lock",
        f"{inside}/..%2f..%2f..%2fetc/passwd",
        inside,
        f"{inside}/%00",
        f"{inside}/{'x' * 5000}",
        "http://127.0.0.1:9/x.png",
        "",
    ):
        response = visitor.client.get(f"gradio_api/file={name}")
        assert (response.status_code, response.text) == (404, "There is no such file."), name
    for path in (secret, "http://example.invalid/x.png", f"{inside}/../../../etc/passwd", Path(__file__)):
        with pytest.raises((ValueError, httpx.HTTPStatusError)) as refused:
            visitor.read(str(path))
        assert str(tmp_path) not in str(refused.value) and "etc" not in str(refused.value)


@pytest.mark.parametrize(
    "request_line",
    [
        *("GET gradio_api/proxy=https://x.hf.space/", "GET monitoring", "GET monitoring/summary", "GET openapi.json"),
        *("GET gradio_api/openapi.json", "GET gradio_api/runs", "GET gradio_api/deep_link?session_hash=x"),
        *("GET gradio_api/vibe-code", "POST gradio_api/vibe-edit", "POST gradio_api/component_server", "GET docs"),
        *("POST gradio_api/process_recording", "POST gradio_api/run/predict", "POST gradio_api/call/view"),
        *("GET gradio_api/custom_component/x/client/x/x.js", "GET gradio_api/file/etc/passwd", "GET gradio_api/token"),
        *("GET gradio_api/stream/x/0/0/playlist.m3u8", "GET gradio_api/dev/reload", "POST login", "DELETE config"),
        *("PUT gradio_api/upload", "OPTIONS config", "POST gradio_api/mcp/", "GET gradio_api/mcp/sse"),
    ],
)
def test_routes_that_the_page_does_not_need(visitor: Visitor, request_line: str) -> None:
    method, path = request_line.split()
    response = visitor.client.request(method, path)
    assert (response.status_code, response.text) == (404, "There is no such page.")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.1", "", "[", "localhost@evil"]
)
def test_a_name_that_resolves_to_this_machine_is_refused(visitor: Visitor, host: str) -> None:
    for path in ("", "config", "gradio_api/info"):
        assert visitor.client.get(path, headers={"Host": host}).status_code in (400, 421)


def test_names_of_this_machine_are_served(visitor: Visitor) -> None:
    for host in ("localhost", "localhost:1234", "LOCALHOST", "127.0.0.1:80", "[::1]:7860"):
        assert visitor.client.get("config", headers={"Host": host}).status_code == 200


def test_two_hosts_are_refused(address: str) -> None:
    answer = raw(address, b"GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "headers",
    [
        *({"Origin": origin} for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://localhost")),
        *({"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"} for site in ("cross-site", "same-site")),
    ],
)
def test_requests_of_other_pages_are_refused(visitor: Visitor, headers: dict[str, str]) -> None:
    body = {"data": [None], "fn_index": 0, "session_hash": "x"}
    assert visitor.client.get("config", headers=headers).status_code == 403
    assert visitor.client.post("gradio_api/queue/join", json=body, headers=headers).status_code == 403
    assert visitor.client.post("gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == 403


def test_links_of_other_pages_lead_here(visitor: Visitor, address: str) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    response = visitor.client.get("", headers=headers)
    assert response.status_code == 200 and "frame-ancestors 'none'" in response.headers["content-security-policy"]
    assert visitor.client.get("config", headers=headers).status_code == 403
    assert visitor.client.get("config", headers={"Origin": address.rstrip("/")}).status_code == 200


def test_forwarded_names_are_ignored(visitor: Visitor) -> None:
    headers = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "Forwarded": "host=evil.example"}
    assert "evil.example" not in visitor.client.get("", headers=headers).text


def test_answers_have_no_paths(visitor: Visitor, saved: Path, address: str) -> None:
    texts = [visitor.client.get(path).text for path in ("", "config", "gradio_api/info")]
    name = visitor.upload(png(noise(1)), "a photo.png")
    visitor.read(name)
    texts += [name, json.dumps(visitor.call("view_7", *visitor.controls))]
    assert "from_pretrained(&#x27;small" in texts[-1] or "from_pretrained('small')" in texts[-1]
    visitor.read(visitor.upload(b"no image", "text.png"))
    assert visitor.messages == ["text.png: not an image, or a format that is not read"]
    for values in (["x"] * 7, [None] * 7, [float("nan")] * 7, [{"path": []}] * 7, [["entropy"]] * 7, [1e30] * 7):
        body = json.dumps({"data": [None, *values], "fn_index": visitor.events["view_7"], "session_hash": "a"})
        response = visitor.client.post("gradio_api/queue/join", content=body)
        texts.append(response.text)
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # events that were refused have no stream
            visitor.client.stream("GET", "gradio_api/queue/data", params={"session_hash": "a"}) as stream,
        ):
            for line in stream.iter_lines():
                texts.append(line)
    bodies = (b"", b"{", b"[" * 100_000, b'{"fn_index": 1e9}', b'{"data": [], "fn_index": 999, "session_hash": "x"}')
    for content in bodies:
        response = visitor.client.post("gradio_api/queue/join", content=content)
        assert response.status_code >= 400
        texts.append(response.text)
    texts += [visitor.client.get(path).text for path in ("assets/none.js", "static/%2e%2e/x", "gradio_api/queue/data")]
    for text in texts:
        for secret in ("Traceback", "a-private-folder", tempfile.gettempdir() + "/", "site-packages", str(Path.home())):
            assert secret not in text, text[:2000]


def test_sizes_are_bounded_before_they_are_read(
    visitor: Visitor, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_FOLDER_BYTES", 1_000_000)
    begin = "POST /gradio_api/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n\r\n"
    for path, header, status in (
        ("upload", f"Content-Length: {guard.MAX_UPLOAD_BYTES + 20_000}", b"413"),
        ("upload", "Content-Length: 2000000", b"503"),
        ("upload", "Transfer-Encoding: chunked", b"411"),
        ("queue/join", "Content-Length: 300000", b"413"),
    ):
        assert raw(address, begin.format(path=path, header=header).encode()).split(b" ")[1] == status


def test_many_pixels_are_refused_before_they_are_decoded(visitor: Visitor) -> None:
    header = png(noise(0))
    huge = header[:16] + (30_000).to_bytes(4, "big") * 2 + header[24:]
    visitor.read(visitor.upload(huge, "huge.png"))
    # Pillow checks the header's sum, so that the number of pixels is not the reason in every version.
    assert len(visitor.messages) == 1 and visitor.messages[0].startswith("huge.png: ")


def test_visitors_at_once_see_their_photos(address: str, model: DemoModel, tmp_path: Path) -> None:
    """Sizes of the flat part differ, so that each photo has a number of tokens and shares of classes."""
    settings = model.settings()

    def visit(number: int) -> None:
        visitor = Visitor(address)
        pixels = noise(number)
        pixels[: 16 * (number % 4)] = 7
        data = png(pixels)
        (tmp_path / f"{number}.png").write_bytes(data)
        image = model.read(tmp_path / f"{number}.png")
        keep = 0.4 + 0.01 * number
        expected = model.view(image, type(settings)("entropy", 2, keep, settings.thresholds))
        visitor.read(visitor.upload(data, f"{number}.png"))
        tokens, url = visitor.view(keep)
        assert tokens == expected.tokens
        drawn = httpx.get(url, trust_env=False).content
        file = tmp_path / f"{number}-patches.png"
        file.write_bytes(drawn)
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected.patches))
        if number % 5:
            return
        shares = visitor.predict(keep)
        top = model.predict(image, type(settings)("entropy", 2, keep, settings.thresholds))
        assert top.top is not None and shares["Adaptive"] == [round(100 * share) for _, share in top.top]

    with ThreadPoolExecutor(12) as pool:  # fifty of them for minutes: tests/trials
        list(pool.map(visit, range(12)))


def test_a_full_queue_says_so(model: DemoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 3)
    with serve(model) as address:
        visitor = Visitor(address)
        visitor.read(visitor.upload(png(noise(2))))
        event = {"data": [None, *visitor.controls], "fn_index": visitor.events["view_7"]}
        event["session_hash"] = visitor.session
        with model._lock:  # nothing is computed meanwhile
            answers = [visitor.client.post("gradio_api/queue/join", json=event) for _ in range(6)]
            with pytest.raises(Busy):
                visitor.view(0.5)
        assert [answer.status_code for answer in answers][::5] == [200, 503]
        assert answers[-1].json() == {"detail": "Service Unavailable"}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # and goes on
            with contextlib.suppress(Busy):
                assert visitor.view(0.5)[0] > 0
                return
            time.sleep(0.1)
        raise AssertionError("the queue stays full")


def test_nothing_remains_when_the_context_ends(model: DemoModel) -> None:
    with serve(model) as address:
        visitor = Visitor(address)
        visitor.upload(png(noise(3)))
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert list(folder.rglob("image.png"))
    assert not folder.parent.exists()


def test_old_uploads_are_deleted(visitor: Visitor, address: str) -> None:
    from aptvit.demo.uploads import delete_old_files

    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    name = visitor.upload(png(noise(4)))
    delete_old_files(folder, 60)
    assert visitor.client.get(f"gradio_api/file={name}").status_code == 200
    time.sleep(0.1)
    delete_old_files(folder, 0.05)
    assert visitor.client.get(f"gradio_api/file={name}").status_code == 404


def test_other_machines_need_the_password(model: DemoModel) -> None:
    with serve(model, Access("0.0.0.0", "correct horse")) as address:
        assert address.startswith("http://localhost:")
        visitor = Visitor(address, auth=("anybody", "correct horse"))
        visitor.read(visitor.upload(png(noise(5))))
        assert visitor.view(0.5)[0] > 0
        with httpx.Client(base_url=address, trust_env=False) as client:
            for headers in ({}, {"Authorization": "Basic !!"}, {"Authorization": "Bearer correct horse"}):
                response = client.get("", headers=headers)
                assert response.status_code == 401 and "Basic" in response.headers["www-authenticate"]
            assert client.post("gradio_api/upload", files={"files": b"x"}, auth=("a", "wrong")).status_code == 401


def test_nothing_remains_when_the_command_is_stopped(saved: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aptvit", "demo", "--model", str(saved), "--no-browser", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        address = json.loads(process.stdout.readline())["address"]
        visitor = Visitor(address)
        visitor.upload(png(noise(6)))
        with visitor.client.stream("GET", "gradio_api/heartbeat/x"):  # an open connection does not hold it up
            assert list(tmp_path.rglob("image.png"))
            process.send_signal(signal.SIGTERM)
            _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and messages.endswith("closed; uploaded files were deleted\n")
    assert "Traceback" not in messages and not list(tmp_path.glob("*aptvit-demo*"))
