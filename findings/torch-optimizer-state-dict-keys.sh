#!/usr/bin/env bash
# torch 2.13.0: get_optimizer_state_dict keeps two keys of an optimizer's state, and load_state_dict gets names.
#
# Guessed: torch.distributed.checkpoint.state_dict saves what an optimizer's own state_dict() returns, and gives
# load_state_dict() the same back.
# Seen: whatever an optimizer adds beside "state" and "param_groups" (a round, counters) is dropped without a word. On the
# way back load_state_dict() is called by the keyword state_dict=, and parameters are named ("weight", "bias") where
# state_dict() had numbered them: an override with another argument name, or one that looks up numbers, fails there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' numpy
cd "$folder"
venv/bin/python - <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


class Counting(torch.optim.SGD):
    """Keeps a count of its own beside the state of its parameters."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.counters = {"rounds": 0}
        self.seen = None

    def step(self, closure=None):
        self.counters["rounds"] += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "counters": dict(self.counters)}

    def load_state_dict(self, state_dict):
        self.seen = state_dict
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})


model = torch.nn.Linear(3, 2)
optimizer = Counting(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
saved = get_optimizer_state_dict(model, optimizer)
print("torch", torch.__version__)
print("its own state_dict:       ", sorted(optimizer.state_dict()))
print("get_optimizer_state_dict: ", sorted(saved))
assert "counters" in optimizer.state_dict()
assert sorted(saved) == ["param_groups", "state"]
fresh = Counting(model.parameters())
set_optimizer_state_dict(model, fresh, saved)
print("load_state_dict was given:", sorted(fresh.seen), "state under", list(fresh.seen["state"]))
assert "counters" not in fresh.seen
assert list(optimizer.state_dict()["state"]) == [0, 1]
assert list(fresh.seen["state"]) == ["weight", "bias"]
PY
