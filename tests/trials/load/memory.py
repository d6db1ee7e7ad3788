"""Memory of processes over time."""

from __future__ import annotations

from pathlib import Path
from statistics import median

__all__ = ["Memory"]

PAGE = 4096  # bytes


class Memory:
    """Samples of the memory of a process with its children, in bytes.

    Args:
        process: Its number.
    """

    def __init__(self, process: int) -> None:
        self.process = process
        self.samples: list[int] = []

    def sample(self) -> int:
        """Take a sample; what is shared between processes counts in each."""
        total, numbers = 0, [self.process]
        while numbers:
            number = numbers.pop()
            try:
                total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * PAGE
                for task in Path(f"/proc/{number}/task").iterdir():
                    numbers += map(int, (task / "children").read_text().split())
            except OSError:  # it ended meanwhile
                continue
        self.samples.append(total)
        return total

    def growth(self, start: float) -> float:
        """Mean of the last tenth of the samples over that of a tenth from a share of them on, minus 1.

        Samples at the end, while the process gives its memory back, do not count.
        """
        usual = median(self.samples)
        end = max(i for i, sample in enumerate(self.samples) if sample >= usual / 2) + 1
        samples = self.samples[:end]
        count = max(len(samples) // 10, 1)
        first = int(start * len(samples))
        early, late = samples[first : first + count], samples[-count:]
        return (sum(late) / len(late)) / (sum(early) / len(early)) - 1
