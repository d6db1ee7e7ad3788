"""Distributed training on accelerate and FSDP2: distribute a model over processes, and gather its state."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from aptvit.measuring.machine import computes_in_bfloat16
from aptvit.storage.locking import lock
from aptvit.training.recipes.common import Precision, Recipe

__all__ = ["PRECISIONS", "ProcessLost", "Processes"]

T = TypeVar("T")

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""accelerate's names of the types to compute in."""

_CONNECTION = re.compile(r"gloo|nccl|connection|socket|broken pipe|peer", re.IGNORECASE)

_SCORERS_WITH_WEIGHTS = ("embedding", "glance", "harm", "spread", "preview")


def precision_on(device: str, precision: Precision) -> Precision:
    """Return the type to compute in: that of a recipe, or by the hardware where it is ``"auto"``.

    Args:
        device: Type of the device.
        precision: Setting of the recipe.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if computes_in_bfloat16(device) else "float32"


class ProcessLost(ConnectionError):
    """Another process of the training, or a worker of this process, ended or cannot be reached."""


class Processes:
    """This process of a training, and its communication with the others.

    torchrun or ``accelerate launch`` start several processes; otherwise there is one.

    Args:
        recipe: Precision, and whether parameters are sharded.

    Attributes:
        accelerator: accelerate's Accelerator.
        rank: Number of this process.
        world: Number of processes.
        precision: Floating-point type to compute in.
        device: Device of this process.
        shard: Whether parameters are sharded.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If the recipe has settings that several processes or sharding do not support.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState, PartialState
            from accelerate.utils import DistributedType
        except ImportError:
            raise ImportError("training needs accelerate: pip install 'aptvit[train]'") from None
        AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
        # accelerate does not connect processes on CPUs by default.
        many_cpus = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
        self.precision = precision_on(PartialState(many_cpus).device.type, recipe.precision)
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[self.precision], cpu=many_cpus)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        sharded = recipe.shard or self.accelerator.distributed_type == DistributedType.FSDP
        self.shard = sharded and self.world > 1
        if recipe.batch_size < self.world:
            raise ValueError(
                f"batch_size={recipe.batch_size} is below the number of processes: set at least {self.world}"
            )
        if self.shard and recipe.ema:
            raise ValueError("sharded parameters cannot be averaged: set ema=0, or shard=false")
        if self.shard and recipe.method != "uniform" and recipe.scorer in _SCORERS_WITH_WEIGHTS:
            raise ValueError(f"scorer={recipe.scorer} needs whole weights: set shard=false, or scorer=entropy")

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def workers(self, number: int) -> int:
        """Return how many processes read images for this one.

        Args:
            number: Setting of the recipe; -1 for the CPUs that this process may use, over the processes of the machine,
                up to 16; a quarter of them if it trains on CPUs, too.
        """
        if number >= 0:
            return number
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(share // 4 if self.device.type == "cpu" else share, 16)

    def distribute(self, learner: nn.Module, model: Any) -> nn.Module:
        """Move a learner to the device, and copy it to all processes (DDP) or shard it block by block (FSDP2).

        Args:
            learner: The module whose forward pass is run.
            model: The model inside, with ``blocks``.

        Returns:
            The module to run instead of the learner.
        """
        learner.to(self.device)
        if self.world == 1:
            return learner
        if not self.shard:
            prepared: nn.Module = self.accelerator.prepare_model(learner)
            return prepared
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for parameter in learner.parameters():  # FSDP2 does not support other strides, such as channels last
            parameter.data = parameter.data.contiguous()
        self.broadcast(learner)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(learner, mesh=mesh)
        return learner

    def broadcast(self, module: nn.Module) -> None:
        """Copy parameters and buffers of the first process to all others, in place."""
        if self.world > 1:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    torch.distributed.broadcast(tensor.data, 0)

    def broadcast_value(self, value: Any) -> Any:
        """Return the value of the first process on all processes."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, and return it."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """Return the smallest value of all processes."""
        if self.world == 1:
            return value
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return int(min(values))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which the errors after a process ended become one.

        Raises:
            ProcessLost: If another process, or a worker that reads images, ended.
        """
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise ProcessLost(
                    "a worker that reads images was killed, as happens for too little memory: continue with --resume, "
                    "and fewer workers by --set workers=N"
                ) from error
            is_lost = isinstance(error, torch.distributed.DistError) or _CONNECTION.search(str(error))
            if self.world == 1 or not is_lost:
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = re.sub(r"^\[[^]]*\]\s*", "", first).partition(". ")[0][:200]  # without a place in C++
            raise ProcessLost(
                f"another process of the training ended ({reason}): start all of them again with --resume"
            ) from error

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Run an action on the first process, while the others wait.

        Args:
            action: The action.

        Returns:
            What it returns on the first process, None on the others.

        Raises:
            Exception: What it raises, on the first process.
            SystemExit: On the others, if it raises.
        """
        result, error = None, None
        if self.is_first:
            try:
                result = action()
            except Exception as caught:
                error = caught
        if self.broadcast_value(error is not None):
            raise SystemExit(1) if error is None else error
        return result

    def only_writers(self, folder: Path) -> AbstractContextManager[Any]:
        """A context in which no other training writes to a folder.

        Raises:
            ValueError: If another does.
        """
        return self.on_first(lambda: lock(folder)) or nullcontext()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.accelerator.wait_for_everyone()

    def without_sync(self, learner: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Context for a part of an update: gradients are summed over processes only after the last part.

        Args:
            learner: The module that `distribute` returned.
            is_last: Whether this is the last part.
        """
        if self.world == 1:
            return nullcontext()
        if self.shard:
            learner.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(learner)

    # State. All processes must call these methods at the same time.

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of a model with whole tensors on the CPU; only the first process gets their values."""
        if not self.shard:
            return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        whole = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            whole[name] = full.detach().cpu() if self.is_first else torch.empty(0)
        return whole

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Load a state dict from `weights`; all processes need the whole tensors."""
        if not self.shard:
            model.load_state_dict(weights)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                value = weights[name].to(self.device)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
                tensor.copy_(value)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state dict of an optimizer with whole tensors on the CPU."""
        return _gathered(optimizer.state_dict(), lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a state dict from `optimizer_state`."""
        if self.shard:
            from torch.distributed.tensor import distribute_tensor

            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, values in state["state"].items():
                parameter: Any = parameters[number]
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                        local = value.to(self.device)
                        values[name] = distribute_tensor(local, parameter.device_mesh, parameter.placements)
        optimizer.load_state_dict(state)

    def random_states(self) -> list[dict[str, Any]]:
        """Return the states of the random generators of each process, as numbers and tensors."""
        kind, keys, *position = np.random.get_state()
        state = {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        if self.world == 1:
            return [state]
        states: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(states, state)
        return states

    def load_random_states(self, states: list[dict[str, Any]]) -> bool:
        """Load the states of `random_states`.

        Returns:
            Whether they were loaded; False if the number of processes has changed.
        """
        if len(states) != self.world:
            return False
        state = states[self.rank]
        version, inner, gauss = state["python"]
        random.setstate((version, tuple(inner), gauss))
        kind, keys, *position = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])
        return True


def _gathered(value: Any, gather: Any) -> Any:
    """A copy of a nested value whose tensors are whole and on the CPU."""
    if isinstance(value, Tensor):
        return gather(value).detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _gathered(part, gather) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_gathered(part, gather) for part in value)
    return value
