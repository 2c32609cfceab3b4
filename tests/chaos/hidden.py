"""`thinwire ARGS` that tells nobody where it listens, except for what it is to announce: who knows a proxy's
address has to use that.

Peers tell each other their addresses, and a node that was cut off at its proxy would come back around it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from thinwire.coordinator.protocol import p2p, p2p_daemon
from thinwire.node.cli import main

NOBODY = "127.0.0.2"
"""On this machine, but nobody listens there: the coordinator has 127.0.0.1 only."""


def hide() -> None:
    command = p2p_daemon._command

    def hidden(folder: Path, listen: str) -> list[str]:
        return [*command(folder, listen), f"-announceAddrs={listen.replace('127.0.0.1', NOBODY)}"]

    p2p_daemon._command = hidden
    dialable = p2p.dialable
    p2p.dialable = lambda host, port, announce: dialable(host, port, announce)[: len(announce) or None]


if __name__ == "__main__":
    hide()
    sys.exit(main.main())
