"""Files that others wrote: nothing but regular files is opened, and no more is read than expected."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from aptvit.files.clips import read_clip
from aptvit.files.images import ImageError, check_readable, open_image, opened, turn_of
from aptvit.files.regular import is_regular, open_regular, read_part, read_regular
from aptvit.files.text import read_json, read_text
from aptvit.files.weights import read_checkpoint, read_weights, shapes_of_weights
from aptvit.measuring.machine import digest_files


@pytest.fixture(autouse=True)
def _never_waits() -> Iterator[None]:
    signal.alarm(20)  # a test that waits for a pipe would wait for ever
    yield
    signal.alarm(0)


@pytest.fixture(params=["pipe", "socket", "device", "link to a device"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif request.param == "device":
        return Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    return path


def test_only_regular_files_are_opened(irregular: Path, tmp_path: Path) -> None:
    assert not is_regular(irregular)
    for read in (open_regular, read_regular, lambda path: read_part(path, 0, 1)):
        with pytest.raises(OSError):
            read(irregular)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    (tmp_path / "good").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "good")
    assert read_regular(tmp_path / "link") == b"12345"


def test_every_reader_refuses_them(irregular: Path) -> None:
    for image_reader in (open_image, lambda path: read_clip(path, lambda image: image, 2)):
        with pytest.raises(ImageError, match=irregular.name):
            image_reader(irregular)
    with pytest.raises(OSError), opened(irregular):
        pass
    for reader in (read_text, read_json, read_weights, shapes_of_weights, read_checkpoint):
        with pytest.raises(ValueError, match=irregular.name):
            reader(irregular)
    with pytest.raises(ValueError, match="none of 1 files"):
        check_readable([irregular])
    assert turn_of(irregular) is None and digest_files([irregular]) == digest_files([irregular])


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, 50_000_000_000)
    with pytest.raises(ValueError, match=r"large\.json: it has more than the 2,147,483,648 bytes"):
        read_json(path)
    with pytest.raises(ImageError, match="not an image"):
        open_image(path)
    assert digest_files([path]) == digest_files([path])
    path.write_bytes(b"[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(ValueError, match="more than the 2 bytes"):
        read_json(path, 2)
    with pytest.raises(OSError):
        read_regular("/proc/self/environ", 0)  # a file whose size says nothing


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (0, -1), (2, 4), (0, 2**60), (2**60, 0)])
def test_parts_outside_of_a_file_are_refused(tmp_path: Path, offset: int, size: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"12345")
    assert read_part(path, 1, 3) == b"234"
    with pytest.raises(OSError, match="ends before"):
        read_part(path, offset, size)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "", "nothing", "/dev/zero"])
def test_names_that_are_no_names_are_no_files(name: str, tmp_path: Path) -> None:
    assert not is_regular(tmp_path / name)


def test_no_other_format_than_those_of_the_endings_is_decoded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({canary}) (w) file closefile\n"
    (tmp_path / "a.jpg").write_text(script)
    with pytest.raises(ImageError, match=r"a\.jpg: not an image"):
        open_image(tmp_path / "a.jpg")
    assert not canary.exists()
    Image.new("RGB", (9, 9)).save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"b\.png: not an image"):
        open_image(tmp_path / "b.png")
