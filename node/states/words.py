"""What people are told of a state folder: where the weights are, and the next command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..result import Result
from ..snapshots.names import newest_round
from ..units import human_loss
from .opening import Remains, remains_in, remains_of


def next_step(remains: Remains) -> str:
    """For a run whose coordinator does not answer."""
    how = "the run is over after" if remains.is_over else "this machine has the run up to"
    return f"{how} round {remains.head}; next: thinwire export {remains.folder} -o weights (asks nobody)"


def what_is_here(run_id: bytes, environ: Mapping[str, str], folder: Path | None = None) -> str:
    """What this machine has of a run, in `folder` or else in this user's default ones."""
    remains = remains_in(folder) if folder is not None else remains_of(run_id, environ)
    if remains is None:
        return (
            "If the run is over: thinwire export STATE_FOLDER -o DIR (and ledger, replay, status) read a "
            "node's or the coordinator's state folder, without a server"
        )
    return next_step(remains)


def over(result: Result, folder: Path | None) -> str:
    """A node's last line, with the held-out loss that it measured last."""
    loss = ""
    if result.held_out:
        round_, value = result.held_out[-1]
        told = human_loss(value, result.loss_unit, result.bytes_per_token)
        loss = f", held-out loss {told} at round {round_}"
    end = f"{loss}, fingerprint {result.fingerprint}{_where(folder)}"
    return f"the run is over after round {result.rounds}{end}"


def left(folder: Path | None) -> str:
    """The last line of a node that was stopped before the run's end."""
    saved = None if folder is None else newest_round(folder)
    if folder is None or saved is None:
        return "left the run; nothing was saved. The same thinwire join command joins again"
    return (
        f"left the run; the replica after round {saved} and this node's own state are saved in {folder}. The "
        f"same thinwire join command (--state {folder.parent}) goes on from there; thinwire export {folder} "
        f"-o weights saves the weights as they are"
    )


def _where(folder: Path | None) -> str:
    if folder is None or newest_round(folder) is None:
        return ""
    return f". The weights are in {folder}; next: thinwire export {folder} -o weights"
