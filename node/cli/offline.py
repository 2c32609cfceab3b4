"""What `ledger`, `export`, `replay` and `status` do with a state folder in place of a ticket: no server, no
network, and no change to the folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.observe.loss_unit import LossUnit
from ...coordinator.observe.peer_trust import in_ledger
from ...coordinator.observe.run_statistics import RunStatistics
from ...coordinator.protocol.ledger_file import Summary, write_ledger
from ...coordinator.protocol.settings import parse_settings
from ...coordinator.protocol.ticket import PREFIX, SEATS_PREFIX, Ticket
from ...coordinator.protocol.trust.governing import Changing
from ...coordinator.protocol.trust.standing import Standing
from ..states.opening import RunState, open_state
from ..states.words import what_is_here


def state_folder(text: str) -> Path | None:
    """The folder that stands in place of a ticket; None: it is none. Raises ConfigError: it is not here."""
    if text in ("", "-") or text.startswith("@"):
        return None
    path = Path(text)
    try:
        if path.is_dir():
            return path
    except OSError:  # a ticket of several coordinators is longer than a name may be
        return None
    if not text.strip().startswith((PREFIX, SEATS_PREFIX)):
        raise ConfigError(
            f"{text}: no such folder. Pass a ticket or a state folder: thinwire runs lists those here"
        )
    return None


@contextmanager
def telling_what_is_here(ticket: str) -> Iterator[None]:
    """Where the coordinator does not answer, maybe because the run is over: says what this machine has."""
    try:
        yield
    except SwarmUnreachable as e:
        raise SwarmUnreachable(f"{e}\n{what_is_here(Ticket.parse(ticket).run_id, os.environ)}") from e


def save_ledger_of(state: RunState, output: Path) -> Summary:
    """The folder's ledger as a file. Raises ConfigError, LedgerCorrupt."""
    genesis = state.genesis
    if state.record is None or state.signature is None:
        raise AssertionError("a genesis has both")
    return write_ledger(
        output,
        state.record,
        state.signature,
        state.commits(),
        lambda digest: state.blob(digest, genesis.limits.max_payload_bytes),
    )


@contextmanager
def as_file(path: Path) -> Iterator[tuple[RunState, Path]]:
    """The folder's ledger as a file meanwhile."""
    with open_state(path) as state, tempfile.TemporaryDirectory(prefix="thinwire-ledger-") as folder:
        file = Path(folder) / "ledger"
        summary = save_ledger_of(state, file)
        _refuse_incomplete(state, summary)
        yield state, file


def _refuse_incomplete(state: RunState, summary: Summary) -> None:
    if not summary.absent_to:
        return
    raise ConfigError(
        f"{state.folder} has the ledger up to round {state.head}, but payloads of rounds up to "
        f"{summary.absent_to} are not in it: it cannot be replayed from the base weights. thinwire export "
        f"{state.folder} -o DIR gives the newest weights that it holds; thinwire ledger {state.folder} "
        f"-o FILE what there is"
    )


def _loss_unit(state: RunState) -> LossUnit:
    ref = state.genesis.held_out
    unit = parse_settings(state.genesis.config).task.loss_unit
    path = None if ref is None else state.blob_path(ref.digest)
    return LossUnit(unit, path.open("rb") if path is not None and path.is_file() else None)


def status_of(state: RunState) -> dict[str, Any]:
    """The same keys as a coordinator's own status, as far as a ledger tells them; every peer is "gone", or
    "unknown" where somebody is at the run."""
    is_running = state.is_running
    genesis = state.genesis
    changing = Changing(genesis)
    statistics = RunStatistics(sum(prod(entry.shape) for entry in genesis.layout))
    standing = Standing(state.run_id, parse_settings(genesis.config).audits)
    peers: dict[int, str] = {}
    for commit in state.commits():
        body = commit.body
        changing.follow(commit)
        statistics.committed(body)
        standing.committed(body, commit.digest)
        peers.update((a.index, a.peer_id) for a in body.admitted)
        for report in body.reports:
            statistics.fingerprint(report.peer, report.round, report.fingerprint)
        for offer in body.offers:
            statistics.peer(offer.peer).round = body.round
    return {
        "run": state.course.run.name,
        "run_id": state.run_id.hex(),
        "round": state.head,
        "rounds": state.course.n_rounds,
        "changes": changing.told,
        "state": "finished" if state.is_over else "running" if is_running else "stopped",
        "held_out": [list(entry) for entry in state.held_out()],
        "peers": [
            {
                "peer_id": p,
                "index": i,
                "state": "unknown" if is_running else "gone",
                "last_seen_s": None,
                **statistics.peer(i).figures(),
                **in_ledger(standing, i),
            }
            for i, p in sorted(peers.items())
        ],
        "folder": str(state.folder),
        "kind": state.kind,
        **_loss_unit(state).figures(),
        **statistics.figures(),
    }
