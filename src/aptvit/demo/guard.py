"""What stands between visitors and gradio: every request is checked before, every answer after.

Gradio has some eighty routes, of which the page needs a dozen. Those are let through; the rest (proxies, runs, deep
links, monitoring, components on the server) do not exist. Files are served here and not by gradio's own routes.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aptvit.demo.access import Access
from aptvit.demo.uploads import size_of_files

__all__ = ["MAX_FOLDER_BYTES", "MAX_UPLOAD_BYTES", "Guard"]

MAX_UPLOAD_BYTES = 25_000_000
"""Largest file that is accepted, in bytes."""

MAX_FOLDER_BYTES = 1_000_000_000
"""Largest size of all uploads and results together, in bytes."""

_API = "/gradio_api"
_FILES = f"{_API}/file="
_UPLOAD = f"{_API}/upload"
_ALIAS = "/aptvit-files"  # what visitors read in place of the folder
_READ = re.compile(
    rf"/(theme\.css|config|favicon\.ico|manifest\.json|(assets|static|svelte)/[\w./-]+)?"
    rf"|{_API}/(startup-events|queue/data|upload_progress|info|app_id|heartbeat/\w+)"
)
_WRITE = {  # POST: largest body in bytes
    _UPLOAD: MAX_UPLOAD_BYTES + 10_000,
    **dict.fromkeys((f"{_API}/queue/join", f"{_API}/reset", f"{_API}/cancel"), 200_000),
}
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
_DROPPED = (b"accept-encoding", b"authorization", b"cookie", b"forwarded", b"x-")  # beginnings of request headers
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PAGE_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; "
    "frame-ancestors 'none'; form-action 'self'"
)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


class Refusal(Exception):
    """A request that is not passed on.

    Args:
        status: HTTP status.
        reason: What visitors read.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI application around gradio's.

    Args:
        app: Gradio's application.
        folder: Folder of uploads and results, the only one from which files are served.
        access: Who may open the page.
    """

    def __init__(self, app: Application, folder: Path, access: Access) -> None:
        self.app, self.folder, self.access = app, folder.resolve(), access
        self._arriving = 0  # bytes of uploads that are being received

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Check a request, and pass it on or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":  # websockets: closed without an answer
            return
        try:
            length = self._check(scope)
            if scope["path"].startswith(_FILES):
                await self._serve_file(scope, receive, send)
                return
            if scope["method"] == "POST" and scope["path"] != _UPLOAD:
                receive = await self._with_folder(receive)
        except Refusal as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if not pair[0].startswith(_DROPPED)]}
        self._arriving += length
        try:
            await self.app(scope, receive, _Answer(send, str(self.folder)))
        finally:
            self._arriving -= length

    def _check(self, scope: Any) -> int:
        """Return the length of the body.

        Raises:
            Refusal: The request is not for this page, or not one that the page makes.
        """
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if len(hosts) != 1 or not self.access.answers_to(hosts[0]):
            raise Refusal(421, "This page is not served under that name.")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            raise Refusal(403, "Requests from other pages are refused.")
        # Links may lead to the page; images, scripts and forms of other sites may not reach anything.
        is_link = scope["path"] == "/" and headers.get(b"sec-fetch-mode") == "navigate"
        if headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin") and not is_link:
            raise Refusal(403, "Requests from other pages are refused.")
        if not self.access.admits(headers.get(b"authorization", "")):
            raise Refusal(401, "The password is wrong or missing.")
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD") and (_READ.fullmatch(path) or path.startswith(_FILES)):
            return 0
        if method != "POST" or path not in _WRITE:
            raise Refusal(404, "There is no such page.")
        return self._check_length(path, headers)

    def _check_length(self, path: str, headers: dict[bytes, str]) -> int:
        length = headers.get(b"content-length", "")
        if not length.isdecimal() or b"transfer-encoding" in headers:
            raise Refusal(411, "The length of the request is missing.")
        if int(length) > _WRITE[path]:
            raise Refusal(413, f"Files of more than {MAX_UPLOAD_BYTES // 1_000_000} MB are refused.")
        if path != _UPLOAD:
            return 0
        if size_of_files(self.folder) + self._arriving + int(length) > MAX_FOLDER_BYTES:
            raise Refusal(503, "There are too many uploads at the moment. Try again in some minutes.")
        return int(length)

    async def _refuse(self, refusal: Refusal, scope: Any, receive: Any, send: Send) -> None:
        from starlette.responses import PlainTextResponse

        headers = dict(_HEADERS)
        if refusal.status == 401:
            await asyncio.sleep(1.0)  # guesses take time
            headers["WWW-Authenticate"] = 'Basic realm="aptvit", charset="UTF-8"'
        await PlainTextResponse(refusal.reason, refusal.status, headers)(scope, receive, send)

    async def _serve_file(self, scope: Any, receive: Any, send: Send) -> None:
        """Serve a file of the folder, to save or for an ``img`` element: nothing that a visitor sent is a page."""
        from starlette.responses import FileResponse

        path = self._path(scope["path"].removeprefix(_FILES))
        media_type = _IMAGES.get(path.suffix.lower(), "application/octet-stream")
        headers = {**_HEADERS, "Content-Security-Policy": "sandbox", "Cache-Control": "private"}
        await FileResponse(path, 200, headers, media_type, filename=path.name)(scope, receive, send)

    async def _with_folder(self, receive: Any) -> Any:
        """Read a body of JSON, and return a `receive` of it with the folder in place of its alias.

        Raises:
            Refusal: It is not JSON, or names another file than an upload.
        """
        body, message = b"", {"more_body": True}
        while message.get("more_body", False):
            message = await receive()
            if message["type"] != "http.request":  # the visitor left
                return receive
            body += message.get("body", b"")
        try:
            body = json.dumps(self._translated(json.loads(body))).encode()
        except (ValueError, RecursionError):
            raise Refusal(400, "The request is not valid.") from None
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_translated() -> Any:
            return messages.pop() if messages else await receive()

        return receive_translated

    def _translated(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._translated(item) for item in value]
        if not isinstance(value, dict):
            return value
        items = {key: self._translated(item) for key, item in value.items()}
        if isinstance(path := items.get("path"), str):
            items["path"] = str(self._path(path))
        return items

    def _path(self, name: str) -> Path:
        """The path of a file by its name for visitors. Gradio would take other paths, and fetch addresses."""
        try:
            path = Path(str(self.folder) + name.removeprefix(_ALIAS)).resolve()
            is_served = name.startswith(f"{_ALIAS}/") and path.is_relative_to(self.folder) and path.is_file()
        except (OSError, ValueError):  # too long, a null byte
            is_served = False
        if not is_served:
            raise Refusal(404, "There is no such file.")
        return path


class _Answer:
    """Passes gradio's answer on with safe headers, without the folder's path, and without the details of errors."""

    def __init__(self, send: Send, folder: str) -> None:
        self.send, self.folder = send, folder.encode()
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if _header(message, b"content-type").startswith(b"text/event-stream"):
                await self._send_start()
        elif self.start is None:  # a stream: its events are whole messages
            await self.send({**message, "body": self._hidden(message.get("body", b""))})
        else:  # the length changes, so it is sent as a whole
            self.body += message.get("body", b"")
            if not message.get("more_body", False):
                self.body = self._hidden(self.body)
                await self._send_start()
                await self.send({"type": "http.response.body", "body": self.body})

    async def _send_start(self) -> None:
        assert self.start is not None
        start, self.start = self.start, None
        dropped = (b"content-length", b"access-control", b"set-cookie", b"server")
        headers = [pair for pair in start["headers"] if not pair[0].lower().startswith(dropped)]
        if start["status"] >= 400:
            phrase = HTTPStatus(start["status"]).phrase
            self.body = f'{{"detail": "{phrase}"}}'.encode()
            headers = [(b"content-type", b"application/json")]
        is_stream = _header(start, b"content-type").startswith(b"text/event-stream")
        headers += [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
        headers.append((b"content-security-policy", _PAGE_POLICY.encode()))
        if not is_stream:
            headers.append((b"content-length", str(len(self.body)).encode()))
        await self.send({**start, "headers": headers})

    def _hidden(self, body: bytes) -> bytes:
        return body.replace(self.folder, _ALIAS.encode())


def _header(message: Message, name: bytes) -> bytes:
    return next((value for key, value in message.get("headers", ()) if key.lower() == name), b"")
