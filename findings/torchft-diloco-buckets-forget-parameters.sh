#!/usr/bin/env bash
# torchft 0.2.0: DiLoCo with use_bucketization averages only some of the parameters, and the replicas drift apart.
#
# Guessed: buckets change how pseudo-gradients travel, not what comes of them: after a synchronisation all replicas have the
# same parameters, those that they have without buckets.
# Seen: a bucket ends before the first tensor that does not fit, and yet its whole size counts as done. With three parameters
# of 150,000 values and buckets of 1 MiB (262,144 values) the third is in no bucket: each replica applies its own
# pseudo-gradient to it. And what a bucket brings is copied back by the loop's variables, which are those of the last bucket
# by then: the first parameter is, in most runs, each replica's own as well. should_commit() is true, nothing is logged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torchft==0.2.0' 'torch==2.13.0' numpy
cd "$folder"
cat > replica.py <<'PY'
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo

lighthouse, which, in_buckets = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
model = nn.ParameterList([nn.Parameter(torch.zeros(150_000)) for _ in range(3)])
manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=30)), min_replica_size=2, use_async_quorum=False,
    load_state_dict=model.load_state_dict, state_dict=model.state_dict, rank=0, world_size=1,
    store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=lighthouse, replica_id=f"replica{which}",
    hostname="127.0.0.1", timeout=timedelta(seconds=30), init_sync=False,
)
inner, outer = torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.SGD(model.parameters(), lr=1.0)
options = {"use_bucketization": True, "bucket_cap_mb": 1} if in_buckets else {}
with DiLoCo(manager, [model], inner, outer, sync_every=1, **options):
    for p in model:  # replica 0 moves by -1, replica 1 by -3: the mean is -2
        p.grad = torch.full_like(p, 1.0 + 2.0 * which)
    inner.step()
print([sorted(set(p.tolist())) for p in model], flush=True)
manager.shutdown(wait=False)
PY
cat > both.py <<'PY'
import ast
import subprocess
import sys
from importlib.metadata import version
from torchft.coordination import LighthouseServer


def after_one_round(in_buckets):
    """The parameters of both replicas, each as the values that occur in it."""
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=1000)
    address = "http://127.0.0.1:" + lighthouse.address().rsplit(":", 1)[1]
    replicas = [
        subprocess.Popen(
            [sys.executable, "replica.py", address, str(i), str(in_buckets)], stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        said = [replica.communicate(timeout=120)[0] for replica in replicas]
    finally:
        for replica in replicas:
            replica.kill()
        lighthouse.shutdown()
    return [ast.literal_eval(text.splitlines()[-1]) for text in said]


print("torchft", version("torchft"))
plain, in_buckets = after_one_round(False), after_one_round(True)
print("without buckets:", *plain)
print("in buckets:     ", *in_buckets)
assert plain == [[[-2.0], [-2.0], [-2.0]]] * 2
assert [replica[1] for replica in in_buckets] == [[-2.0], [-2.0]]  # in the last bucket
assert [replica[2] for replica in in_buckets] == [[-1.0], [-3.0]]  # in none
PY
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
venv/bin/python both.py 2> log || { tail -20 log >&2; exit 1; }
