#!/usr/bin/env bash
# torch 2.13.0 with safetensors 0.8.0: one plain number in a state, and its checkpoint cannot be read by safetensors.
#
# Guessed: torch.distributed.checkpoint.save with a HuggingFaceStorageWriter refuses what safetensors cannot hold, or leaves
# it out.
# Seen: {"weight": tensor} is saved as a safetensors file. {"weight": tensor, "round": 5} is saved without an error, and the
# file of that name, *.safetensors, is none: "header too large". The tensors in it cannot be loaded either, by safetensors or
# by HuggingFaceStorageReader. States of optimizers and of training loops have such numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'safetensors==0.8.0' numpy
cd "$folder"
venv/bin/python - 2>/dev/null <<'PY'
from pathlib import Path
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter


def names_in(folder):
    (path,) = Path(folder).glob("*.safetensors")
    try:
        with safe_open(path, "pt") as file:
            return sorted(file.keys())
    except SafetensorError as e:
        return str(e)


weight = torch.arange(4.0)
dcp.save({"weight": weight}, storage_writer=HuggingFaceStorageWriter(path="tensors"))
dcp.save({"weight": weight, "round": 5}, storage_writer=HuggingFaceStorageWriter(path="number"))
print("torch", torch.__version__)
print("of a tensor:             ", names_in("tensors"))
print("of a tensor and a number:", names_in("number"))
assert names_in("tensors") == ["weight"]
assert "header too large" in names_in("number")
read = {"weight": torch.zeros(4)}
dcp.load(read, storage_reader=HuggingFaceStorageReader(path="tensors"))
assert torch.equal(read["weight"], weight)
try:
    dcp.load({"weight": torch.zeros(4)}, storage_reader=HuggingFaceStorageReader(path="number"))
except BaseException as e:
    print("the weight in the second:", type(e).__name__)
else:
    raise SystemExit("the second checkpoint could be loaded")
PY
