"""One rank of a node, as a process: started by `launch`, told what to do by a line of JSON on standard input.

Rank 0 is the node, with its link; the others follow it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ThinwireError
from ..run_node import Options, limit_threads, run_node
from ..system.logs import log_to_stderr
from ..system.processes import end_with_parent
from ..system.stopping import Stop

if TYPE_CHECKING:
    import torch

    from .sharding import Sharding

MEETING: Final = "meeting"
RESULT: Final = "result.json"


@dataclass(frozen=True, slots=True)
class Failure:
    """What a rank leaves behind when it breaks. `is_told`: an error that was raised on purpose, with words
    for the user and an exit code of its own."""

    rank: int
    time_s: float
    text: str
    trace: str
    exit_code: int
    is_told: bool

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What to leave behind of this error."""
        is_told = isinstance(error, ThinwireError)
        return cls(
            rank=rank,
            time_s=time.time(),
            text=str(error) if is_told else f"{type(error).__name__}: {error}",
            trace="".join(traceback.format_exception(error)),
            exit_code=error.exit_code if isinstance(error, ThinwireError) else 1,
            is_told=is_told,
        )

    @classmethod
    def read(cls, folder: Path, rank: int) -> Failure | None:
        """None: the rank has left none."""
        try:
            return cls(**json.loads(_failure_file(folder, rank).read_bytes()))
        except (OSError, ValueError):
            return None

    def write(self, folder: Path) -> None:
        """Whole or not at all: whoever reads may come at any time."""
        path = _failure_file(folder, self.rank)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(path)


def _failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failure-{rank}.json"


def main() -> int:
    """The exit code."""
    end_with_parent()
    parent = os.getppid()
    spec = json.loads(sys.stdin.readline())
    rank, folder, options = spec["rank"], Path(spec["folder"]), Options.from_plain(spec["options"])
    log_to_stderr(spec["log_level"] if rank == 0 else logging.ERROR, f"rank {rank}: " if rank else "")
    try:
        if rank == 0:
            _run_leader(options, folder)
        else:
            _follow(options, rank, folder)
    except BaseException as e:  # noqa: BLE001 - whatever it is, the node's own process tells it
        failure = Failure.of(rank, e)
        if folder.exists():
            failure.write(folder)
        return failure.exit_code
    finally:
        if rank == 0 and os.getppid() != parent:  # nobody else is left to do it
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _run_leader(options: Options, folder: Path) -> None:
    stop = Stop()

    # `launch` has told the user, and ends everything at the second one.
    signal.signal(signal.SIGTERM, lambda number, _frame: stop.request(number))
    if not options.is_sharded:
        _write_result(folder, run_node(options, stop))
        return
    from .leader import Leader, open_channel

    device, sharding = joined(options, 0, folder)
    leaders = [Leader(open_channel(), device, sharding)]

    def leader_in(node_folder: Path) -> Leader:
        leaders[0].folder = node_folder
        return leaders[0]

    try:
        _write_result(folder, run_node(replace(options, device=str(device)), stop, leader_in))
    finally:
        leaders[0].stop()


def _write_result(folder: Path, result: Any) -> None:
    (folder / RESULT).write_text(json.dumps(None if result is None else asdict(result)))


def _follow(options: Options, rank: int, folder: Path) -> None:
    limit_threads(options.threads)
    from .leader import Follower, open_channel

    device, sharding = joined(options, rank, folder)
    follower = Follower(open_channel(), device, sharding, import_path=options.import_path, data=options.data)
    follower.run()


def joined(options: Options, rank: int, folder: Path) -> tuple[torch.device, Sharding]:
    """This process is a rank from now on."""
    import torch

    from .sharding import Sharding, join_node

    ranks = options.ranks or 1
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", rank)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # ranks listen to this machine alone
    join_node(device, rank, ranks, folder / MEETING)
    sharding = Sharding(
        ranks=ranks,
        precision=options.precision,
        activation_checkpointing=options.activation_checkpointing,
        cpu_offload=options.cpu_offload,
    )
    return device, sharding


def run(entry: Callable[[], int]) -> None:
    """Ends the process with what `entry` returns, at once: gloo's threads sometimes end the interpreter by
    SIGABRT when they are torn down."""
    code = entry()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run(main)
