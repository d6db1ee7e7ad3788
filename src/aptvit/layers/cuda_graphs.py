"""CUDA graphs of the blocks: one launch for all of them, where launching kernels takes longer than running them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_flatten, tree_map, tree_unflatten

from aptvit.layers.attention import AttentionPlan, Segments
from aptvit.patching.layout import Packing

__all__ = ["BlockGraphs"]

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]

for _kind in (Packing, Segments, AttentionPlan):
    register_dataclass(_kind, field_names=list(_kind.__dataclass_fields__))


def record_cuda_graph(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
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
    """Runs a function of tensors through one graph for each key; one thread at a time.

    Args:
        capacity: Graphs to keep; the least recently used makes room.
        record: How a graph is recorded.
        device_type: Where it runs.
    """

    def __init__(self, capacity: int = 16, record: Recorder = record_cuda_graph, device_type: str = "cuda") -> None:
        self.capacity = capacity
        self.device_type = device_type
        self._record = record
        self._graphs: dict[Hashable, tuple[list[Tensor], Callable[[], None], Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, key: Hashable, run: Callable[..., Any], *inputs: Any) -> Any:
        """What ``run(*inputs)`` gives.

        Args:
            key: What the graph depends on besides shapes and types of the inputs.
            run: Reads tensors only, nothing of them on the host.
            inputs: Its arguments: tensors, or containers of them (a pytree). Values that are no tensors are those of
                the call that was recorded.

        Returns:
            Its result, a pytree of tensors of their own memory.
        """
        leaves, structure = tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (key, *((tuple(t.shape), t.dtype, t.device) for t in tensors))
        with self._lock:  # a graph has one set of inputs and outputs
            recorded = self._graphs.pop(key, None)
            if recorded is None:
                while len(self._graphs) >= self.capacity:
                    del self._graphs[next(iter(self._graphs))]
                static = [t.clone() for t in tensors]
                places = iter(static)
                arguments = tree_unflatten([next(places) if isinstance(x, Tensor) else x for x in leaves], structure)
                recorded = (static, *self._record(lambda: run(*arguments)))
            self._graphs[key] = recorded
            static, replay, outputs = recorded
            for place, value in zip(static, tensors, strict=True):
                place.copy_(value)
            replay()
            return tree_map(torch.clone, outputs)  # the next replay fills the same memory

    def clear(self) -> None:
        """Forget all graphs: the memory that they read may have moved."""
        with self._lock:
            self._graphs.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> BlockGraphs:
        return type(self)(self.capacity, self._record, self.device_type)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity, self._record, self.device_type)
