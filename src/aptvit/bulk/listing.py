"""List and read images in a folder, a list, Parquet files or tar shards, at a path or a URL that fsspec reads."""

from __future__ import annotations

import importlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import fsspec

from aptvit.files.images import SUFFIXES

__all__ = ["Entry", "arrow", "list_images", "read_entries"]

_SHARD, _TABLE = (".tar",), (".parquet", ".pq")
_UNSET = -1
_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "content", "path", "file", "url")


@dataclass(frozen=True)
class Entry:
    """The place of an image: a file, a member of a tar shard, or a cell of a Parquet file.

    Attributes:
        name: Name of the image in the results.
        file: Path or URL of the file that holds the image.
        offset: Position of the first byte in a tar shard; -1 for other files.
        size: Number of bytes in a tar shard.
        row: Row in a Parquet file; -1 for other files.
        column: Column in a Parquet file.
    """

    name: str
    file: str
    offset: int = _UNSET
    size: int = 0
    row: int = _UNSET
    column: str = ""


def list_images(source: str) -> list[Entry]:
    """List all images of a source, always in the same order.

    Args:
        source: A folder of images, of ``*.tar`` shards (WebDataset) or of Parquet files, one such file, or a ``*.txt``
            file with a path or URL in each line. A path, or a URL that fsspec reads (``s3://``, ``hf://``, ...).

    Returns:
        An entry for each image.

    Raises:
        ValueError: If the source does not exist, cannot be read or holds no images.
        ImportError: If Parquet files need pyarrow and it is not installed.
    """
    files = _files(source)
    shards = [file for file in files if file.lower().endswith(_SHARD)]
    tables = [file for file in files if file.lower().endswith(_TABLE)]
    if len(files) == 1 and files[0].lower().endswith(".txt"):
        with fsspec.open(files[0], "rt", encoding="utf-8") as lines:
            entries = [Entry(line.strip(), line.strip()) for line in lines if line.strip()]
    elif shards:
        entries = [entry for file in shards for entry in _list_shard(file)]
    elif tables:
        entries = [entry for file in tables for entry in _list_table(file)]
    else:
        images = [file for file in files if f".{file.lower().rpartition('.')[2]}" in SUFFIXES]
        entries = [Entry(file, file) for file in images]
    if not entries:
        raise ValueError(f"{source} holds no images: give a folder of images, *.tar shards or Parquet files, or a list")
    return entries


def _files(source: str) -> list[str]:
    """Files of a folder, or the single file; URLs keep their protocol."""
    fs, root = fsspec.core.url_to_fs(source)
    if not fs.exists(root):
        raise ValueError(f"{source} does not exist: give a folder, a file, or a URL that fsspec reads")
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    paths = sorted(fs.find(root)) if fs.isdir(root) else [root]
    visible = [path for path in paths if not any(part.startswith(".") for part in path[len(root) :].split("/"))]
    return visible if local else [fs.unstrip_protocol(path) for path in visible]


def _list_shard(file: str) -> Iterator[Entry]:
    try:
        with fsspec.open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile() and f".{member.name.lower().rpartition('.')[2]}" in SUFFIXES:
                    yield Entry(f"{file}:{member.name}", file, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{file} is not a tar file: {error}") from None


def _list_table(file: str) -> Iterator[Entry]:
    parquet = arrow("pyarrow.parquet")
    try:
        with fsspec.open(file, "rb") as stream:
            opened = parquet.ParquetFile(stream)
            column, rows = _column(opened.schema_arrow, file), opened.metadata.num_rows
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a Parquet file of images: {' '.join(str(error).split())}") from None
    for row in range(rows):
        yield Entry(f"{file}[{row}]", file, row=row, column=column)


def _column(schema: Any, file: str) -> str:
    """Name of the column with images: bytes, paths as text, or Hugging Face's struct of both."""
    types = arrow("pyarrow").types

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        checks = (types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
        return any(check(kind) for check in checks) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    usual = [name for name in _COLUMNS if name in schema.names and holds_images(name)]
    structs = [name for name in schema.names if types.is_struct(schema.field(name).type) and holds_images(name)]
    if not (usual or structs):
        raise ValueError(
            f"none of its columns ({', '.join(schema.names)}) holds images: name the column of images 'image'"
        )
    return (usual or structs)[0]


def read_entries(entries: Sequence[Entry]) -> Iterator[bytes | Exception]:
    """Read the bytes of images, in order. For an image that cannot be read, the exception is yielded in its place."""
    for (file, is_table), group in groupby(entries, key=lambda entry: (entry.file, entry.row != _UNSET)):
        members = list(group)
        try:
            contents = _read_rows(file, members) if is_table else _read_file(file, members)
        except Exception as error:  # a deleted file, or a store that does not respond: an error for each of its images
            contents = [error] * len(members)
        yield from contents


def _read_file(file: str, entries: Sequence[Entry]) -> list[bytes | Exception]:
    with fsspec.open(file, "rb") as stream:
        contents: list[bytes | Exception] = []
        for entry in entries:
            if entry.offset != _UNSET:
                stream.seek(entry.offset)
            contents.append(stream.read(entry.size if entry.offset != _UNSET else -1))
        return contents


def _read_rows(file: str, entries: Sequence[Entry]) -> list[bytes | Exception]:
    dataset = arrow("pyarrow.dataset")
    fs, path = fsspec.core.url_to_fs(file)
    table = dataset.dataset(path, filesystem=fs, format="parquet")
    rows = table.take([entry.row for entry in entries], columns=[entries[0].column])
    return [_content(value) for value in rows.column(0).to_pylist()]


def _content(value: Any) -> bytes | Exception:
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, str):
            with fsspec.open(value, "rb") as stream:
                content: bytes = stream.read()
                return content
        return value if isinstance(value, bytes) else ValueError("the row is empty")
    except Exception as error:
        return error


def arrow(name: str = "pyarrow") -> Any:
    """Import a module of pyarrow.

    Args:
        name: Full name of the module.

    Raises:
        ImportError: If pyarrow is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'aptvit[bulk]'") from None
