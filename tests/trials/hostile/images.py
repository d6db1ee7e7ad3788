"""Hostile images: damaged, of other types, with headers that promise too much, and things that are no files."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .case import Case, Payload

__all__ = ["FORMATS", "encode", "images", "names_and_places"]

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "jp2": "JPEG2000",
    "tga": "TGA",
    "ppm": "PPM",
}


def pixels(seed: int, width: int = 60, height: int = 44) -> np.ndarray:
    """(H, W, 3) uint8, smooth and busy."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 100 + 20 * (seed % 5), np.uint8)
    image[:, : width // 2] = rng.integers(0, 256, (height, width // 2, 3))
    return image


def encode(suffix: str, seed: int = 0) -> bytes:
    """A good image as the content of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, FORMATS[suffix])
    return buffer.getvalue()


def of(name: str, suffix: str, content: bytes | Callable[[], bytes], must_tell: bool = True) -> Case:
    """A hostile image of this content."""

    def make(path: Path, payload: Payload) -> None:
        path.write_bytes(content if isinstance(content, bytes) else content())

    return Case(f"{suffix} {name}", "image", f"hostile.{suffix}", make, must_tell)


def images(seed: int) -> Iterator[Case]:
    """All hostile images."""
    yield from _damaged(random.Random(seed))
    yield from _of_other_types()
    yield from _huge()
    yield from _odd()
    yield from names_and_places()


def _damaged(rng: random.Random) -> Iterator[Case]:
    for suffix in FORMATS:
        good = encode(suffix)
        yield of("empty", suffix, b"")
        yield of("cut in the header", suffix, good[:9])
        yield of("cut in half", suffix, good[: len(good) // 2], must_tell=suffix not in ("gif", "jp2"))
        yield of("cut near the end", suffix, good[:-3], must_tell=False)
        for number in range(3):
            flipped = bytearray(good)
            for _ in range(rng.choice((1, 8, 64))):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            yield of(f"bytes changed, {number}", suffix, bytes(flipped), must_tell=False)
        yield of("noise after the header", suffix, good[:24] + rng.randbytes(500), must_tell=False)
    for suffix in ("jpg", "avif", "heic"):
        yield of("noise", suffix, rng.randbytes(2000))


_POSTSCRIPT = (
    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(CANARY) (w) file closefile\nshowpage\n"
)


def _of_other_types() -> Iterator[Case]:
    texts = {
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "pdf": b"%PDF-1.7\n1 0 obj << /OpenAction << /S /Launch /F (touch) >> >> endobj\n",
        "zip": b"PK\x03\x04" + bytes(60),
        "elf": b"\x7fELF" + bytes(60),
        "zeros": bytes(4096),
        "pickle": b"cos\nsystem\n(S'true'\ntR.",
    }
    for name, content in texts.items():
        yield of(f"that is {name}", "png", content)

    def postscript(path: Path, payload: Payload) -> None:
        path.write_text(_POSTSCRIPT.replace("CANARY", str(payload.canary)))

    yield Case("jpg that is PostScript", "image", "hostile.jpg", postscript)
    yield Case("PostScript", "image", "hostile.eps.png", postscript)
    for kind in ("ICO", "PCX", "SGI", "DDS", "IM", "MSP", "SPIDER", "XBM"):
        buffer = io.BytesIO()
        mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
        Image.fromarray(pixels(1)).convert(mode).save(buffer, kind)
        yield of(f"that is {kind}", "png", buffer.getvalue(), must_tell=False)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, data: bytes, bits: int = 1, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG file of a header, further chunks and compressed pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def zeros(number: int) -> bytes:
    """Many zeros, compressed."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(min(1 << 20, number - start))) for start in range(0, number, 1 << 20)]
    return b"".join((*parts, packer.flush()))


def flat_png(width: int, height: int, bits: int = 1, colour: int = 0) -> bytes:
    """A PNG file that is black, whole and small."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    return png_of(width, height, zeros(height * (1 + (width * bits * channels + 7) // 8)), bits, colour)


def _huge() -> Iterator[Case]:
    most = 2**31 - 1
    yield of("of 65535 x 65535 in its header", "png", png_of(65535, 65535, zeros(100), 8, 2))
    yield of("of 2^31 x 2^31 in its header", "png", png_of(most, most, zeros(100), 8, 2))
    yield of("of 2^32 x 1 in its header", "png", png_of(2**32 - 1, 1, zeros(100), 8, 2))
    yield of("of 0 x 5", "png", png_of(0, 5, zeros(5), 8, 0))
    yield of("that is a bomb of 20000 x 20000", "png", lambda: flat_png(20000, 20000))
    yield of("of 14000 x 14000", "png", lambda: flat_png(14000, 14000), must_tell=False)
    yield of("of 9000 x 9000 in 16 bits", "png", lambda: flat_png(9000, 9000, 16), must_tell=False)
    yield of("of 7000 x 7000 with transparency", "png", lambda: flat_png(7000, 7000, 8, 6), must_tell=False)
    yield of("of 1 x 200000", "png", lambda: flat_png(1, 200000, 8, 0), must_tell=False)
    yield of("of 200000 x 1", "png", lambda: flat_png(200000, 1, 8, 2), must_tell=False)
    yield of("of 1 x 1", "png", lambda: flat_png(1, 1, 8, 2), must_tell=False)
    profile = png_chunk(b"iCCP", b"x\0\0" + zeros(500_000_000))
    text = png_chunk(b"zTXt", b"x\0\0" + zeros(500_000_000))
    yield of("with a colour profile that is a bomb", "png", lambda: png_of(8, 8, zeros(200), 8, 2, profile), False)
    yield of("with a text that is a bomb", "png", lambda: png_of(8, 8, zeros(200), 8, 2, text), must_tell=False)
    yield of("with a chunk of 2^31 bytes", "png", encode("png")[:8] + struct.pack(">I", most) + b"IHDR" + bytes(40))
    bmp = bytearray(encode("bmp"))
    for name, width, height in (("huge", most, most), ("of negative width", -60, 44), ("of -2^31 rows", 60, -(2**31))):
        struct.pack_into("<ii", bmp, 18, width, height)
        yield of(name, "bmp", bytes(bmp), must_tell=name != "of negative width")
    for number, size in enumerate(((65535, 65535), (60, 65535), (0, 0))):
        gif = bytearray(encode("gif"))
        struct.pack_into("<HH", gif, 6, *size)
        yield of(f"of another size in its header, {number}", "gif", bytes(gif), must_tell=False)
    jpeg = bytearray(encode("jpg"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65535, 65535)
    yield of("of 65535 x 65535 in its header", "jpg", bytes(jpeg))
    tga = bytearray(encode("tga"))
    struct.pack_into("<HH", tga, 12, 65535, 65535)
    yield of("of 65535 x 65535 in its header", "tga", bytes(tga))
    for words in ("1000000000 1000000000 255", "-5 -5 255", "5 5 0", "5 5 99999999999", "9" * 5000 + " 1 255"):
        yield of(f"P6 {words[:26]}", "ppm", f"P6 {words}\n".encode() + bytes(75))
    for words in ("nan", "0", "-inf", "1e999"):
        yield of(f"PF with the scale {words}", "ppm", f"PF 4 4 {words}\n".encode() + b"\x00\x00\xc0\x7f" * 48, False)


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    """A TIFF file of one directory: tag, type, count and value of each entry."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", following) + bytes(4096)


