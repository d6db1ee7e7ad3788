"""A job in its folder: the images and options of the job, and the finished parts, each complete or absent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from aptvit.bulk.attempts import Attempts
from aptvit.bulk.embedder import Embedder, Loaded, Options, digest_weights, files_of_weights, load
from aptvit.bulk.listing import Entry, arrow, list_images
from aptvit.storage.agreement import differences, digest_texts
from aptvit.storage.locking import lock
from aptvit.storage.writing import write_bytes

__all__ = ["Job"]

_VERSION = 2  # of the manifest
_MANIFEST = "_job.json"  # readers of Parquet folders skip names that begin with "_" or "."


class Job:
    """Images in a fixed order, divided into parts, and the folder that the rows of each part are written to.

    Args:
        source: The images, see `list_images`.
        options: The model and the output to compute.
        out: Folder of the parts, a path or a URL that fsspec writes.
        part_size: Number of images in a part.
        format: Format of the parts; CSV holds predictions only, in columns ``class_1``, ``name_1``, ``share_1``, ...

    Attributes:
        data: timm's data configuration of the model.
        entries: The images.
        weights: Digest of the weights of the model.

    Raises:
        ValueError: If the model does not exist or has no trained weights, the folder holds another job, or rows of
            another model, the part size is below 1, the format cannot hold the output, or there are no images.
    """

    def __init__(
        self,
        source: str,
        options: Options,
        out: str,
        part_size: int = 256,
        format: Literal["parquet", "csv"] = "parquet",
    ) -> None:
        if format == "csv" and options.output != "predictions":
            raise ValueError(f"CSV holds predictions, not {options.output}: --output predictions, or --format parquet")
        self.format = format
        if part_size < 1:
            raise ValueError(f"part_size={part_size} must be at least 1")
        self.options, self.out, self.part_size = options, out, part_size
        self.entries = list_images(source)
        files = files_of_weights(options)
        self._loaded: Loaded | None = load(options)  # refuses what is no model, before files of any size are read
        self.data = self._loaded[1]
        self.weights = digest_weights(options, self._loaded[0])
        if files_of_weights(options) != files:
            raise self._saved_anew("while it was read")
        self._fs, self._root = fsspec.core.url_to_fs(out)
        self._check_manifest()

    def _check_manifest(self) -> None:
        names = digest_texts(entry.name for entry in self.entries)
        manifest = {"version": _VERSION, "images": f"{len(self.entries)} ({names})", "part_size": self.part_size}
        manifest |= {"format": self.format, **asdict(self.options), "weights of the model": self.weights}
        self._fs.makedirs(self._root, exist_ok=True)
        path = f"{self._root}/{_MANIFEST}"
        if self._fs.exists(path):
            changes = differences(self._stored_manifest(path), manifest)
            if changes:
                raise ValueError(
                    f"{self.out} holds rows of another job ({'; '.join(changes)}): give another --out, or take what "
                    "that job was begun with"
                )
        else:
            self._write(path, (json.dumps(manifest, indent=2) + "\n").encode())

    def _stored_manifest(self, path: str) -> dict[str, Any]:
        try:
            stored: dict[str, Any] = dict(json.loads(self._fs.cat_file(path)))
        except (ValueError, TypeError):
            raise ValueError(f"{path} is damaged: give another --out") from None
        return stored

    def embedder(self, device: str) -> Embedder:
        """The model of the job on a device: the one that was loaded for its weights' digest, in the first call.

        Args:
            device: Torch device.

        Raises:
            ValueError: If it does not exist, or was saved anew since the job was begun.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            loaded = load(self.options)
            weights = digest_weights(self.options, loaded[0])
            if weights != self.weights:
                raise self._saved_anew(f"({self.weights} → {weights})")
        return Embedder(self.options, device, loaded)

    def _saved_anew(self, detail: str) -> ValueError:
        return ValueError(
            f"{self.options.checkpoint or self.options.model} was saved anew {detail}: rows of two models do not go "
            "into one --out"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}  # other processes load it for themselves

    @property
    def attempts(self) -> Attempts:
        """Counts how often workers of a cluster begin a part."""
        return Attempts(self._fs.unstrip_protocol(self._root))

    @property
    def num_parts(self) -> int:
        """Number of parts, finished or not."""
        return -(-len(self.entries) // self.part_size)

    def part(self, number: int) -> Sequence[Entry]:
        """Return the images of a part.

        Args:
            number: Number of the part, from 0.
        """
        return self.entries[number * self.part_size : (number + 1) * self.part_size]

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not written yet, in ascending order."""
        files = {path.rpartition("/")[2] for path in self._fs.ls(self._root, detail=False, refresh=True)}
        return [number for number in range(self.num_parts) if self._name(number) not in files]

    def write(self, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a part to a temporary file and rename it: the part is complete or absent.

        Args:
            number: Number of the part.
            rows: A row for each image of the part, see `Embedder.rows`.

        Raises:
            OSError: If the file cannot be written; on this machine a `WriteError`.
        """
        table, buffer = _table(rows, self.options.output), arrow().BufferOutputStream()
        if self.format == "csv":
            arrow("pyarrow.csv").write_csv(_flat(table), buffer)
        else:
            arrow("pyarrow.parquet").write_table(table, buffer, compression="zstd")
        self._write(f"{self._root}/{self._name(number)}", buffer.getvalue().to_pybytes())

    def _write(self, path: str, content: bytes) -> None:
        if isinstance(self._fs, LocalFileSystem):
            write_bytes(path, content)
            return
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}"
        try:
            self._fs.pipe_file(temporary, content)
            self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm(temporary)
            raise

    def _name(self, number: int) -> str:
        return f"part-{number:06d}.{self.format}"

    def only_writer(self) -> AbstractContextManager[Any]:
        """A context in which no other process of this machine runs the job.

        File systems without locks, most of them remote, lock nothing: there parts may be computed twice, and the same
        rows replace each other.

        Raises:
            ValueError: If another process runs it.
        """
        return lock(self._root) if isinstance(self._fs, LocalFileSystem) else nullcontext()

    def tidy(self) -> None:
        """Remove the temporary files of killed processes."""
        for path in self._fs.ls(self._root, detail=False, refresh=True):
            if path.rpartition("/")[2].startswith((".part-", f".{_MANIFEST.removesuffix('.json')}.")):
                self._fs.rm(path)

    def summary(self) -> dict[str, Any]:
        """Count the rows of the finished parts.

        Returns:
            ``images``, ``errors``, ``tokens`` and ``uniform_tokens`` (patch tokens of the adaptive and of the uniform
            model), ``parts`` and ``parts_missing``.
        """
        dataset, compute = arrow("pyarrow.dataset"), arrow("pyarrow.compute")
        done = sorted(set(range(self.num_parts)) - set(self.missing()))
        counts: dict[str, Any] = {"images": 0, "errors": 0, "tokens": 0, "uniform_tokens": 0}
        for number in done:
            part = dataset.dataset(f"{self._root}/{self._name(number)}", filesystem=self._fs, format=self.format)
            table = part.to_table(columns=["tokens", "uniform_tokens"])
            counts["images"] += len(table)
            counts["errors"] += table["tokens"].null_count  # CSV does not tell an empty error from none
            for name in ("tokens", "uniform_tokens"):
                counts[name] += compute.sum(table[name]).as_py() or 0
        return {**counts, "parts": len(done), "parts_missing": self.num_parts - len(done)}


