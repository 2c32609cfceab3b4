"""The process of a coordinator that is measured: the real one, but for its transport and the model."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from ....coordinator.protocol.identity import load_or_create, peer_id_of
from ....coordinator.server import CoordinatorServer
from ....coordinator.state import StateDir
from ...system.memory import peak_bytes
from ...system.output import to_stdout
from ..genesis import genesis_of
from .transport import start_plain

SOCKET: Final = "light.sock"
LOOK_S: Final = 0.02


async def measured(folder: Path, n_peers: int, n_rounds: int, warm_up: int) -> dict[str, Any]:
    """What the rounds after the first `warm_up` took. `loop_cpu_s`: of the thread of the event loop; `cpu_s`:
    of all threads, in which signatures are checked and the disk is written."""
    path = folder / "state"
    with StateDir(path) as state:
        coordinator = peer_id_of(load_or_create(state.key_path).public_key())
        server = CoordinatorServer(
            state,
            genesis=genesis_of(coordinator, n_peers, warm_up + n_rounds),
            start_transport=partial(start_plain, folder / SOCKET),
        )
        await server.start()
        try:
            (folder / "ticket").write_text(server.ticket.line())
            began_s = time.monotonic()
            await _until(server, 1)
            assembled_s = time.monotonic() - began_s
            await _until(server, warm_up)
            before, first, began_s = _clocks(server), server.head, time.monotonic()
            await _until(server, warm_up + n_rounds)
            took_s, after = time.monotonic() - began_s, _clocks(server)
            n = server.head - first
            counted = [len(c.body.offers) for c in server.ledger.commits(first, n)]
            await asyncio.sleep(0.2)
        finally:
            await server.stop()
    found = {key: after[key] - before[key] for key in before}
    return {
        "assembled_s": assembled_s,
        "rounds": n,
        "took_s": took_s,
        "least_counted": min(counted),
        "peak_bytes": peak_bytes(),
        **found,
    }


def _clocks(server: CoordinatorServer) -> dict[str, float]:
    sent, received = server.meter.totals()
    return {
        "loop_cpu_s": time.thread_time(),
        "cpu_s": time.process_time(),
        "sent_bytes": sent,
        "received_bytes": received,
    }


async def _until(server: CoordinatorServer, round_: int) -> None:
    while server.head < round_:
        if server.failure is not None:
            raise server.failure
        await asyncio.sleep(LOOK_S)


def main() -> None:
    """`python -m thinwire.node.bench.light.coordinator FOLDER PEERS ROUNDS WARM_UP`."""
    folder, *numbers = sys.argv[1:]
    to_stdout(json.dumps(asyncio.run(measured(Path(folder), *map(int, numbers)))))


if __name__ == "__main__":
    main()
