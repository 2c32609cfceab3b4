"""`thinwire runs`: what runs are on this machine, and away with those that nobody needs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...compression.errors import ConfigError
from ...coordinator.protocol.figures import counted, human_seconds
from ..local_runs.cleaning import clean
from ..local_runs.finding import LocalRun, local_runs, places
from ..system.output import to_stderr, to_stdout
from ..units import human_bytes, human_loss


def list_runs(folders: Sequence[Path], *, as_json: bool) -> list[LocalRun]:
    """Prints them on stdout and returns them. Raises ConfigError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name state folders, or folders that hold some")
    runs = local_runs(places(folders))
    if as_json:
        to_stdout(json.dumps([_plain(run) for run in runs]))
        return runs
    now_s = time.time()
    for run in runs:
        to_stdout(described(run, now_s))
    if not runs:
        where = ", ".join(map(str, places(folders)))
        to_stderr(f"no runs in {where}")
    return runs


def clean_runs(runs: Sequence[LocalRun], *, everything: bool, ask: Callable[[str], bool]) -> None:
    """Removes those that are over, with `everything` also those that could go on; `ask` gives consent. What
    cannot be read stays."""
    idle = [run for run in runs if not run.is_running]
    for run in (run for run in idle if run.error is not None):
        to_stderr(f"{run.folder} stays, it may be no run: remove it by hand")
    chosen = [run for run in idle if run.error is None and (everything or run.is_over)]
    kept = [run for run in idle if run.error is None and run not in chosen]
    if kept:
        to_stderr(f"{counted(len(kept), 'run')} not known to be over: kept (--all removes them, too)")
    if not chosen:
        to_stderr("nothing to remove")
        return
    for run in chosen:
        to_stderr(f"remove {run.folder} ({human_bytes(run.n_bytes)})")
    if not ask(f"Remove {counted(len(chosen), 'run')}, {human_bytes(sum(r.n_bytes for r in chosen))}?"):
        to_stderr("nothing was removed")
        return
    gone = clean(chosen)
    to_stderr(f"removed {counted(len(gone), 'run')}, {human_bytes(sum(run.n_bytes for run in gone))}")


def described(run: LocalRun, now_s: float) -> str:
    """Two lines for people: what it is and how far, and where."""
    name = run.name or f"run {run.run_id or '?'}"
    if run.error is not None:
        how_far = f"cannot be read: {run.error}"
    else:
        how_far = f"round {run.round}" + (f" of {run.rounds}" if run.rounds is not None else "")
    parts = [name, run.kind, how_far]
    if run.held_out is not None:
        parts.append(f"held-out {human_loss(run.held_out[1], run.loss_unit)}")
    if run.about is not None:
        parts.append(run.about)
    ago = f"{human_seconds(max(0.0, now_s - run.changed_s))} ago"
    state = "running" if run.is_running else f"over, {ago}" if run.is_over else f"stopped {ago}"
    parts += [human_bytes(run.n_bytes), state]
    return f"{', '.join(parts)}\n  {run.folder}"


def _plain(run: LocalRun) -> dict[str, object]:
    plain = {**dataclasses.asdict(run), "folder": str(run.folder.absolute()), "is_over": run.is_over}
    del plain["locked"]
    return plain
