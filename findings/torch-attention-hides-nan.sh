#!/usr/bin/env bash
# torch 2.13.0: attention on a CPU turns a NaN query into zeros where there are fewer keys than a vector has lanes.
#
# Guessed: what attends with a NaN query is NaN, whatever the length of the sequence.
# Seen: scaled_dot_product_attention gives zeros for such a query with up to 7 keys (AVX2: 8 lanes) or up to 15 keys
# (AVX512: 16 lanes), and NaN from there on. NaN in values always comes through, NaN in keys from two keys on, and the
# plain mathematics (SDPBackend.MATH) gives NaN throughout. So a model whose query projection has become NaN has a finite
# loss on short sequences, and where that ends depends on the CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' numpy
cd "$folder"
cat > attention.py <<'PY'
import math
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def attended(n_keys):
    """What the one query, all of it NaN, gets from so many keys."""
    query = torch.full((1, 1, 1, 8), math.nan)
    keys, values = torch.ones(2, 1, 1, n_keys, 8)
    return F.scaled_dot_product_attention(query, keys, values)


lanes = {"AVX2": 8, "AVX512": 16}.get(torch.backends.cpu.get_cpu_capability())
zero = [n for n in range(1, 40) if torch.equal(attended(n), torch.zeros(1, 1, 1, 8))]
is_nan = [n for n in range(1, 40) if bool(attended(n).isnan().all())]
with sdpa_kernel(SDPBackend.MATH):
    plainly = [n for n in range(1, 40) if bool(attended(n).isnan().all())]
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
print("keys with which a NaN query gets zeros:", zero)
print("keys with which it gets NaN:           ", is_nan[0], "to", is_nan[-1])
assert plainly == list(range(1, 40))
assert zero and zero + is_nan == list(range(1, 40))
assert lanes is None or zero == list(range(1, lanes))
PY
for capability in avx2 avx512; do
  ATEN_CPU_CAPABILITY=$capability venv/bin/python attention.py
done
