"""Images with a class each, accessed by number: the values that all readers of classes return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from aptvit.datasets.splits import by_name
from aptvit.files.images import find_images, open_image
from aptvit.files.text import printable

__all__ = ["MAX_CLASSES", "UNLABELLED", "Source", "hold_back", "photos", "split_indices", "with_classes"]

MAX_CLASSES = 1_000_000
"""Greatest number of a class: a classifier has weights for each number below it."""

UNLABELLED = -1
"""Class of an image without a label."""


class Source(Protocol):
    """A dataset of images, accessed by number."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; empty if images have no labels."""

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if images have no labels."""

    @property
    def problems(self) -> Sequence[str]:
        """Messages about what was left out."""

    @property
    def origin(self) -> str:
        """Where the images are from."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image for messages."""

    def label(self, index: int) -> int:
        """Class of an image, -1 for none, without reading the image."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Read an upright RGB image and its class, -1 for none.

        Raises:
            ImageError: If the image cannot be read.
        """


class CountsClasses:
    """A source whose number of classes is that of their names."""

    classes: Sequence[str]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if images have no labels."""
        return len(self.classes)


@dataclass(frozen=True)
class Files(CountsClasses):
    """Image files and their classes."""

    paths: Sequence[Path]
    labels: Sequence[int] | None = None
    classes: Sequence[str] = ()
    problems: Sequence[str] = ()
    origin: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return printable(self.paths[index])

    def label(self, index: int) -> int:
        return UNLABELLED if self.labels is None else self.labels[index]

    def load(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.paths[index]), self.label(index)

    def relabelled(self, labels: Sequence[int], classes: Sequence[str]) -> Files:
        return replace(self, labels=labels, classes=classes)


@dataclass(frozen=True)
class Part:
    """A subset of the images of a source."""

    source: Source
    indices: Sequence[int] = field(repr=False)
    origin: str = ""
    problems: Sequence[str] = ()

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.source.label(self.indices[index])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self.source.load(self.indices[index])


class Relabelled(Source, Protocol):
    """A source whose labels can be replaced."""

    def relabelled(self, labels: Sequence[int], classes: Sequence[str]) -> Source:
        """The same images with other labels.

        Args:
            labels: Class of each image.
            classes: Names of the classes.
        """


def with_classes(source: Relabelled, classes: Sequence[str]) -> Source:
    """The images of a source with classes numbered as in another list, by name.

    Args:
        source: The source.
        classes: Names of the classes of the training split.

    Raises:
        ValueError: If an image has a class that is not in the list.
    """
    if list(source.classes) == list(classes):
        return source
    labels = [source.label(index) for index in range(len(source))]
    used = sorted({*labels} - {UNLABELLED})
    numbers = dict(zip(used, by_name([source.classes[label] for label in used], classes, source.origin), strict=True))
    return source.relabelled([numbers.get(label, UNLABELLED) for label in labels], list(classes))


def photos(paths: Sequence[Path | str]) -> Source:
    """A source of images without labels.

    Args:
        paths: Image files, and folders, which are searched recursively.

    Raises:
        ValueError: If a path does not exist, or there are no images.
    """
    return Files(find_images(paths), origin=", ".join(map(str, paths[:3])) + ", ..." * (len(paths) > 3))


def hold_back(source: Source, share: float) -> tuple[Source, Source | None]:
    """Split a source into images to train on and images held back for evaluation.

    Args:
        source: The source.
        share: Share of the images to hold back: every n-th image.

    Returns:
        Training images, and held back images or None.
    """
    training, evaluation = split_indices(len(source), share)
    if not evaluation:
        return source, None
    held_back = Part(source, evaluation, f"{source.origin}, held back")
    return Part(source, training, source.origin, source.problems), held_back


def split_indices(number: int, share: float) -> tuple[list[int], list[int]]:
    """Split the numbers below ``number``: those to train on, and every n-th, which is held back."""
    period = max(2, round(1 / share)) if share > 0 else number + 1
    evaluation = range(period - 1, number, period) if number > 1 else range(0)
    return [i for i in range(number) if i not in evaluation], list(evaluation)