def _odd() -> Iterator[Case]:
    plain = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    plain += [(277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]
    yield of("whose directory follows itself", "tif", tiff(plain, following=8), must_tell=False)
    yield of("with 2^32 values in a tag", "tif", tiff([*plain, (700, 1, 2**32 - 1, 0)]), must_tell=False)
    huge = [(256, 4, 1, 2**31 - 1), (257, 4, 1, 2**31 - 1), *plain[2:]]
    yield of("of 2^31 x 2^31", "tif", tiff(huge))
    yield of("with strips of 2^32 bytes", "tif", tiff([*plain[:-1], (279, 4, 1, 2**32 - 1)]), must_tell=False)
    yield of("of no size", "tif", tiff([(256, 3, 1, 0), (257, 3, 1, 0), *plain[2:]]))
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("the largest", np.finfo(np.float32).max)):

        def floats(value: float = value) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(np.full((40, 40), value, np.float32)).save(buffer, "TIFF")
            return buffer.getvalue()

        yield of(f"of {name} alone", "tif", floats, must_tell=False)

    def integers() -> bytes:
        buffer = io.BytesIO()
        values = np.array([-(2**31), 2**31 - 1] * 800, np.int32).reshape(40, 40)
        Image.fromarray(values).save(buffer, "TIFF")
        return buffer.getvalue()

    yield of("of the least and the greatest integers", "tif", integers, must_tell=False)
    for orientation in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        Image.fromarray(pixels(2)).save(buffer, "JPEG", exif=exif)
        yield of(f"with the orientation {orientation}", "jpg", buffer.getvalue(), must_tell=False)
    exif_cycle = b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 0x8769, 4, 1, 8)
    jpeg = encode("jpg")
    segment = b"\xff\xe1" + struct.pack(">H", len(exif_cycle) + 2) + exif_cycle
    yield of("whose EXIF data are a cycle", "jpg", jpeg[:2] + segment + jpeg[2:], must_tell=False)
    yield of("with a thousand comments", "jpg", jpeg[:2] + b"\xff\xfe\x00\x10cccccccccccccc" * 1000 + jpeg[2:], False)

    def animation() -> bytes:
        buffer = io.BytesIO()
        frames = [Image.new("P", (8, 8), i % 256) for i in range(3000)]
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
        return buffer.getvalue()

    yield of("of 3000 frames", "gif", animation, must_tell=False)


