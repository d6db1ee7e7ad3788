"""How often the workers of a cluster began a part: one that kills them again and again is given up."""

from __future__ import annotations

from dataclasses import dataclass

import fsspec

__all__ = ["MOST", "Attempts"]

MOST = 6  # times that a step of a part is begun


@dataclass(frozen=True)
class Attempts:
    """Counts beginnings in empty files beside the parts, which are there also when a worker was killed.

    A cluster runs a step again without end: when a node is lost, which is no fault of the part, and also when the part
    takes more memory than there is.

    Attributes:
        out: Folder of the parts, a path or a URL that fsspec writes.
    """

    out: str

    def begin(self, number: int, step: str) -> bool:
        """Count that a step of a part begins.

        Args:
            number: Number of the part.
            step: Name of the step.

        Returns:
            Whether it may: it has begun less than `MOST` times without an end.
        """
        fs, root = fsspec.core.url_to_fs(self.out)
        fs.invalidate_cache()
        for path in self._paths(root, number, step):
            if not fs.exists(path):
                fs.touch(path)
                return True
        return False

    def end(self, number: int, step: str) -> None:
        """Forget how often a step began, for it has ended.

        Args:
            number: Number of the part.
            step: Name of the step.
        """
        fs, root = fsspec.core.url_to_fs(self.out)
        for path in self._paths(root, number, step):
            if not fs.exists(path):
                return
            fs.rm(path)

    def _paths(self, root: str, number: int, step: str) -> list[str]:
        # `Job.tidy` removes names that begin so.
        return [f"{root}/.part-{number:06d}.{step}-{attempt}" for attempt in range(MOST)]
