"""Runs whose state is on this machine: found by their ledgers, read without changing anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from ...compression.errors import ThinwireError
from ...coordinator.protocol.figures import printable
from ...coordinator.protocol.files import is_in_use
from ...coordinator.protocol.ledger_copy import COPY_NAME
from ..snapshots.names import SNAPSHOTS, newest_round
from ..states.opening import BLOBS, RUN_FOLDER, open_state
from ..system.folder import default_folder

MAX_DEPTH: Final = 3
"""Folders below a given one in which states are looked for."""

SHOWN_CHARS: Final = 200
"""Of a text that stands in a ledger."""


@dataclass(frozen=True, slots=True)
class LocalRun:
    """A run's state in `folder`, which belongs to whoever locks `locked`. `run_id`: 16 hex digits; `name`,
    `rounds` and `about` (strategy and task): None where record 0 is not there; `held_out`: round and loss of
    the newest evaluation; `changed_s`: Unix time; `error`: why it cannot be read, or None."""

    kind: Literal["coordinator", "node"]
    folder: Path
    locked: Path
    is_running: bool
    n_bytes: int
    changed_s: float
    run_id: str
    round: int = 0
    name: str | None = None
    rounds: int | None = None
    about: str | None = None
    held_out: tuple[int, float] | None = None
    loss_unit: str = "nats"
    snapshot: int | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        """After its last round."""
        return self.rounds is not None and self.round >= self.rounds


def places(given: Sequence[Path], environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Where to look: the given folders, else the user's state directory, and what coordinators and Ray runs
    have left in the working directory."""
    if given:
        return list(given)
    here = [p for pattern in ("*-coordinator", "*-ray") for p in sorted(Path().glob(pattern))]
    return [default_folder(environ), *here]


def local_runs(folders: Sequence[Path]) -> list[LocalRun]:
    """All runs in these folders, the newest first. What cannot be read is listed with its error. The folder
    of a run says by its own name what it is: links to it, and ".", are followed first."""
    seen: dict[Path, LocalRun] = {}
    for folder in folders:
        for path in _ledgers(folder.resolve(), MAX_DEPTH):
            seen.setdefault(path, _read(path))
    found = sorted(seen.values(), key=lambda run: -run.changed_s)
    return _named(_one_running(found))


def _ledgers(folder: Path, depth: int) -> Iterator[Path]:
    """Of this folder and of those below it; links are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        if entry.name == COPY_NAME and entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        elif depth > 0 and entry.is_dir(follow_symlinks=False) and entry.name not in (BLOBS, SNAPSHOTS):
            yield from _ledgers(Path(entry.path), depth - 1)


def _read(path: Path) -> LocalRun:
    folder = path.parent
    is_coordinator = not RUN_FOLDER.fullmatch(folder.name)
    locked = folder if is_coordinator else folder.parent
    is_running = is_in_use(locked)
    try:
        facts = _facts(folder)
    except (ThinwireError, OSError, ValueError, KeyError, TypeError) as e:
        facts = {"error": printable(str(e), SHOWN_CHARS), "run_id": "" if is_coordinator else folder.name}
    return LocalRun(
        kind="coordinator" if is_coordinator else "node",
        folder=folder,
        locked=locked,
        is_running=is_running,
        n_bytes=size_on_disk(folder),
        changed_s=max(p.stat().st_mtime for p in folder.glob(f"{COPY_NAME}*")),
        snapshot=newest_round(folder),
        **facts,
    )


def _facts(folder: Path) -> dict[str, Any]:
    """What the ledger says. Raises ConfigError and LedgerCorrupt."""
    with open_state(folder) as state:
        held_out = state.held_out()
        facts = {
            "round": state.head,
            "run_id": state.run_id.hex()[:16],
            "held_out": held_out[-1] if held_out else None,
        }
        if state.record is None:  # a node's, of an earlier thinwire
            return facts
        config = json.loads(state.genesis.config)
        about = f"{config['strategy']['name']} on {config['task']['name']}"
        return facts | {
            "name": printable(config["run"]["name"], SHOWN_CHARS),
            "rounds": state.course.n_rounds,
            "about": printable(about, SHOWN_CHARS),
            "loss_unit": state.course.settings.task.loss_unit,
        }


def size_on_disk(folder: Path) -> int:
    """Bytes of the blocks of all files; what goes away meanwhile does not count."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _one_running(runs: Sequence[LocalRun]) -> list[LocalRun]:
    """A node's folder has all its runs and one lock: the one that changed last is what it is at."""
    found: list[LocalRun] = []
    busy: set[Path] = set()
    for run in runs:
        found.append(replace(run, is_running=False) if run.locked in busy else run)
        if run.is_running:
            busy.add(run.locked)
    return found


def _named(runs: Sequence[LocalRun]) -> list[LocalRun]:
    """Nodes of an earlier thinwire kept no record 0: the coordinator on the same machine may have it."""
    known = {run.run_id: run for run in runs if run.name is not None}
    return [
        replace(run, name=(k := known[run.run_id]).name, rounds=k.rounds, about=k.about)
        if run.name is None and run.run_id in known
        else run
        for run in runs
    ]
