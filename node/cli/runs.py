"""`thinwire runs`: what runs are on this machine, and away with those that nobody needs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...compression.errors import ConfigError
from ..local_runs.cleaning import clean
from ..local_runs.finding import LocalRun, local_runs, places
from ..units import human_bytes, human_loss, human_seconds


def list_runs(folders: Sequence[Path], *, as_json: bool) -> list[LocalRun]:
    """Prints them on stdout and returns them. Raises ConfigError for a folder that is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name state folders, or folders that hold some")
    runs = local_runs(places(folders))
    if as_json:
        print(json.dumps([_plain(run) for run in runs]))  # noqa: T201 - data goes to stdout
        return runs
    now_s = time.time()
    for run in runs:
        print(described(run, now_s))  # noqa: T201 - data goes to stdout
    if not runs:
        where = ", ".join(map(str, places(folders)))
        print(f"no runs in {where}", file=sys.stderr)  # noqa: T201 - for a person
    return runs


def clean_runs(runs: Sequence[LocalRun], *, everything: bool, ask: Callable[[str], bool]) -> None:
    """Removes those that are over, with `everything` also those that could go on; `ask` gives consent. What
    cannot be read stays."""
    idle = [run for run in runs if not run.is_running]
    for run in (run for run in idle if run.error is not None):
        _say(f"{run.folder} stays, it may be no run: remove it by hand")
    chosen = [run for run in idle if run.error is None and (everything or run.is_over)]
    kept = [run for run in idle if run.error is None and run not in chosen]
    if kept:
        _say(f"{_n_runs(len(kept))} not known to be over: kept (--all removes them, too)")
    if not chosen:
        _say("nothing to remove")
        return
    for run in chosen:
        _say(f"remove {run.folder} ({human_bytes(run.n_bytes)})")
    if not ask(f"Remove {_n_runs(len(chosen))}, {human_bytes(sum(r.n_bytes for r in chosen))}?"):
        _say("nothing was removed")
        return
    gone = clean(chosen)
    _say(f"removed {_n_runs(len(gone))}, {human_bytes(sum(run.n_bytes for run in gone))}")


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


def _n_runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - for a person
