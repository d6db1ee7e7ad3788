from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import aptvit

STEPS = 2


def make_model() -> Any:
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=10, embed_dim=48, num_heads=2)
    return aptvit.adapt(host, thresholds=(3.0, 3.0), init="nonzero").train()


def make_images() -> Tensor:
    """Four images: two smooth, two of noise."""
    torch.manual_seed(1)
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    images[:2] *= 0.01
    images[1, :, :32, :32] = torch.rand(3, 32, 32)
    return images


def train(model: Any, images: Tensor, scale: float) -> list[dict[str, Tensor]]:
    """Gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    grads = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(images).square().sum() * scale).backward()
        grads.append({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return grads


def work(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make_model()
    images = make_images()[2 * rank : 2 * rank + 2]
    counts = model.layout(images).counts
    ddp = DistributedDataParallel(model, find_unused_parameters=False)
    grads = train(ddp, images, 1.0)
    torch.save({"grads": grads, "counts": counts, "weights": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_whose_images_merge_differently_train_together(tmp_path: Path) -> None:
    """One process sees no coarse patch, so its new parameters must take part all the same."""
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    smooth, noisy = (torch.tensor(rank["counts"]).sum(0) for rank in ranks)
    assert noisy.tolist() == [32, 0, 0] and (smooth > 0).all()
    separate = make_model()
    expected = train(separate, make_images(), 0.5)  # DDP takes the mean over processes
    for rank in ranks:
        for step in range(STEPS):
            for name, grad in expected[step].items():
                got = rank["grads"][step][name]
                assert (got - grad).abs().max() <= 1e-4 * grad.abs().max(), (step, name)
        for name, value in separate.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], value, atol=1e-5, rtol=1e-4)
    assert expected[0]["coarse_embed.conv.weight"].abs().max() > 0