def names_and_places(content: bytes | None = None, kind: str = "image", suffix: str = "png") -> Iterator[Case]:
    """Things that are no regular files, and files of strange names.

    Args:
        content: Content of the files of strange names; by default a good image.
        kind: Kind of the cases.
        suffix: Ending of their names.
    """
    good = encode("png") if content is None else content

    def link(target: str) -> Callable[[Path, Payload], Any]:
        return lambda path, payload: path.symlink_to(target)

    def unix_socket(path: Path, payload: Payload) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # such names are short
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)

    def sparse(path: Path, payload: Payload) -> None:
        path.touch()
        os.truncate(path, 50_000_000_000)

    things: dict[str, Callable[[Path, Payload], Any]] = {
        "pipe": lambda path, payload: os.mkfifo(path),
        "socket": unix_socket,
        "link to zeros without end": link("/dev/zero"),
        "link to noise without end": link("/dev/urandom"),
        "link to nothing": link("nothing"),
        "link to itself": link(f"hostile.{suffix}"),
        "link to passwords": link("/etc/passwd"),
        "link to the memory of the process": link("/proc/self/mem"),
        "folder of this name": lambda path, payload: path.mkdir(),
        "file of 50 GB": sparse,
    }
    # Empty folders and links to nothing are no images, and nobody misses them.
    silent = ("folder of this name", "link to nothing", "link to itself")
    for name, make in things.items():
        yield Case(f"{suffix} {name}", kind, f"hostile.{suffix}", make, name not in silent)
    names = ("hostile\n", "hostile\x1b[31m", "hostile\udcff", "hostile $(touch canary) ;", "-hostile", "hostile::x")
    for word in (*names, "hostile" + "x" * 200, "hostile{0}%s", "hostile\u202e", "hostile:"):
        yield Case(
            f"{suffix} named {ascii(word)[:40]}",
            kind,
            f"{word}.{suffix}",
            lambda path, payload: path.write_bytes(good),
            must_tell=False,
        )
