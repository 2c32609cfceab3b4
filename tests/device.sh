#!/bin/bash
# What only a machine with a GPU can show, in under eight minutes: tests/device.sh [FOLDER]
#
# doctor, the kernels' tests, three benchmarks, and a run whose nodes train on the GPU and on the CPU; with two GPUs,
# a node of two ranks, too. The figures are written into FOLDER (default: device-report). PYTHON names another
# interpreter than .venv's. Exit status: how many of the parts failed.
set -u
cd "$(dirname "$0")/.." || exit 99
PYTHON=${PYTHON:-.venv/bin/python}
FOLDER=${1:-device-report}
mkdir -p "$FOLDER"
unset PYTHONDONTWRITEBYTECODE
failed=0

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begun=$SECONDS
  shift 2
  printf '%-22s' "$name"
  if timeout -k 10 "$limit" "$@" >"$FOLDER/$name.txt" 2>"$FOLDER/$name.err"; then
    echo "passed in $((SECONDS - begun)) s"
  else
    echo "FAILED ($?) after $((SECONDS - begun)) s; the end of $FOLDER/$name.txt and .err:"
    tail -n 25 "$FOLDER/$name.txt" "$FOLDER/$name.err" | cut -c1-240
    failed=$((failed + 1))
  fi
}

thinwire() { "$PYTHON" -m thinwire.node.cli.main "$@"; }

a_run() { # a coordinator, a node on the GPU (of all GPUs: a rank for each), one on the CPU
  local state node pids=()
  state=$(mktemp -d)
  thinwire coordinator deploy/runs/pydoc-gpt.toml --set run.rounds=40 --set task.layers=2 --set run.eval_every=40 \
    --host 127.0.0.1 --state "$state/coordinator" --ticket-file "$state/ticket" --linger 0 &
  pids+=($!)
  for _ in $(seq 300); do [ -s "$state/ticket" ] && break || sleep 0.1; done
  for node in cuda cpu; do
    thinwire join "@$state/ticket" --device "$node" --threads 2 --state "$state/$node" --host 127.0.0.1 \
      >"$FOLDER/node-$node.txt" 2>&1 &
    pids+=($!)
  done
  local status=0 pid
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  tail -n 3 "$FOLDER"/node-*.txt
  # The two nodes have the same weights, to the last bit.
  [ "$(cat "$FOLDER"/node-*.txt | grep -o 'fingerprint [0-9a-f]*' | sort -u | wc -l)" = 1 ] || status=1
  rm -rf "$state"
  return $status
}
export -f a_run thinwire
export PYTHON FOLDER

part doctor 120 "$PYTHON" -m thinwire.node.cli.main doctor
part kernels 240 "$PYTHON" -m pytest -q -n 4 -p no:benchmark --durations=10 tests/compression/test_cuda.py tests/compression/gpu tests/node/test_precision.py
for bench in noise decoupled diloco; do
  part "bench-$bench" 120 "$PYTHON" -m thinwire.node.cli.main bench "$bench" --device cuda --json
done
part a-run 120 bash -c a_run
exit "$failed"
