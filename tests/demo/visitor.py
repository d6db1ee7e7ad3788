"""A visitor of the demo page who speaks HTTP, as the page's own scripts do."""

from __future__ import annotations

import io
import json
import re
import secrets
from typing import Any

import httpx
import numpy as np
from PIL import Image


class Busy(Exception):
    """The page said that it has too many visitors."""


def png(pixels: np.ndarray) -> bytes:
    """The bytes of an image of (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


class Visitor:
    """A session of the page.

    Args:
        address: URL of the page.
        options: Options of ``httpx.Client``.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self.client = httpx.Client(base_url=address, timeout=120, trust_env=False, **options)
        self.session = secrets.token_hex(8)
        config = self.client.get("config").raise_for_status().json()
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}
        initial = {component["id"]: component["props"].get("value") for component in config["components"]}
        inputs = {event["api_name"]: event["inputs"] for event in config["dependencies"]}
        self.controls = [initial[component] for component in inputs["view_7"][1:]]

    def upload(self, data: bytes, name: str = "image.png") -> str:
        """Upload a file; the page's name of it."""
        response = self.client.post("gradio_api/upload", files={"files": (name, data)})
        return str(response.raise_for_status().json()[0])

    def call(self, event: str, *values: Any) -> list[Any]:
        """Trigger an event and wait for its outputs; the messages that it showed are kept in `messages`."""
        body = {"data": [None, *values], "fn_index": self.events[event], "session_hash": self.session}
        joined = self.client.post("gradio_api/queue/join", json=body)
        if joined.status_code == 503:
            raise Busy
        number = joined.raise_for_status().json()["event_id"]
        self.messages: list[str] = []
        with self.client.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") == "log":
                    self.messages.append(message["log"])
                if message.get("msg") == "process_completed" and message["event_id"] == number:
                    if not message["success"]:
                        raise ValueError(json.dumps(message["output"]))
                    return list(message["output"]["data"])
        raise ConnectionError("the stream ended before the event did")

    def read(self, name: str) -> None:
        """Choose an uploaded file as the photo."""
        self.call("read", {"path": name, "meta": {"_type": "gradio.FileData"}})

    def view(self, keep: float) -> tuple[int, str]:
        """Number of tokens, and the address of the drawn patches."""
        _, numbers, patches, *_ = self.call("view_7", *self.controls[:3], keep, *self.controls[4:])
        return int(re.findall(r'id="tokens">(\d+)', numbers)[0]), patches["url"]

    def predict(self, keep: float) -> dict[str, list[int]]:
        """Percent of each class, by the uniform and by the adaptive model."""
        top = self.call("predict_7", *self.controls[:3], keep, *self.controls[4:])[2]
        columns = re.findall(r"<h4>(\w+)</h4>(.*?)</div>", top)
        return {title: [int(share) for share in re.findall(r"<span>(\d+)%</span>", rows)] for title, rows in columns}
