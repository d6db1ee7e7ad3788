"""Hostile tar shards, Parquet files and lists, as sources of `embed` and of trainings."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import Case, Payload
from .images import encode

__all__ = ["archives"]


def archives(seed: int) -> Iterator[Case]:
    """All hostile archives."""
    yield from _tars()
    yield from _parquet()
    yield from _lists()


def _tar(change: Callable[[tarfile.TarFile], Any]) -> Callable[[Path, Payload], Any]:
    """A shard with two good samples, after something else."""

    def make(path: Path, payload: Payload) -> None:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            change(tar)
            for key in ("first", "last"):
                _add(tar, f"{key}.png", encode("png"))
                _add(tar, f"{key}.cls", b"0")

    return make


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **values: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def _tars() -> Iterator[Case]:
    def case(name: str, make: Callable[[Path, Payload], Any], must_tell: bool = True) -> Case:
        return Case(f"tar {name}", "shard", "hostile.tar", make, must_tell)

    def changed(change: Callable[[bytearray], Any]) -> Callable[[Path, Payload], Any]:
        def make(path: Path, payload: Payload) -> None:
            _tar(lambda tar: None)(path, payload)
            content = bytearray(path.read_bytes())
            result = change(content)
            path.write_bytes(content if result is None else result)

        return make

    def cut(share: float) -> Callable[[bytearray], bytes]:
        return lambda content: bytes(content[: int(len(content) * share)])

    def huge_size(content: bytearray) -> None:
        content[124:136] = b"\x80" + bytes(4) + (2**55).to_bytes(7, "big")
        header = bytes(content[:512])
        total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
        content[148:156] = f"{total:06o}\0 ".encode()

    def negative_size(content: bytearray) -> None:
        content[124:136] = b"\xff" * 12
        header = bytes(content[:512])
        total = sum(header[:148]) + 8 * 32 + sum(header[156:512])
        content[148:156] = f"{total:06o}\0 ".encode()

    yield case("empty", lambda path, payload: path.touch())
    yield case("cut in the first image", changed(cut(0.1)))
    yield case("cut in half", changed(cut(0.3)))
    yield case("of noise", changed(lambda content: os.urandom(4096)))
    yield case("of a member of 2^55 bytes", changed(huge_size))
    yield case("of a member of a negative size", changed(negative_size))
    yield case("that is compressed", changed(lambda content: __import__("gzip").compress(bytes(content))))
    yield case("pipe", lambda path, payload: os.mkfifo(path))
    yield case("link to zeros without end", lambda path, payload: path.symlink_to("/dev/zero"))

    def sparse(path: Path, payload: Payload) -> None:
        path.touch()
        os.truncate(path, 50_000_000_000)

    yield case("file of 50 GB", sparse)
    links = {"symlink": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}
    for name, kind in links.items():
        yield case(
            f"with a {name} out of it",
            _tar(lambda tar, kind=kind: _add(tar, "a.png", type=kind, linkname="../../../etc/passwd")),
            must_tell=False,
        )
    for name, kind in {"pipe": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE, "folder": tarfile.DIRTYPE}.items():
        yield case(f"with a {name}", _tar(lambda tar, kind=kind: _add(tar, "a.png", type=kind)), must_tell=False)
    for name in (
        "../../../../out-of-it.png",
        "/tmp/hostile-absolute.png",
        "a\nb.png",
        "x" * 5000 + ".png",
        "\x1b[31m.png",
    ):
        yield case(f"with a member {name[:25]!r}", _tar(lambda tar, name=name: _add(tar, name, encode("png"))), False)
    for number, label in enumerate(
        (b"9" * 18, b"9" * 5000, b"1e9", b"\xff\xfe\x00", b"--5", "²".encode(), b"a\nb", b"[1]")
    ):
        yield case(
            f"with the label {number}",
            _tar(lambda tar, label=label: (_add(tar, "a.png", encode("png")), _add(tar, "a.cls", label))),
            must_tell=False,
        )
    for number, record in enumerate((b"[" * 50_000, b'{"label": NaN}', b'{"label": 1e400}', b'{"label": {}}', b"")):
        yield case(
            f"with the JSON {number}",
            _tar(lambda tar, record=record: (_add(tar, "a.png", encode("png")), _add(tar, "a.json", record))),
            must_tell=False,
        )
    yield case("with 50000 empty members", _tar(lambda tar: [_add(tar, f"{i}.txt") for i in range(50_000)]), False)
    yield case("with a damaged image", _tar(lambda tar: _add(tar, "hostile.png", encode("png")[:50])))


def _parquet() -> Iterator[Case]:
    def case(name: str, columns: Callable[[Payload], dict[str, Any]], must_tell: bool = True) -> Case:
        def make(path: Path, payload: Payload) -> None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table(columns(payload)), path, compression="zstd")

        return Case(f"parquet {name}", "table", "hostile.parquet", make, must_tell)

    good = encode("png")
    yield case("of numbers", lambda payload: {"image": [1, 2, 3]})
    yield case("of no columns", lambda payload: {})
    yield case("of no rows", lambda payload: {"image": __import__("pyarrow").array([], "binary")}, must_tell=False)
    yield case("of nulls", lambda payload: {"image": __import__("pyarrow").nulls(5, "binary")})
    yield case("of 100 million nulls", lambda payload: {"image": __import__("pyarrow").nulls(100_000_000, "binary")})
    yield case("of a cell of 1 GB", lambda payload: {"image": [bytes(1_000_000_000), good]})
    yield case("of damaged images", lambda payload: {"image": [good, good[:40], b"", b"hostile"]})
    paths = ["/etc/passwd", "/dev/zero", "nothing.png", "../../x.png", "a\0b.png", "x" * 5000]
    yield case("of paths", lambda payload: {"path": paths})
    yield case("of the address of the server", lambda payload: {"path": ["a.png", "memory://x.png"]})
    yield case(
        "of structs of nulls", lambda payload: {"image": [{"bytes": None, "path": None}, {"bytes": good, "path": ""}]}
    )
    yield case("of a name in two lines", lambda payload: {"a\nb": [1]})
    for name, content in (
        ("empty", b""),
        ("of magic alone", b"PAR1PAR1"),
        ("of noise", b"PAR1" + bytes(range(256)) + b"PAR1"),
    ):
        yield Case(f"parquet {name}", "table", "hostile.parquet", _bytes(content))
    footer = b"PAR1" + b"\x15" * 100 + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    yield Case("parquet with a footer of 2 GB", "table", "hostile.parquet", _bytes(footer))
    yield Case("parquet pipe", "table", "hostile.parquet", lambda path, payload: os.mkfifo(path))

    def cut(path: Path, payload: Payload) -> None:
        case("whole", lambda payload: {"image": [good] * 9}).make(path, payload)
        path.write_bytes(path.read_bytes()[:-200])

    yield Case("parquet cut", "table", "hostile.parquet", cut)


def _bytes(content: bytes) -> Callable[[Path, Payload], Any]:
    return lambda path, payload: path.write_bytes(content)


def _lists() -> Iterator[Case]:
    good = "data/good0.png\n"
    texts = {
        "of nothing": "",
        "of files that are not there": "nothing.png\n../nothing.png\n" + good,
        "of folders and devices": "/\n/dev/zero\n/etc\n" + good,
        "of names too long": "x" * 10_000 + "\n" + good,
        "of a name with a null": "a\0b.png\n" + good,
        "of unknown protocols": "nothing://x.png\n" + good,
        "of itself": "hostile.txt\n" + good,
        "of control characters": "\x1b[31mhostile.png\n" + good,
    }
    for name, text in texts.items():
        yield Case(f"list {name}", "list", "hostile.txt", _bytes(text.encode()), name == "of nothing")
    yield Case("list in another encoding", "list", "hostile.txt", _bytes(b"\xff\xff\xff.png\n"))
    yield Case("list pipe", "list", "hostile.txt", lambda path, payload: os.mkfifo(path))
