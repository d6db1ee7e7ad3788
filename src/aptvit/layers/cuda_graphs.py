"""CUDA graphs of the blocks: one launch for all blocks, for small batches that are bound by kernel launches."""

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
    """Record a CUDA graph of a function.

    Args:
        run: The function; its inputs and outputs are tensors at fixed addresses.

    Returns:
        A function that replays the graph on the current contents of the inputs' memory, and the outputs, whose memory
        each replay overwrites.
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
    """A cache of graphs of functions of tensors; one thread at a time.

    Args:
        capacity: Most graphs to keep; the least recently used graph is dropped.
        record: Records a graph, as `record_cuda_graph`.
        device_type: Type of the devices that graphs run on.
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
        """The result of ``run(*inputs)``, by a graph.

        Args:
            key: Everything that the graph depends on besides shapes, types and devices of the inputs.
            run: A function that does not read values of tensors on the host.
            inputs: Arguments of ``run``: tensors, or containers of tensors (a pytree). Values that are not tensors
                are recorded with the graph.

        Returns:
            The result, a pytree of tensors that later calls do not overwrite.
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
        """Drop all graphs, for when the parameters that they read were moved or replaced."""
        with self._lock:
            self._graphs.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> BlockGraphs:
        return type(self)(self.capacity, self._record, self.device_type)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity, self._record, self.device_type)
