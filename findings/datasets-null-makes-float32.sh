#!/usr/bin/env bash
# datasets 5.2.0: one null in a batch of int64, and the whole numbers beside it are float32, which changes them.
#
# Guessed: formats "numpy" and "torch" keep int64, and where a null is in the batch there is an error, an object array, or
# NaN in float64, as in pandas.
# Seen: a batch with a null is float32. Whole numbers above 2**24 (positions, hashes, identifiers) change without a word:
# 16777217 becomes 16777216. The same row read alone, or in a batch without a null, is the exact int64. So what a row holds
# depends on its neighbours in the batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1' 'numpy==2.4.6'
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" venv/bin/python - 2>/dev/null <<'PY'
import datasets
import numpy as np

rows = datasets.Dataset.from_dict({"id": [16777217, 16777219, None, 5]}).with_format("numpy")
alone, exact, mixed = rows[0]["id"], rows[0:2]["id"], rows[0:3]["id"]
print("datasets", datasets.__version__)
print("a row alone:         ", alone, alone.dtype)
print("two rows:            ", exact, exact.dtype)
print("three, one of them null:", [int(x) if x == x else x for x in mixed], mixed.dtype)
assert alone == 16777217 and alone.dtype == np.int64
assert exact.tolist() == [16777217, 16777219] and exact.dtype == np.int64
assert mixed.dtype == np.float32
assert mixed[:2].tolist() == [16777216.0, 16777220.0] and np.isnan(mixed[2])
PY
