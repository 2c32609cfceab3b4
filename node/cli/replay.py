"""`thinwire replay`: a model from its base weights and a ledger file, by the same `apply` as in training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save as save_safetensors

from ...compression.errors import ConfigError, LedgerCorrupt, ReplicaDiverged
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.ledger_file import LedgerFile, Summary, check, open_ledger
from ...coordinator.protocol.messages import digest_of
from ..batches import batches
from ..config import parse_config
from ..genesis import base_bytes
from ..replica import Replica, build_replica
from ..states.replica import base_path
from ..system.every import Every
from ..tasks.base import Pretrained, Task
from ..tasks.registry import make_task
from .ledger_command import tell_changes
from .offline import as_file

log = logging.getLogger("thinwire.node")

TELL_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Replayed:
    """`fingerprint`: hex, after the last round. `verified`: fingerprints of peers that were the same here;
    `differing`: those that were not, where others were. `seconds`: for the rounds alone."""

    rounds: int
    fingerprint: str
    verified: int
    differing: int
    seconds: float
    rounds_per_second: float
    ledger_bytes: int
    model_bytes: int


def replay(
    path: Path,
    *,
    base: Path | None = None,
    import_path: str | None = None,
    output: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Replayed | None:
    """The model after the ledger's last round; None if `stopped` before. `output` is written in the end only.

    `path`: a ledger file, or a state folder, which may have the base weights, too. Raises LedgerCorrupt (the
    file), ConfigError (base weights, task), Incompatible (another model) and ReplicaDiverged, naming round
    and peers, when no peer that reported on a round had what is here.
    """
    if path.is_dir():
        with as_file(path) as (state, file):
            weights_file = base or base_path(state)
            return replay(file, base=weights_file, import_path=import_path, output=output, stopped=stopped)
    summary = check(path)
    tell_changes(summary)
    if summary.absent_to:
        raise ConfigError(
            f"{path}: payloads of rounds up to {summary.absent_to} were gone when it was saved: it "
            f"cannot be replayed from the base weights. thinwire export TICKET saves what the run has now."
        )
    with open_ledger(path) as ledger:
        replica = _base_replica(ledger, base, import_path)
        found = Fingerprints(replica, summary)
        started_s, telling = time.monotonic(), Every(TELL_EVERY_S)
        for batch in batches(ledger.commits(), replica.strategy, ends=summary.reports):
            replica.apply_batch(batch, ledger.payload)
            found.compare()
            if stopped():
                return None
            if telling.is_due():
                log.info(
                    "round %d of %d, %.1f rounds per second",
                    replica.round,
                    summary.rounds,
                    replica.round / (time.monotonic() - started_s),
                )
        seconds = time.monotonic() - started_s
        if ledger.run_id != summary.run_id or replica.round != summary.rounds:
            raise LedgerCorrupt(f"{path} has changed since it was checked")
    weights = save_safetensors(replica.weights())
    if output is not None:
        _write(output, weights)
    result = Replayed(
        rounds=replica.round,
        fingerprint=replica.fingerprint().hex(),
        verified=found.verified,
        differing=found.differing,
        seconds=seconds,
        rounds_per_second=replica.round / seconds if seconds > 0 else 0.0,
        ledger_bytes=summary.n_bytes,
        model_bytes=len(weights),
    )
    log.info(
        "%d rounds in %.1f s (%.1f rounds per second), %d reported fingerprints verified; "
        "ledger %s bytes, model %s bytes; fingerprint %s",
        result.rounds,
        seconds,
        result.rounds_per_second,
        result.verified,
        f"{result.ledger_bytes:,}",
        f"{result.model_bytes:,}",
        result.fingerprint,
    )
    return result


class Fingerprints:
    """Compares a replica, where it is, with what the peers of a ledger reported."""

    def __init__(self, replica: Replica, summary: Summary) -> None:
        self._replica, self._reports = replica, summary.reports
        self.verified = self.differing = 0

    def compare(self) -> None:
        """Call after every round with reports. One peer that had it right is proof: then who had not was
        wrong by itself.

        Raises ReplicaDiverged when nobody had it.
        """
        round_ = self._replica.round
        reports = self._reports.get(round_)
        if not reports:
            return
        ours = self._replica.fingerprint()
        others = sorted({peer_id for peer_id, theirs in reports if theirs != ours})
        n_same = sum(theirs == ours for _, theirs in reports)
        self.verified += n_same
        if not others:
            return
        text = f"round {round_}: the fingerprint here is {ours.hex()}, not that of {', '.join(others)}"
        if n_same == 0:
            raise ReplicaDiverged(
                f"{text}. Replay on another machine: if it is the same there, those peers were wrong."
            )
        self.differing += len(reports) - n_same
        log.warning("%s; %d other reports agree with it", text, n_same)


def _base_replica(ledger: LedgerFile, base: Path | None, import_path: str | None) -> Replica:
    """Before round 1. Raises ConfigError when the base weights are not those of record 0."""
    body = ledger.genesis
    config = parse_config(body.config)
    task = make_task(config.task, import_path, None)
    replica = build_replica(ledger.run_id, body, task)
    if body.base is None:
        if base is not None:
            raise ConfigError("--base: this run began with an exact initialisation, leave it out")
        data = None
    elif base is None:
        raise ConfigError(
            f"the run began with base weights {body.base.digest.hex()[:16]}: "
            f"give --base FILE{_or_folder(task)}"
        )
    else:
        if base.is_dir() and isinstance(task, Pretrained):
            data = base_bytes(task.base_in(base, replica.model))
        else:
            data = _read(base)
        if digest_of(data) != body.base.digest:
            raise ConfigError(
                f"--base {base}: its digest is {digest_of(data).hex()[:16]}, "
                f"record 0 names {body.base.digest.hex()[:16]}"
            )
    replica.begin(data)
    return replica


def _or_folder(task: Task) -> str:
    return ", or the folder of the model that it began with" if isinstance(task, Pretrained) else ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"--base {path}: {e.strerror}") from e


def _write(path: Path, data: bytes) -> None:
    try:
        write_aside(path, data)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
