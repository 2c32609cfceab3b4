"""A training loop of a user's own as a process: `python loop_node.py TICKET STATE [SECONDS]`.

Writes a JSON line for every round; in the end the result. SECONDS: how long a batch takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.support.loop_nodes import Net, examples, loss_of
from thinwire.node.loop.api import join


def main(ticket: str, state: str, batch_s: float) -> None:
    """The same seed on every node, as in most scripts: each of them trains on other batches even so."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [{name: values[0] for name, values in batch.items()} for batch in examples(1, n=64)]
    loader = DataLoader(rows, batch_size=8, shuffle=True)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(batch_s)
        return loss_of(model, batch)

    def tell(**what: object) -> None:
        print(json.dumps(what), flush=True)  # noqa: T201

    with join(ticket, Net(), loader, loss, state=Path(state), host="127.0.0.1") as swarm:
        tell(entered=swarm.round, peer_id=swarm.peer_id)
        for outcome in swarm:
            tell(round=outcome.round, counted=outcome.counted, peers=outcome.peers, loss=outcome.loss)
        fingerprint = swarm.fingerprint
    assert swarm.result is not None
    tell(fingerprint=fingerprint, rounds=swarm.result.rounds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
