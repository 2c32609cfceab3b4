#!/usr/bin/env bash
# torch 2.13.0, gloo: all_reduce of a contiguous and a transposed tensor adds wrong pairs, and gives each rank another sum.
#
# Guessed: collectives work on what a tensor says, whatever its strides; or they refuse one that is not contiguous, as NCCL
# does for some.
# Seen: each rank's memory is sent and added as it lies. Two ranks that hold the same 2 x 3 matrix, one of them as the
# transpose of a contiguous tensor, should have twice the matrix. They get two different matrices, neither of them that,
# without a word; a broadcast arrives with its values in other places. A .T, channels_last on one rank, or weights loaded
# another way on one machine are enough for replicas that differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.6'
cd "$folder"
cat >ranks.py <<'PY'
import pathlib

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank(number: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    matrix = torch.arange(6.0).reshape(2, 3)
    other = matrix.T.contiguous().T
    assert torch.equal(matrix, other) and other.stride() == (1, 2)
    summed = (matrix if number == 0 else other).clone(memory_format=torch.preserve_format)
    dist.all_reduce(summed)
    sent = other if number == 0 else torch.zeros(2, 3)
    dist.broadcast(sent, 0)
    found = summed.tolist(), sent.tolist()
    print(f"rank {number}: all_reduce {found[0]} (2 x {matrix.tolist()} asked for), broadcast {found[1]}", flush=True)
    sums = [[0, 4, 3], [7, 6, 10]], [[0, 3, 6], [4, 7, 10]]
    assert found == (sums[number], [[0, 1, 2], [3, 4, 5]] if number == 0 else [[0, 3, 1], [4, 2, 5]])
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    mp.spawn(rank, (str(pathlib.Path("store").absolute()),), nprocs=2)
PY
CUDA_VISIBLE_DEVICES='' GLOO_SOCKET_IFNAME=lo venv/bin/python ranks.py
