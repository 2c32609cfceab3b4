#!/usr/bin/env bash
# numba 0.68.1 with numpy 2.4.6: a uint64 and a literal make an int64, so that halves of large hashes are negative.
#
# Guessed: in @njit code an element of a uint64 array with a small literal (x // 2, x % 10, x + 1, x < 1) does what the same
# line does in numpy 2 and in C: it stays uint64.
# Seen: the literal is an int64, and the two meet in int64: from 2**63 on x // 2 and x + 1 are negative, x % 10 is another
# remainder, and x - 1 < 1 is true. Shifts and masks by a literal keep the bits. With the literal as np.uint64(2) all is as
# in numpy. There is no warning; numbers below 2**63 hide it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'numba==0.68.1' 'numpy==2.4.6'
cd "$folder"
venv/bin/python - <<'PY'
import numba
import numpy as np


@numba.njit
def half(hashes):
    return hashes[0] // 2


@numba.njit
def bucket(hashes):
    return hashes[0] % 10


@numba.njit
def is_small(hashes):
    return hashes[0] - 1 < 1


@numba.njit
def half_as_typed(hashes):
    return hashes[0] // np.uint64(2)


hashes = np.array([2**63 + 10], dtype=np.uint64)
print("numba", numba.__version__, "numpy", np.__version__)
for function in (half, bucket, is_small, half_as_typed):
    print(f"{function.__name__:14} compiled {function(hashes)}, in numpy {function.py_func(hashes)}")
assert half(hashes) == -(2**62) + 5 and half.py_func(hashes) == 2**62 + 5
assert bucket(hashes) == 2 and bucket.py_func(hashes) == 8
assert is_small(hashes) and not is_small.py_func(hashes)
assert half_as_typed(hashes) == half.py_func(hashes)
PY
