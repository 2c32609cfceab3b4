#!/usr/bin/env bash
# hivemind 1.1.12 with torch 2.13.0: FLOAT16 makes 65504 of infinity and leaves NaN; MEANSTD_16BIT makes NaN of both.
#
# Guessed: FLOAT16 is torch's .half(): infinity stays infinity, and so a peer whose gradient or momentum has overflowed is
# seen by whoever asks torch.isfinite after averaging.
# Seen: values are clamped to float16's range first. What arrives of [1, inf, -inf, nan] is [1, 65504, -65504, nan]: three
# peers' mean of 1, 1 and infinity is 21835.3, finite, and nothing downstream says that a peer has diverged; the other
# 16-bit codec shows it in every value of its row.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'hivemind==1.1.12' 'numpy==2.4.6'
cd "$folder"
CUDA_VISIBLE_DEVICES='' venv/bin/python - <<'PY'
import hivemind
import torch
from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
from hivemind.proto.runtime_pb2 import CompressionType

print("hivemind", hivemind.__version__, "torch", torch.__version__)


def received(values: list[float], codec: str) -> torch.Tensor:
    return deserialize_torch_tensor(serialize_torch_tensor(torch.tensor(values), CompressionType.Value(codec)))


inf = float("inf")
half = received([1, inf, -inf, float("nan")], "FLOAT16")
print("FLOAT16 of [1, inf, -inf, nan]:", half.tolist())
assert half[:3].tolist() == [1, 65504, -65504] and half[3].isnan()
mean = sum(received([value], "FLOAT16") for value in (1.0, 1.0, inf)) / 3
print("mean of 1, 1 and inf:", mean.item())
assert mean.isfinite().all() and abs(mean.item() - 21835.333) < 0.01
scaled = received([1, inf, -1], "MEANSTD_16BIT")
print("MEANSTD_16BIT of [1, inf, -1]:", scaled.tolist())
assert scaled.isnan().all()
assert torch.tensor([inf]).half().isinf().all()
PY
