"""Serve the demo page: gradio's application behind the guard, in a thread of this process."""

from __future__ import annotations

import os
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aptvit.demo.access import Access
from aptvit.demo.demo_model import DemoModel
from aptvit.demo.guard import MAX_UPLOAD_BYTES, Guard
from aptvit.demo.page import STYLE, build_page
from aptvit.demo.uploads import delete_old_files, upload_folder
from aptvit.files.sample_photos import write_sample_photos

__all__ = ["MAX_WAITING", "serve"]

MAX_WAITING = 100
"""Largest number of events that wait; visitors read that the page is busy when there are more."""

_MAX_SESSIONS = 200  # visitors whose image is kept
_MAX_CONNECTIONS = 500
_KEPT_SECONDS = 600.0  # age from which uploads and results are deleted
_PORTS = range(7860, 7960)


@contextmanager
def serve(
    model: DemoModel, access: Access | None = None, port: int | None = None, open_browser: bool = False
) -> Iterator[str]:
    """Serve the page until the context ends; uploaded files are deleted then.

    Args:
        model: The model of the page.
        access: Who may open the page; by default only this machine.
        port: Port to bind to; by default the first free port from 7860 on.
        open_browser: Open the page in a browser.

    Yields:
        URL of the page.

    Raises:
        ImportError: If gradio is not installed.
        ValueError: If the address or port cannot be used.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError("the demo page needs gradio: pip install 'aptvit[demo]'") from None
    access = access or Access()
    with (
        _bound(access.host, port) as listener,
        upload_folder() as folder,
        _settings_of_gradio(folder),
        _running(Guard(_application(model, folder), folder, access), listener, folder),
    ):
        name = "localhost" if access.host in ("0.0.0.0", "::") else access.host
        address = f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}/"
        if open_browser:
            webbrowser.open(address)
        yield address


@contextmanager
def _settings_of_gradio(folder: Path) -> Iterator[None]:
    """Set what gradio reads from the environment whenever it makes a component or moves a file."""
    # It summarises the events so far at each event, ten thousand by default.
    settings = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_MAX_EVENTS": "100"}
    previous = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _application(model: DemoModel, folder: Path) -> Any:
    """Gradio's application of the page. Options that environment variables would change are set."""
    import gradio as gr
    from fastapi import FastAPI

    page = build_page(model, write_sample_photos(folder / "samples"))
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    page.state_session_capacity = _MAX_SESSIONS
    page.has_launched = True  # gradio checks the paths of inputs only then, also where it is mounted
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        footer_links=[],
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        root_path="",
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )


@contextmanager
def _bound(host: str, port: int | None) -> Iterator[socket.socket]:
    """Bind to an address, so that no other process can take the port until the server listens."""
    reason: OSError | None = None
    for candidate in _PORTS if port is None else (port,):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address, family=family)
        except OSError as error:
            reason = error
        else:
            with listener:
                yield listener
            return
    ports = f"{_PORTS.start} to {_PORTS.stop - 1}" if port is None else port
    raise ValueError(f"cannot serve on {host}, port {ports}: {reason}; choose another --port or --host")


@contextmanager
def _running(application: Any, listener: socket.socket, folder: Path) -> Iterator[None]:
    """Run the server, and delete old files, in threads until the context ends."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="critical",  # it logs a traceback for each open page when the server stops
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server, stopped = uvicorn.Server(config), threading.Event()

    def delete_regularly() -> None:
        while not stopped.wait(_KEPT_SECONDS / 10):
            delete_old_files(folder, _KEPT_SECONDS)

    threads = [
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True),
        threading.Thread(target=delete_regularly, daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while not server.started:
            if not threads[0].is_alive():
                raise RuntimeError("the server of the page did not start")
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        stopped.set()
        for thread in threads:
            thread.join(timeout=5)
