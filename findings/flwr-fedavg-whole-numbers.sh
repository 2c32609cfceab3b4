#!/usr/bin/env bash
# flwr 1.42.0: FedAvg makes 0 of whole numbers that all clients agree on, and NaN of float16 when it is told not to.
#
# Guessed: the weighted mean of arrays that are the same at every client is that array, up to rounding.
# Seen: FedAvg() aggregates in place by default, in each array's own type: of int64 arrays (counters, such as those of
# batches that a BatchNorm has seen) the weights 1/2 and 1/2 are cast to 0 and 0, so that the mean of 10 and 10 is 0.
# FedAvg(inplace=False) multiplies by the number of examples before it divides, also in the array's type: 10 comes out as
# 10.0, but float16 weights of clients with 100,000 examples overflow (1000 and 1000 give NaN). No warning reaches the user
# in the first case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'flwr==1.42.0' 'numpy==2.4.6'
cd "$folder"
HOME="$folder" FLWR_TELEMETRY_ENABLED=0 venv/bin/python - 2>/dev/null <<'PY'
from importlib.metadata import version
import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg


def trained():
    """What a client returns: a counter, and weights in float32 and in float16."""
    arrays = [np.array([10, 20]), np.float32([1.5, -2.0]), np.float16([1000.0, -1.0])]
    return None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 100_000, {})


def mean_of(strategy):
    parameters, _ = strategy.aggregate_fit(1, [trained(), trained()], [])
    return [array.tolist() for array in parameters_to_ndarrays(parameters)]


print("flwr", version("flwr"))
print("FedAvg():             ", mean_of(FedAvg()))
print("FedAvg(inplace=False):", mean_of(FedAvg(inplace=False)))
assert mean_of(FedAvg()) == [[0, 0], [1.5, -2.0], [1000.0, -1.0]]
counter, float32, float16 = mean_of(FedAvg(inplace=False))
assert counter == [10.0, 20.0] and float32 == [1.5, -2.0]
assert np.isnan(float16).all()
PY
