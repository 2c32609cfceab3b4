#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: an array whose columns come first in memory is saved with its values in other places.
#
# Guessed: safetensors.numpy.save writes what the array says (numpy's own tobytes, save and savez do), or refuses, as
# safetensors.torch refuses a transposed tensor. Both hold of 0.7.0, which writes the values that the array says.
# Seen: 0.8.0 takes the bytes as they lie in memory and the shape as it is, and says nothing. Contiguous and dense, as its
# documentation asks, such an array is. scipy and scikit-learn give arrays of this kind (factors of decompositions), and
# so does .T: weights are another matrix when they come back, with the same norm and the same mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
seen() {
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "safetensors==$1" 'numpy==2.4.6'
  (cd "$folder" && venv/bin/python - "$2") <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

rows_first = np.arange(6, dtype=np.float32).reshape(2, 3)
columns_first = np.asfortranarray(rows_first)
assert (columns_first == rows_first).all() and columns_first.flags.forc
back = load(save({"w": columns_first}))["w"]
print("safetensors", safetensors.__version__, "saved", rows_first.tolist(), "back", back.tolist())
assert (load(save({"w": rows_first}))["w"] == rows_first).all()
assert str(back.tolist()) == sys.argv[1], "it has changed"
PY
}
seen 0.7.0 '[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]'
seen 0.8.0 '[[0.0, 3.0, 1.0], [4.0, 2.0, 5.0]]'
