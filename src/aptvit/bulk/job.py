"""A job in its folder: what is to be done, and the parts that are done, each whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import fsspec

from aptvit.bulk.embedder import Options
from aptvit.bulk.listing import Entry, arrow, list_images

__all__ = ["Job"]

_MANIFEST = "_job.json"  # readers of Parquet folders pass over names that begin so


class Job:
    """Images, cut into parts that are always the same, and a folder for their rows.

    Args:
        source: As for `list_images`.
        options: What to make of the images.
        out: Folder of the parts, a path or a URL that fsspec writes.
        part_size: Images of a part.

    Raises:
        ValueError: If the folder holds another job, or there are no images.
    """

    def __init__(self, source: str, options: Options, out: str, part_size: int = 256) -> None:
        if part_size < 1:
            raise ValueError(f"part_size={part_size} must be at least 1")
        self.options, self.out, self.part_size = options, out, part_size
        self.entries = list_images(source)
        self._fs, self._root = fsspec.core.url_to_fs(out)
        self._check_manifest()

    def _check_manifest(self) -> None:
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.name}\0".encode())
        asked = {"images": len(self.entries), "digest": digest.hexdigest(), "part_size": self.part_size}
        asked |= {"options": asdict(self.options)}
        self._fs.makedirs(self._root, exist_ok=True)
        path = f"{self._root}/{_MANIFEST}"
        if self._fs.exists(path):
            known = json.loads(self._fs.cat_file(path))
            if known != asked:
                other = next(name for name in asked if known.get(name) != asked[name])
                other = {"digest": "images", "options": "model or options"}.get(other, other)
                raise ValueError(f"{self.out} holds rows of another job (other {other}): give another --out")
        else:
            self._write(path, (json.dumps(asked, indent=2) + "\n").encode())

    @property
    def num_parts(self) -> int:
        return -(-len(self.entries) // self.part_size)

    def part(self, number: int) -> Sequence[Entry]:
        """The images of a part."""
        return self.entries[number * self.part_size : (number + 1) * self.part_size]

    def missing(self) -> list[int]:
        """Parts that are not done."""
        there = {path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False, refresh=True)}
        return [number for number in range(self.num_parts) if _name(number) not in there]

    def write(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a part, all or nothing.

        Raises:
            OSError: If it cannot be written.
        """
        parquet, buffer = arrow("pyarrow.parquet"), arrow().BufferOutputStream()
        parquet.write_table(_table(rows, self.options.output), buffer, compression="zstd")
        self._write(f"{self._root}/{_name(number)}", buffer.getvalue().to_pybytes())

    def _write(self, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        beside = f"{folder}/.{name}.{os.getpid()}"
        try:
            self._fs.pipe_file(beside, content)
            self._fs.mv(beside, path)
        except BaseException:
            if self._fs.exists(beside):
                self._fs.rm(beside)
            raise

    def tidy(self) -> None:
        """Remove what killed processes left."""
        for path in self._fs.ls(self._root, detail=False, refresh=True):
            if path.rpartition("/")[2].startswith((".part-", f".{_MANIFEST}")):
                self._fs.rm(path)

    def summary(self) -> dict[str, Any]:
        """Numbers of images, errors and tokens of the parts that are done."""
        dataset, compute = arrow("pyarrow.dataset"), arrow("pyarrow.compute")
        done = sorted(set(range(self.num_parts)) - set(self.missing()))
        told: dict[str, Any] = {"images": 0, "errors": 0, "tokens": 0, "uniform_tokens": 0}
        for number in done:
            part = dataset.dataset(f"{self._root}/{_name(number)}", filesystem=self._fs, format="parquet")
            table = part.to_table(columns=["error", "tokens", "uniform_tokens"])
            told["images"] += len(table)
            told["errors"] += len(table) - table["error"].null_count
            for name in ("tokens", "uniform_tokens"):
                told[name] += compute.sum(table[name]).as_py() or 0
        return {**told, "parts": len(done), "parts_missing": self.num_parts - len(done)}


def _name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _table(rows: Sequence[dict[str, Any]], output: str) -> Any:
    pa = arrow()
    number, text, floats = pa.int32(), pa.string(), pa.list_(pa.float32())
    fields = [("file", text), ("width", number), ("height", number), ("tokens", number), ("uniform_tokens", number)]
    columns: dict[str, Any] = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in fields}
    if output == "predictions":
        columns["classes"] = pa.array([_listed(row.get("classes")) for row in rows], pa.list_(number))
        columns["shares"] = pa.array([_listed(row.get("shares")) for row in rows], floats)
    elif output == "map":
        maps = [row.get("map") for row in rows]
        columns["map"] = pa.array([None if one is None else one.ravel() for one in maps], floats)
        columns["map_shape"] = pa.array([None if one is None else list(one.shape) for one in maps], pa.list_(number))
    else:
        columns["feature"] = pa.array([_listed(row.get("feature")) for row in rows], floats)
    columns["error"] = pa.array([row.get("error") for row in rows], text)
    return pa.table(columns)


def _listed(value: Any) -> Any:
    return None if value is None else value.tolist()
