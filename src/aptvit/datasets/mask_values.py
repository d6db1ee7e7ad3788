"""Numbers of classes in mask files: of any integer type, with a palette, or as colours of a table."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Cityscapes
from torchvision.models.segmentation import FCN_ResNet50_Weights

from aptvit.files.images import ImageError, opened
from aptvit.files.text import printable, read_lines, read_text

__all__ = [
    "COLOURS",
    "MAX_MASK_PIXELS",
    "NO_CLASS",
    "ColourTable",
    "cityscapes_numbers",
    "colour_table",
    "find_table",
    "read_numbers",
]

NO_CLASS = -1
"""Stands for pixels without a class, while masks are read."""

COLOURS = ("voc", "cityscapes", "ade20k")
"""Names of colour tables."""

MAX_MASK_PIXELS = 50_000_000
"""Largest mask that is read, in pixels: each takes 8 bytes, and several copies."""

_TABLE_FILES = ("class_dict.csv", "labelmap.txt")


@dataclass(frozen=True)
class ColourTable:
    """Classes of colours.

    Attributes:
        names: Names of the classes.
        numbers: Number of the class of each colour (r, g, b); `NO_CLASS` for none.
        source: Where the table is from, for messages.
    """

    names: Sequence[str]
    numbers: Mapping[tuple[int, int, int], int]
    source: str

    def decode(self, colours: np.ndarray, path: Path) -> np.ndarray:
        """Look up colours.

        Args:
            colours: (H, W, 3) uint8.
            path: The file, for messages.

        Returns:
            (H, W) int64 numbers of classes, `NO_CLASS` for pixels without a class.

        Raises:
            ImageError: If a colour is not in the table.
        """
        codes = _codes(colours)
        by_code = {(r << 16) | (g << 8) | b: number for (r, g, b), number in self.numbers.items()}
        keys = np.array(sorted(by_code))
        place = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
        unknown = keys[place] != codes
        if unknown.any():
            code = int(codes[unknown][0])
            colour = (code >> 16, code >> 8 & 255, code & 255)
            raise ImageError(f"{printable(path)}: the colour {colour} is not in {self.source}")
        return np.array([by_code[key] for key in keys])[place]


def _codes(colours: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W) int64, red first."""
    wide: np.ndarray = colours.astype(np.int64)
    codes: np.ndarray = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
    return codes


