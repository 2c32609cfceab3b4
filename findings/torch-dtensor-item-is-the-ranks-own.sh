#!/usr/bin/env bash
# torch 2.13.0: sum().item() of a sharded DTensor is this rank's own sum, std().item() is the whole's.
#
# Guessed: .item() and float() of a scalar that was reduced over shards are the scalar, the same on every rank.
# Seen: where the reduction is still pending (Partial: sum, mean, max, norm, any, all, cross_entropy), .item(), float() and
# bool() give what this rank has, without an error; where the operation needed the whole (std, argmax, logsumexp, a
# comparison, + 0) they give the whole's. So each rank logs a loss of its own, and `if grad.isnan().any():` takes different
# branches on different ranks. full_tensor() is right throughout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' numpy
cd "$folder"
cat > rank.py <<'PY'
import math
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore("meeting", 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
plain = torch.tensor([1.0, 2.0, 30.0, 4.0])
x = distribute_tensor(plain, mesh, [Shard(0)])
own = plain[:2] if rank == 0 else plain[2:]
print(
    f"rank {rank}: sum {x.sum().item()} (of the whole {x.sum().full_tensor().item()}), max {x.max().item()}, "
    f"any over 20: {bool((x > 20).any())}, sum over 20: {bool(x.sum() > 20)}, "
    f"std {x.std().item():.3f}, argmax {x.argmax().item()}",
    flush=True,
)
assert x.sum().item() == own.sum().item() != plain.sum().item()
assert x.mean().item() == own.mean().item() != plain.mean().item()
assert float(x.max()) == own.max().item()
assert bool((x > 20).any()) == (rank == 1)
assert x.sum().full_tensor().item() == plain.sum().item()
assert bool(x.sum() > 20)  # of the whole, on either rank
assert math.isclose(x.std().item(), plain.std().item(), rel_tol=1e-6)
assert x.argmax().item() == 2
dist.barrier()
dist.destroy_process_group()
PY
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
timeout 120 venv/bin/python rank.py 0 &
timeout 120 venv/bin/python rank.py 1
wait $!
