#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0, on a CPU: 8 bits hold no zero, and Lion8bit trains weights that have no gradient.
#
# Guessed: of its 256 codes one is 0.0, so that quantize_blockwise keeps zeros, and takes the nearest code for the rest; an
# optimizer leaves a weight alone whose gradient has been zero in every step, as Lion does (the sign of zero is zero).
# Seen: on a CPU zeros become code 131, which is 2.1e-5 of the largest of the block, and so does all that is nearer to zero
# than that; code 127, the zero, is never given. After the first step Lion8bit finds a momentum above zero and moves such a
# weight by all of lr in each step, if any in its block of 256 has a gradient: unused rows of an embedding, say. And a NaN
# becomes code 0, -0.993 of the largest, so that a broken gradient is no longer to be seen in the optimizer's state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'torch==2.13.0' 'bitsandbytes==0.50.2' 'numpy==2.4.6'
cd "$folder"
CUDA_VISIBLE_DEVICES='' venv/bin/python - <<'PY'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
values = torch.tensor([1.0, 0.0, 1e-6, 1e-5, -1e-6, float("nan")])
codes, state = quantize_blockwise(values[:5])
print("codes of", values[:5].tolist(), "are", codes.tolist(), "so", dequantize_blockwise(codes, state).tolist())
print("nearest would be", [int((state.code - v).abs().argmin()) for v in values[:5]], "and code 127 is", float(state.code[127]))
assert codes.tolist() == [255, 131, 131, 131, 123] and float(state.code[127]) == 0.0
codes, state = quantize_blockwise(values[[0, 1, 5]])
print("with a NaN", dequantize_blockwise(codes, state).tolist())
assert dequantize_blockwise(codes, state).isfinite().all() and codes[2] == 0

weights = torch.nn.Parameter(torch.zeros(8192))
optimizer = bitsandbytes.optim.Lion8bit([weights], lr=1e-3)
for _ in range(10):
    weights.grad = torch.zeros_like(weights)
    weights.grad[0] = 1.0
    optimizer.step()
print("Lion8bit, ten steps with a gradient in weight 0 only:", weights[:3].tolist())
assert torch.allclose(weights[0], torch.tensor(-0.010)) and torch.allclose(weights[1:256], torch.tensor(-0.009))
PY
