"""List and read images in a folder, a list, Parquet files or tar shards, at a path or a URL that fsspec reads."""

from __future__ import annotations

import importlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem, make_path_posix

from aptvit.files.images import SUFFIXES
from aptvit.files.regular import MAX_BYTES, check_end_of_tar, open_regular
from aptvit.files.text import printable, read_lines

__all__ = ["Entry", "arrow", "list_images", "read_entries"]

_SHARD, _TABLE = (".tar",), (".parquet", ".pq")
_UNSET = -1
_ROWS = 32  # of a table that are read at a time
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
        problem: Why a file with images could not be listed: the row of results holds it as the error.
    """

    name: str
    file: str
    offset: int = _UNSET
    size: int = 0
    row: int = _UNSET
    column: str = ""
    problem: str = ""


def list_images(source: str) -> list[Entry]:
    """List all images of a source, always in the same order.

    A folder may hold images, shards and Parquet files beside each other. A shard or Parquet file that cannot be read
    to its end has an entry with its problem, after those of the images that were found in it.

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
    if len(files) == 1 and files[0].lower().endswith(".txt"):
        entries = _list_lines(files[0])
    else:
        entries = [entry for file in files for entry in _list_file(file)]
    problems = [entry for entry in entries if entry.problem]
    if not entries or len(problems) == len(entries):
        reason = problems[0].problem if problems else f"{printable(source)} holds no images"
        raise ValueError(f"{reason}: give a folder of images, *.tar shards or Parquet files, or a list")
    return entries


def _files(source: str) -> list[str]:
    """Files of a folder, or the single file; URLs keep their protocol."""
    is_local = _is_local(source)
    # fsspec would read "::" in the name of a local file as a chain of URLs.
    fs, root = (LocalFileSystem(), make_path_posix(source)) if is_local else fsspec.core.url_to_fs(source)
    if not fs.exists(root):
        raise ValueError(f"{printable(source)} does not exist: give a folder, a file, or a URL that fsspec reads")
    paths = sorted(fs.find(root)) if fs.isdir(root) else [root]
    visible = [path for path in paths if not any(part.startswith(".") for part in path[len(root) :].split("/"))]
    return visible if isinstance(fs, LocalFileSystem) else [fs.unstrip_protocol(path) for path in visible]


def _is_local(file: str) -> bool:
    return "://" not in file


def _open(file: str) -> Any:
    """Open a file or a URL to read bytes.

    Raises:
        OSError: If there is no such file, or it is not a regular file, such as a pipe, which may never end.
    """
    return open_regular(file) if _is_local(file) else fsspec.open(file, "rb")


def _list_lines(file: str) -> list[Entry]:
    if _is_local(file):
        return [Entry(printable(line), line) for line in read_lines(file)]
    with _open(file) as stream:
        try:
            lines = stream.read(MAX_BYTES).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{printable(file)} is not text in UTF-8 (byte {error.start}): save it in UTF-8") from None
    return [Entry(printable(line.strip()), line.strip()) for line in lines if line.strip()]


def _list_file(file: str) -> Iterator[Entry]:
    """The images in a shard or a table, or the image; none in other files."""
    name, ending = printable(file), f".{file.lower().rpartition('.')[2]}"
    try:
        if ending in _SHARD:
            yield from _list_shard(file)
        elif ending in _TABLE:
            yield from _list_table(file)
        elif ending in SUFFIXES:
            yield Entry(name, file)
    except (OSError, ValueError, tarfile.TarError) as error:
        kind = "a tar file" if ending in _SHARD else "a Parquet file of images"
        yield Entry(name, file, problem=f"{name} is not {kind}: {' '.join(str(error).split())}")


def _list_shard(file: str) -> Iterator[Entry]:
    with _open(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.isfile() and f".{member.name.lower().rpartition('.')[2]}" in SUFFIXES:
                yield Entry(printable(f"{file}:{member.name}"), file, member.offset_data, member.size)
        check_end_of_tar(tar, stream)


def _list_table(file: str) -> Iterator[Entry]:
    parquet = arrow("pyarrow.parquet")
    with _open(file) as stream:
        opened = parquet.ParquetFile(stream)
        column, rows = _column(opened.schema_arrow, file), opened.metadata.num_rows
        if rows > max(1000, _size(stream)):
            raise ValueError(f"{rows:,} rows in {_size(stream):,} bytes are no images")
    for row in range(rows):
        yield Entry(printable(f"{file}[{row}]"), file, row=row, column=column)


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
    for (file, is_table, _), group in groupby(
        entries, key=lambda entry: (entry.file, entry.row != _UNSET, entry.problem)
    ):
        members, count = list(group), 0
        try:
            if members[0].problem:
                raise ValueError(members[0].problem)
            for content in _read_rows(file, members) if is_table else _read_file(file, members):
                yield content
                count += 1
        except Exception as error:  # a deleted file, or a store that does not respond: an error for each of its images
            yield from [error] * (len(members) - count)


def _read_file(file: str, entries: Sequence[Entry]) -> Iterator[bytes | Exception]:
    with _open(file) as stream:
        size = _size(stream)
        for entry in entries:
            start, length = (entry.offset, entry.size) if entry.offset != _UNSET else (0, size)
            if start + length > size or length > MAX_BYTES:
                yield ValueError(f"an image of {length:,} bytes, more than are left or are read")
                continue
            stream.seek(start)
            yield stream.read(length)


def _size(stream: Any) -> int:
    """Bytes of an open file."""
    size: int = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return size


def _read_rows(file: str, entries: Sequence[Entry]) -> Iterator[bytes | Exception]:
    """Read rows in ascending order, a few at a time: a row group may hold more images than fit into memory."""
    rows = {entry.row for entry in entries}
    with _open(file) as stream:
        table = arrow("pyarrow.parquet").ParquetFile(stream)
        end = 0
        for group in range(table.num_row_groups):
            row, end = end, end + table.metadata.row_group(group).num_rows
            if rows.isdisjoint(range(row, end)):
                continue
            batches = table.iter_batches(_ROWS, row_groups=[group], columns=[entries[0].column])
            for value in (value for batch in batches for value in batch.column(0)):
                if row in rows:
                    yield _content(value.as_py())
                if row >= entries[-1].row:
                    return
                row += 1


def _content(value: Any) -> bytes | Exception:
    try:
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, str):
            with _open(value) as stream:
                content: bytes = stream.read(MAX_BYTES)
                return content
        if not isinstance(value, bytes):
            return ValueError("the row is empty")
        return value if len(value) <= MAX_BYTES else ValueError(f"an image of {len(value):,} bytes, more than are read")
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
