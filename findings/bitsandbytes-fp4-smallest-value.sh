#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0: its "fp4" is E2M1 but for the smallest value, which is a sixteenth of E2M1's.
#
# Guessed: quant_type="fp4" is the 4-bit float of the OCP formats and of GPUs, E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
# negatives, here over 6, so that the smallest above zero is 1/12 of the block's largest.
# Seen: seven of the eight are these, but the smallest is 1/192. Whatever is between 0.003 and 0.086 of the largest comes
# back as 0.0052 of it: 0.08 loses 93% of itself, where E2M1 would lose 4%. Weights from one are no weights for the other.
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
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print("bitsandbytes", bitsandbytes.__version__, "torch", torch.__version__)
values = torch.linspace(0, 1, 4096)
packed, state = quantize_4bit(values, blocksize=4096, quant_type="fp4")
back = dequantize_4bit(packed, state).flatten()
found = sorted(set(back.tolist()))
e2m1 = [v / 6 for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
print("fp4 ", [round(v, 4) for v in found])
print("E2M1", [round(v, 4) for v in e2m1])
assert all(abs(a - b) < 1e-4 for i, (a, b) in enumerate(zip(found, e2m1, strict=True)) if i != 1)
assert abs(found[1] * 192 - 1) < 1e-3
low = values[(back == found[1])]
print(f"from {float(low.min()):.4f} to {float(low.max()):.4f} all become {found[1]:.4f}")
assert low.min() < 0.004 and low.max() > 0.085
PY
