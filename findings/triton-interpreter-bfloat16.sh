#!/usr/bin/env bash
# Triton 3.7.1 with torch 2.13.0: its interpreter adds bfloat16 as bit patterns, and cuts float32 off where a GPU rounds.
#
# Guessed: TRITON_INTERPRET=1 computes what the compiled kernel does, slowly, so that kernels can be tested on machines
# without a GPU: 1 + 1 is 2 in every type, and .to(tl.bfloat16) rounds to nearest, ties to even, as the language says.
# Seen: of bfloat16 tensors the interpreter holds the 16 bits as whole numbers, and adds these: 1 + 1 is 1.7e38, 2 + 2 is
# -0, 3 + 3 -1.2e-38. A cast from float32 drops the lower bits: 1.99 becomes 1.984375, where 1.9921875 is nearest. float16
# is right in both. Who tests such a kernel there tests another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'triton==3.7.1' 'numpy==2.4.6'
cd "$folder"
cat >kernels.py <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def cast(x, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


def both(values: list[float], dtype: torch.dtype) -> tuple[list[float], list[float]]:
    exact = torch.tensor(values)
    x, sums, casts = exact.to(dtype), torch.empty(len(values), dtype=dtype), torch.empty(len(values), dtype=dtype)
    add[(1,)](x, x, sums, len(values))
    cast[(1,)](exact, casts, len(values))
    return sums.tolist(), casts.tolist()


print("triton", triton.__version__, "torch", torch.__version__)
assert both([1, 2, 0.5, 3], torch.float16)[0] == [2, 4, 1, 6]
sums, _ = both([1, 2, 0.5, 3], torch.bfloat16)
print("bfloat16 [1, 2, 0.5, 3] + itself:", sums)
assert [f"{value:.2g}" for value in sums] == ["1.7e+38", "-0", "4.3e+37", "-1.2e-38"]
_, casts = both([1.99, 3.999, -1.999, 1], torch.bfloat16)
print("to bfloat16 [1.99, 3.999, -1.999, 1]:", casts)
assert casts == [1.984375, 3.984375, -1.9921875, 1]
assert torch.tensor([1.99, 3.999, -1.999, 1]).bfloat16().tolist() == [1.9921875, 4, -2, 1]
PY
CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1 venv/bin/python kernels.py
