"""`doomed.py ORDERS ARGS`: `thinwire ARGS` with strings attached, pulled by writing the file ORDERS (JSON).

    {"do": "die", "phase": "apply", "edge": "before"}                   SIGKILL to itself there
    {"do": "stop", "phase": "apply", "edge": "before"}                  SIGSTOP
    {"do": "flip", "parameter": "0.weight", "element": 7, "bit": 12}    one bit of the replica, between rounds
    "round": 40     in all: not before the replica is at this round
    "passes": 3     in all: the third time that it passes there, not the first

An order is carried out once: its file is removed first. The node's own code is the real one; its methods are
wrapped from here, so that nothing in it knows of this.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thinwire.node.cli import main
from thinwire.node.replica import Replica

PHASES: dict[str, tuple[str, ...]] = {
    "propose": ("thinwire.optim.decoupled:Decoupled.propose", "thinwire.optim.spsa:Spsa.propose"),
    "offer": ("thinwire.node.links.hivemind:HivemindLink.offer",),
    "publish": ("thinwire.node.links.blob_client:BlobClient.put",),
    "commit": ("thinwire.coordinator.protocol.ledger_copy:LedgerCopy.append",),
    "fetch": ("thinwire.node.links.hivemind:HivemindLink.payload",),
    "apply": ("thinwire.node.replica:Replica.apply_batch",),
    "update": ("thinwire.optim.decoupled:Decoupled.apply", "thinwire.optim.spsa:Spsa.apply_many"),
    "snapshot": ("thinwire.node.snapshots.store:SnapshotStore.write",),
    "rename": ("thinwire.node.snapshots.store:SnapshotStore._adopt",),
    "serve": ("thinwire.node.snapshots.store:SnapshotStore.open",),
    "pass on": ("thinwire.node.links.payloads:_PassedOn.read",),
}
"""Phase -> what does it. `update` is the inside of `apply`, when tensors change but the replica's round has
not; `rename` that of `snapshot`, when all is written aside; `commit` puts the record on the node's disk;
`serve` gives a chunk of a snapshot, or its manifest, to somebody; `pass on` a piece of another's payload, for
which that somebody was waiting."""

EDGES = ("before", "after")


class Orders:
    """Looks for an order at every edge. A look costs a few microseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._replica: Replica | None = None
        self._passes = 0

    def look(self, phase: str, edge: str, owner: object) -> None:
        if isinstance(owner, Replica):
            self._replica = owner
        try:
            order = json.loads(self._path.read_text())
        except FileNotFoundError:  # none, or somebody else has just taken it
            self._passes = 0
            return
        round_ = 0 if self._replica is None else self._replica.round
        place = (order.get("phase", "apply"), order.get("edge", "before"))
        if place != (phase, edge) or round_ < order.get("round", 0):
            return
        self._passes += 1
        if self._passes < order.get("passes", 1):
            return
        try:
            self._path.unlink()
        except FileNotFoundError:  # another thread is at it
            return
        if order["do"] == "flip":
            self._flip(order["parameter"], order["element"], order["bit"])
        else:
            is_last = order["do"] == "die"
            say(f"{'dies' if is_last else 'stops'} {edge} {phase}, at round {round_}")
            os.kill(os.getpid(), signal.SIGKILL if is_last else signal.SIGSTOP)

    def _flip(self, name: str, element: int, bit: int) -> None:
        assert self._replica is not None
        say(f"bit {bit} of element {element} of {name} flips, at round {self._replica.round}")
        with torch.no_grad():
            bits = self._replica.tensors()[name].view(-1).view(torch.int32)
            bits[element] ^= 1 << bit


def say(text: str) -> None:
    sys.stderr.write(f"doomed: {text}\n")
    sys.stderr.flush()


def attach(orders: Orders) -> None:
    """Wraps what PHASES names. Fails if something is not there any more."""
    for phase, targets in PHASES.items():
        for target in targets:
            module_name, _, path = target.partition(":")
            class_name, _, method = path.partition(".")
            kind = getattr(importlib.import_module(module_name), class_name)
            setattr(kind, method, _wrapped(getattr(kind, method), phase, orders))


def _wrapped(inner: Callable[..., Any], phase: str, orders: Orders) -> Callable[..., Any]:
    @functools.wraps(inner)
    def outer(self: Any, *args: Any, **options: Any) -> Any:
        orders.look(phase, "before", self)
        result = inner(self, *args, **options)
        orders.look(phase, "after", self)
        return result

    @functools.wraps(inner)
    async def outer_async(self: Any, *args: Any, **options: Any) -> Any:
        orders.look(phase, "before", self)
        result = await inner(self, *args, **options)
        orders.look(phase, "after", self)
        return result

    return outer_async if inspect.iscoroutinefunction(inner) else outer


if __name__ == "__main__":
    attach(Orders(Path(sys.argv[1])))
    sys.exit(main.main(sys.argv[2:]))