def read_numbers(path: Path, table: ColourTable | str | None = None) -> np.ndarray:
    """Read the numbers in a mask file.

    Args:
        path: The file.
        table: Colours of classes; ``"ade20k"`` for the coding of the full ADE20K, a tenth of red times 256, plus green;
            None if the file holds numbers: integers, or floats without fractions, or equal values in all channels.

    Returns:
        (H, W) int64.

    Raises:
        ImageError: If the file cannot be read, was compressed with loss, or holds colours and there is no table.
    """
    try:
        with opened(path, MAX_MASK_PIXELS) as image:
            if image.format == "JPEG":
                raise ImageError(
                    f"{printable(path)}: JPEG changes the values of pixels, so classes are lost: save masks as PNG"
                )
            if table is None and image.mode[0] not in "R":
                return _integers(image, path)
            colours = _colours(image, path)
        if table == "ade20k":
            return colours[..., 0].astype(np.int64) // 10 * 256 + colours[..., 1]
        if isinstance(table, ColourTable):
            return table.decode(colours, path)
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"{printable(path)}: {error.strerror or ' '.join(str(error).split())}") from None
    except Exception as error:  # decoders meet damaged data with nearly any exception
        raise ImageError(f"{printable(path)}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if (colours == colours[..., :1]).all():
        return colours[..., 0].astype(np.int64)
    raise ImageError(
        f"{printable(path)}: a mask holds numbers of classes, this one has colours; name their table with --colours "
        f"({', '.join(COLOURS)}, or a CSV file with the columns name, r, g, b)"
    )


def _integers(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode in ("LA", "PA", "La"):
        _check_opaque(image, path)
        image = image.convert("L") if image.mode != "PA" else image.getchannel(0)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise ImageError(f"{printable(path)}: a mask holds numbers of classes, this one has colours ({image.mode})")
    values = np.asarray(image)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise ImageError(f"{printable(path)}: a mask holds whole numbers of classes, this one has fractions")
    return values.astype(np.int64)


def _colours(image: Image.Image, path: Path) -> np.ndarray:
    """(H, W, 3) uint8 colours of an image in colours or with a palette."""
    if image.mode in ("RGBA", "PA", "LA"):
        _check_opaque(image, path)
    return np.asarray(image.convert("RGB"))


def _check_opaque(image: Image.Image, path: Path) -> None:
    if image.getchannel("A").getextrema()[0] != 255:
        raise ImageError(f"{printable(path)}: the mask has transparent pixels, whose class cannot be told")


def colour_table(name: str) -> ColourTable | str:
    """Load a colour table.

    Args:
        name: ``"voc"``, ``"cityscapes"``, ``"ade20k"``, or a file: CSV with the columns name, r, g, b, or the
            ``labelmap.txt`` of CVAT.

    Returns:
        The table, or ``"ade20k"`` for its coding.

    Raises:
        ValueError: If there is no such table, or the file is no table.
    """
    if name == "ade20k":
        return name
    if name == "voc":
        numbers = {_voc_colour(number): number for number in range(21)}
        names = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
        return ColourTable(names, {**numbers, (224, 224, 192): NO_CLASS}, "the colours of Pascal VOC")
    if name == "cityscapes":
        names, by_id = cityscapes_numbers()
        numbers = {kind.color: by_id[kind.id] for kind in sorted(Cityscapes.classes, key=lambda kind: by_id[kind.id])}
        return ColourTable(names, numbers, "the colours of Cityscapes")
    if not Path(name).is_file():
        raise ValueError(f"there is no colour table {name}: use {', '.join(COLOURS)}, or a CSV file with name, r, g, b")
    return _read_table(Path(name))


def _voc_colour(number: int) -> tuple[int, int, int]:
    """Colour of a class in the masks of Pascal VOC: the bits of its number, spread over the channels from the top."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    return channels[0], channels[1], channels[2]


def find_table(folder: Path) -> ColourTable | None:
    """Load the colour table that lies in a folder, if there is one.

    Raises:
        ValueError: If it is no table.
    """
    files = [folder / name for name in _TABLE_FILES if (folder / name).is_file()]
    return _read_table(files[0]) if files else None


def _read_table(path: Path) -> ColourTable:
    rows: list[tuple[str, list[str]]] = []
    try:
        if path.suffix.lower() == ".csv":
            for row in csv.DictReader(read_text(path).splitlines()):
                values = {str(key).strip().lower(): str(value).strip() for key, value in row.items()}
                rows.append((values.get("name", ""), [values.get(channel, "") for channel in "rgb"]))
        else:
            for line in read_lines(path):
                if not line.startswith("#"):
                    name, colour = [*line.split(":"), ""][:2]
                    rows.append((name, colour.split(",")))
        colours = [tuple(int(value) for value in values) for _, values in rows]
        if not rows or not all(name for name, _ in rows) or not all(_is_colour(colour) for colour in colours):
            raise ValueError
    except (ValueError, csv.Error):
        raise ValueError(f"{printable(path)} is no table of colours: give a name and r, g, b in each line") from None
    numbers = {(colour[0], colour[1], colour[2]): number for number, colour in enumerate(colours)}
    if len(numbers) != len(rows):
        raise ValueError(f"{printable(path)} has the same colour for two classes")
    return ColourTable([name for name, _ in rows], numbers, printable(path.name))


def _is_colour(values: tuple[int, ...]) -> bool:
    return len(values) == 3 and min(values) >= 0 and max(values) <= 255


def cityscapes_numbers() -> tuple[list[str], dict[int, int]]:
    """Names of the 19 classes of Cityscapes, and the number of the class of each id in its ``labelIds`` masks."""
    kinds = sorted((kind for kind in Cityscapes.classes if 0 <= kind.train_id < 255), key=lambda kind: kind.train_id)
    numbers = {kind.id: NO_CLASS for kind in Cityscapes.classes} | {kind.id: kind.train_id for kind in kinds}
    return [kind.name for kind in kinds], numbers
