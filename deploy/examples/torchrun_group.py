"""A strategy of thinwire as an optimizer, on ranks that `torch.distributed` knows: no coordinator, no ledger.

    torchrun --standalone --nproc-per-node 2 deploy/examples/torchrun_group.py
    torchrun --standalone --nproc-per-node 2 deploy/examples/torchrun_group.py --strategy diloco --steps 400

For machines that stay: each rank trains on batches of its own, and `step()` sends a few bits of what moved,
in place of the all-reduce of DistributedDataParallel. Several machines: torchrun's own --nnodes and
--rdzv-endpoint.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn

from thinwire.optim.api import group_optimizer, verify_group

STRATEGIES = {
    "decoupled": {"name": "decoupled", "lr": 3e-3, "compressor": {"name": "dct_topk", "k": 32}},
    "diloco": {"name": "diloco", "lr": 3e-3, "inner_steps": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--strategy", choices=STRATEGIES, default="decoupled")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")  # NCCL for GPUs
    try:
        train(arguments.strategy, arguments.steps)
    finally:
        dist.destroy_process_group()


def train(strategy: str, n_steps: int) -> None:
    """Fits a fixed map of 32 numbers to 8; prints the loss on examples that nobody trains on."""
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 8))  # all ranks get rank 0's values
    optimizer = group_optimizer(STRATEGIES[strategy], model.named_parameters())
    generator = torch.Generator().manual_seed(rank)  # other batches on every rank
    target_IO = torch.randn(32, 8, generator=torch.Generator().manual_seed(99)) / 32**0.5
    held_out_NI = torch.randn(256, 32, generator=torch.Generator().manual_seed(98))
    for step in range(n_steps + 1):
        if step % (n_steps // 4 or 1) == 0 and rank == 0:
            with torch.no_grad(), optimizer.replica():
                loss = (model(held_out_NI) - held_out_NI @ target_IO).square().mean()
            print(f"step {step}: held-out loss {loss:.4f}", flush=True)
        if step < n_steps:
            x_BI = torch.randn(32, 32, generator=generator)
            (model(x_BI) - x_BI @ target_IO).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    verify_group(optimizer)  # raises unless all ranks have the same bits
    if rank == 0:
        print(f"{dist.get_world_size()} ranks, equal to the last bit")


if __name__ == "__main__":
    main()
