"""CUDA graphs of the blocks: one launch for all of them, where launching kernels takes longer than running them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["BlockGraphs"]

Outputs = list[list[Tensor]]
Run = Callable[[], Outputs]
Recorder = Callable[[Run], tuple[Callable[[], None], Outputs]]


def record_cuda_graph(run: Run) -> tuple[Callable[[], None], Outputs]:
    """Record a CUDA graph of what ``run`` does.

    Returns:
        What does it again, on whatever the inputs' memory holds then, and the outputs, whose memory it fills.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose kernels and take workspaces at first use, which no graph may contain
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


class BlockGraphs:
    """Runs a function of tensors through one graph for each key.

    Args:
        capacity: Graphs to keep; the one that was not used for longest makes room.
        record: How a graph is recorded.
        device_type: Where it runs.
    """

    def __init__(self, capacity: int = 16, record: Recorder = record_cuda_graph, device_type: str = "cuda") -> None:
        self.capacity = capacity
        self.device_type = device_type
        self._record = record
        self._graphs: dict[Hashable, tuple[list[Tensor], Callable[[], None], Outputs]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, key: Hashable, run: Callable[..., Outputs], inputs: Sequence[Tensor]) -> Outputs:
        """``run(*inputs)``.

        Args:
            key: What the graph depends on besides the shapes and types of the inputs.
            run: Reads tensors only, nothing of them on the host.
            inputs: Its arguments.
        """
        key = (key, *((tuple(t.shape), t.dtype, t.device) for t in inputs))
        kept = self._graphs.pop(key, None)
        if kept is None:
            while len(self._graphs) >= self.capacity:
                del self._graphs[next(iter(self._graphs))]
            static = [t.clone() for t in inputs]
            kept = (static, *self._record(lambda: run(*static)))
        self._graphs[key] = kept
        static, replay, outputs = kept
        for place, value in zip(static, inputs, strict=True):
            place.copy_(value)
        replay()
        return [[one.clone() for one in its] for its in outputs]  # the next replay fills the same memory

    def clear(self) -> None:
        """Forget all graphs: the memory that they read may have moved."""
        self._graphs.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> BlockGraphs:
        return BlockGraphs(self.capacity, self._record, self.device_type)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_graphs": {}}
