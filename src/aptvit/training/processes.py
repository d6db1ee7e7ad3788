"""One process or many: how a model is spread over them, and how the state is gathered. On accelerate and FSDP2."""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aptvit.training.recipes.common import Recipe

__all__ = ["Processes"]

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


_SCORERS_WITH_WEIGHTS = ("embedding", "glance", "spread", "preview")


class Processes:
    """The processes of a training, seen from one of them; many are started by torchrun or ``accelerate launch``.

    Args:
        recipe: Precision, and whether parameters are sharded.

    Attributes:
        accelerator: accelerate's.
        shard: Whether parameters are sharded.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If the recipe asks for what this many processes, or this device, cannot do.
    """

    def __init__(self, recipe: Recipe) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import DistributedType
        except ImportError:
            raise ImportError("training needs accelerate: pip install 'aptvit[train]'") from None
        AcceleratorState._reset_state()  # an earlier training in this process may have had another precision
        # accelerate does not connect processes on CPUs by default.
        many_cpus = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
        self.accelerator = Accelerator(mixed_precision=_PRECISIONS[recipe.precision], cpu=many_cpus)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        sharded = recipe.shard or self.accelerator.distributed_type == DistributedType.FSDP
        self.shard = sharded and self.world > 1
        if recipe.batch_size < self.world:
            raise ValueError(f"batch_size={recipe.batch_size} is of all {self.world} processes: give at least one each")
        if self.shard and recipe.ema:
            raise ValueError("an average of the weights is not kept of sharded parameters: ema=0, or shard=false")
        if self.shard and recipe.method != "uniform" and recipe.scorer in _SCORERS_WITH_WEIGHTS:
            raise ValueError(f"scorer={recipe.scorer} reads with whole weights: shard=false, or scorer=entropy")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def spread(self, learner: nn.Module, model: Any) -> nn.Module:
        """The learner on all processes: copied (DDP), or sharded block by block (FSDP2)."""
        learner.to(self.device)
        if self.world == 1:
            return learner
        if not self.shard:
            prepared: nn.Module = self.accelerator.prepare_model(learner)
            return prepared
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for parameter in learner.parameters():  # FSDP2 takes no strides such as those of channels last
            parameter.data = parameter.data.contiguous()
        self.same(learner)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(learner, mesh=mesh)
        return learner

    def same(self, module: nn.Module) -> None:
        """Copy parameters and buffers of the first process to all."""
        if self.world > 1:
            with torch.no_grad():
                for tensor in (*module.parameters(), *module.buffers()):
                    torch.distributed.broadcast(tensor.data, 0)

    def same_value(self, value: Any) -> Any:
        """The value that the first process has, on all."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, 0)
        return box[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def without_sync(self, learner: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over processes only after the last part of an update."""
        if self.world == 1:
            return nullcontext()
        if self.shard:
            learner.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if is_last else self.accelerator.no_sync(learner)

    # State. All processes call these together.

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole model, on the CPU of the first process."""
        if not self.shard:
            return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        whole = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            whole[name] = full.detach().cpu() if self.is_first else torch.empty(0)
        return whole

    def load_weights(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """What `weights` gave."""
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
        """The whole state of the optimizer, on the CPU."""
        return _mapped(optimizer.state_dict(), lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t)

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """What `optimizer_state` gave."""
        if self.shard:
            from torch.distributed.tensor import distribute_tensor

            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, values in state["state"].items():
                like: Any = parameters[number]
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == like.shape and value.ndim:
                        values[name] = distribute_tensor(value.to(self.device), like.device_mesh, like.placements)
        optimizer.load_state_dict(state)

    def random_states(self) -> list[dict[str, Any]]:
        """The generators of each process, as numbers and tensors only."""
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

    def load_random_states(self, states: list[dict[str, Any]]) -> None:
        """What `random_states` gave, if there are as many processes as there were."""
        if len(states) != self.world:
            return
        state = states[self.rank]
        version, inner, gauss = state["python"]
        random.setstate((version, tuple(inner), gauss))
        kind, keys, *position = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])


def _mapped(value: Any, gather: Any) -> Any:
    """A copy of a nested value whose tensors are whole and on the CPU."""
    if isinstance(value, Tensor):
        return gather(value).detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _mapped(part, gather) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, gather) for part in value)
    return value
