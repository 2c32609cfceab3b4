#!/usr/bin/env bash
# safetensors 0.8.0: two saves of the same tensors with the same notes are different files.
#
# Guessed: the same tensors and the same metadata, saved twice by one process, are the same bytes (tensors are sorted).
# Seen: the notes under __metadata__ come in another order each time, also within one process, and PYTHONHASHSEED has no say.
# With one note the bytes are the same. So a file's digest is no name for its contents, and a cache or an upload that
# compares digests takes the same model for another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.4.6'
cd "$folder"
PYTHONHASHSEED=0 venv/bin/python - <<'PY'
from hashlib import sha256
import numpy as np
import safetensors
from safetensors.numpy import save

tensors = {"a": np.arange(3.0), "b": np.arange(4)}
notes = {"format": "pt", "run": "7", "round": "12", "author": "nobody"}
many = {sha256(save(tensors, notes)).hexdigest()[:16] for _ in range(50)}
one = {sha256(save(tensors, {"format": "pt"})).hexdigest()[:16] for _ in range(50)}
print("safetensors", safetensors.__version__)
print("digests of 50 saves with four notes:", len(many))
print("digests of 50 saves with one note:  ", len(one))
assert len(many) > 1
assert len(one) == 1
PY
