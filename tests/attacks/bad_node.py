"""`bad_node.py ATTACK ARGS`: `thinwire ARGS` of a node whose offers have bad contents (`bad_peers.ATTACKS`).

All else is a node's own code, wrapped from here: its work, its membership, its frames and its signatures.
"""

from __future__ import annotations

import sys
from typing import Any

from thinwire.coordinator.protocol.messages import GenesisBody, Offer
from thinwire.node.bench.attacks.bad_peers import ATTACKS, BadPeer, Board
from thinwire.node.cli import main
from thinwire.node.links.remote import RemoteLink
from thinwire.node.replica import Replica


def attach(name: str) -> None:
    replicas: list[tuple[Replica, GenesisBody]] = []
    begin, send, board = Replica.__init__, RemoteLink.offer, Board()

    def begun(self: Replica, run_id: bytes, genesis: GenesisBody, *args: Any, **options: Any) -> None:
        begin(self, run_id, genesis, *args, **options)
        replicas.append((self, genesis))

    def offer(self: RemoteLink, honest: Offer) -> None:
        replica, genesis = replicas[0]
        send(self, BadPeer(ATTACKS[name], self.peer_id, board).offer(honest, replica, genesis))

    Replica.__init__, RemoteLink.offer = begun, offer  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    attach(sys.argv[1])
    sys.exit(main.main(sys.argv[2:]))