def _table(rows: Sequence[dict[str, Any]], output: str) -> Any:
    pa = arrow()
    number, text, floats = pa.int32(), pa.string(), pa.list_(pa.float32())
    fields = [("file", text), ("width", number), ("height", number), ("tokens", number), ("uniform_tokens", number)]
    columns: dict[str, Any] = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in fields}
    if output == "predictions":
        columns["classes"] = pa.array([_as_list(row.get("classes")) for row in rows], pa.list_(number))
        columns["names"] = pa.array([_as_list(row.get("names")) for row in rows], pa.list_(text))
        columns["shares"] = pa.array([_as_list(row.get("shares")) for row in rows], floats)
    elif output == "map":
        maps = [row.get("map") for row in rows]
        columns["map"] = pa.array([None if array is None else array.ravel() for array in maps], floats)
        shapes = [None if array is None else list(array.shape) for array in maps]
        columns["map_shape"] = pa.array(shapes, pa.list_(number))
    else:
        columns["feature"] = pa.array([_as_list(row.get("feature")) for row in rows], floats)
    columns["error"] = pa.array([row.get("error") for row in rows], text)
    return pa.table(columns)


def _flat(table: Any) -> Any:
    """The table without lists: the predictions in columns of their own, ``class_1``, ``name_1``, ``share_1``, ..."""
    pa = arrow()
    columns = {name: table[name] for name in ("file", "width", "height", "tokens", "uniform_tokens", "error")}
    lists = {name: table[name].to_pylist() for name in ("classes", "names", "shares")}
    count = max((len(values or ()) for values in lists["classes"]), default=0)
    for place in range(count):
        for name, single in (("classes", "class"), ("names", "name"), ("shares", "share")):
            kind = table.schema.field(name).type.value_type
            columns[f"{single}_{place + 1}"] = pa.array([v[place] if v else None for v in lists[name]], kind)
    return pa.table(columns)


def _as_list(value: Any) -> Any:
    return None if value is None else value.tolist()
