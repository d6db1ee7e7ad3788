"""benchmarks/data.py, with a server on this machine: digests, broken downloads, local folders."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "data.py"


@pytest.fixture(scope="module")
def data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Server(http.server.ThreadingHTTPServer):
    """Serves one archive at any path; breaks off where it is told to."""

    archive = b""
    break_at: int | None = None
    knows_ranges = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.knows_ranges else 0
        body = self.server.archive[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.break_at])
        self.server.break_at = None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(data, "ARCHIVES", f"http://127.0.0.1:{server.server_address[1]}")
        server.archive = archive({"BCCD/a.txt": b"some words", "LICENSE": b"MIT" * 4000})
        yield server
        server.shutdown()
        thread.join()


def archive(files: dict[str, bytes]) -> bytes:
    """As GitHub packs a repository: all files in one folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(f"name-commit/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def build(source: Path, made: Path) -> None:
    """Of the archive's two files the one, at another place."""
    (made / "images").mkdir()
    (made / "images" / "b.txt").write_bytes((source / "BCCD" / "a.txt").read_bytes())


@pytest.fixture
def entry(data: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "expected" / "images").mkdir(parents=True)
    (tmp_path / "expected" / "images" / "b.txt").write_text("some words")
    line = f"{hashlib.sha256(b'some words').hexdigest()}  images/b.txt\n"  # as sha256sum prints it
    digest = hashlib.sha256(line.encode()).hexdigest()
    return data.Entry("words", "words", "owner/name", "commit", "MIT", "as published", digest, build)


def test_fetch(data: ModuleType, server: Server, entry: Any, tmp_path: Path) -> None:
    folder = data.fetch(entry, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["words"]  # nothing else is left
    assert (folder / "images" / "b.txt").read_text() == "some words"
    assert data.fetch(entry, tmp_path / "data") == folder
    assert server.ranges == [None]  # what is there is not fetched again


def test_another_digest_is_refused(data: ModuleType, server: Server, entry: Any, tmp_path: Path) -> None:
    server.archive = archive({"BCCD/a.txt": b"other words"})
    with pytest.raises(ValueError, match=rf"owner/name/tar.gz/commit gave is refused: .*not {entry.digest}"):
        data.fetch(entry, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("files", ({"LICENSE": b""}, {"../../out.txt": b"x", "BCCD/a.txt": b"some words"}))
def test_another_archive_is_refused(
    data: ModuleType, server: Server, entry: Any, tmp_path: Path, files: dict[str, bytes]
) -> None:
    server.archive = archive(files)
    with pytest.raises(ValueError, match="is refused"):
        data.fetch(entry, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir()) and not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("knows_ranges", (True, False))
def test_a_broken_download_continues(
    data: ModuleType, server: Server, entry: Any, tmp_path: Path, knows_ranges: bool
) -> None:
    server.break_at, server.knows_ranges = 100, knows_ranges
    with pytest.raises(OSError, match=f"broke off after 100 of {len(server.archive)} bytes"):
        data.fetch(entry, tmp_path / "data")
    part = tmp_path / "data" / "words.tar.gz.part"
    assert part.read_bytes() == server.archive[:100]
    assert (data.fetch(entry, tmp_path / "data") / "images" / "b.txt").is_file()
    assert server.ranges == [None, "bytes=100-"]


def test_a_download_that_is_complete_but_not_renamed(
    data: ModuleType, server: Server, entry: Any, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.tar.gz.part").write_bytes(server.archive)
    assert data.fetch(entry, tmp_path / "data").is_dir()


def test_local_folder(data: ModuleType, entry: Any, tmp_path: Path) -> None:
    folder = tmp_path / "expected"
    data.check(folder, entry)
    (folder / "images" / "c.txt").write_text("")
    with pytest.raises(ValueError, match=f"is not the words of the results: its digest is .* not {entry.digest}"):
        data.check(folder, entry)
    data.check(folder, replace(entry, files="images/b.*"))  # others do not count
    (folder / "images" / "c.txt").rename(folder / "images" / "b.txt")
    with pytest.raises(ValueError, match="its digest is"):
        data.check(folder, entry)
    with pytest.raises(ValueError, match="is no folder"):
        data.check(tmp_path / "nothing", entry)


def test_what_cannot_be_made_again_says_so(data: ModuleType, entry: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"https://github\.com/owner/name/tree/commit"):
        data.fetch(replace(entry, build=None), tmp_path)


def test_a_local_copy_is_taken(data: ModuleType, server: Server, entry: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "expected").rename(tmp_path / "data" / "words")
    assert data.fetch(entry, tmp_path / "data") == tmp_path / "data" / "words"
    assert not server.ranges


def test_classes_are_in_the_order_of_wordnet(data: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir(), (tmp_path / "made").mkdir()
    for name in ("n03_cat", "n01_sea_lion", "n02_dog", "n04_cup"):
        (tmp_path / "source" / f"{name}.JPEG").write_text(name)
    data.ENTRIES["imagenet_sample_test"].build(tmp_path / "source", tmp_path / "made")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["labels.csv", "n02_dog.jpg", "n04_cup.jpg"]
    rows = (tmp_path / "made" / "labels.csv").read_text().split()
    assert rows == ["file,class_index,wnid,name", "n02_dog.jpg,1,n02,dog", "n04_cup.jpg,3,n04,cup"]


def test_commands(tmp_path: Path, data: ModuleType) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)

    listed = run("list")
    assert listed.returncode == 0
    for entry in data.ENTRIES.values():
        assert entry.page in listed.stdout and entry.digest in listed.stdout and entry.licence in listed.stdout
    refused = run("check", tmp_path, "bccd")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"{tmp_path} is not the bccd of the results" in refused.stderr


@pytest.mark.parametrize("name", ("vit_tiny", "imagenet_sample", "imagenet_sample_test", "camvid", "bccd"))
def test_a_copy_on_this_machine_is_what_the_results_used(data: ModuleType, name: str) -> None:
    if not (data.FOLDER / name).is_dir():
        pytest.skip(f"no {name} in {data.FOLDER} (APTVIT_DATA)")
    data.check(data.FOLDER / name, data.ENTRIES[name])
