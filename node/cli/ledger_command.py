"""`thinwire ledger` and `thinwire export`: what a run has, as files.

Both take a state folder, or a ticket. With a ticket they read over an ordinary session: the reader is
admitted as a peer that joins and never trains, so it takes an index and a place among `limits.max_peers`
while it reads, and nobody waits for it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.figures import counted
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.ledger_file import Summary, check, write_ledger
from ...coordinator.protocol.messages import READER, BlobRef, GenesisBody, Welcome
from ...coordinator.protocol.ticket import Ticket
from .ledger_download import LedgerDownload, incomplete

if TYPE_CHECKING:
    from ..links.base import Link
    from ..replica import Replica
    from ..system.stopping import Stop
    from ..tasks.base import Task

log = logging.getLogger("thinwire.node")

READER_PATIENCE_S = 60.0
MAX_SPANS = 8
"""Of rounds that people are told."""


def save_ledger(ticket: str, output: Path, stop: Stop) -> None:
    """Writes the ledger as it stands when the session opens. Raises what the link and the file raise."""
    with _session(ticket, stop) as (link, welcome):
        if welcome.kept_from > 1:
            log.warning("%s", incomplete(welcome.kept_from))
        with LedgerDownload(link, welcome) as download:
            summary = write_ledger(
                output, welcome.genesis, welcome.signature, download.commits(), download.payload
            )
    _tell_written(output, summary)


def save_ledger_of_state(folder: Path, output: Path) -> None:
    """The same from a state folder. Raises ConfigError, LedgerCorrupt."""
    from ..states.opening import open_state
    from .offline import save_ledger_of

    with open_state(folder) as state:
        summary = save_ledger_of(state, output)
    _tell_written(output, summary)


def check_ledger(path: Path) -> None:
    """Says what the file (or state folder) holds, or raises LedgerCorrupt that names the first bad record."""
    if not path.is_dir():
        _tell_whole(path, check(path))
        return
    from ..states.opening import open_state
    from .offline import save_ledger_of

    with open_state(path) as state, tempfile.TemporaryDirectory(prefix="thinwire-ledger-") as folder:
        _tell_whole(path, save_ledger_of(state, Path(folder) / "ledger"))


def _tell_written(output: Path, summary: Summary) -> None:
    log.info("wrote %s: %s", output, _told(summary))
    tell_changes(summary)


def _tell_whole(path: Path, summary: Summary) -> None:
    log.info("%s is whole: %s", path, _told(summary))
    tell_changes(summary)


def tell_changes(summary: Summary) -> None:
    """A line for each change of the run that its ledger has."""
    for text in summary.changes:
        log.info("the run was changed: %s", text)


def export_state(
    folder: Path, output: Path, import_path: str | None, own: bool = False, merged: bool = False
) -> None:
    """The newest weights of a state folder; `own`: those of the node's own model, not the run's; `merged`:
    see `write_export`. Raises what `newest_replica`, `own_model` and `write_export` raise."""
    from ..states.opening import open_state
    from ..states.replica import blob_of_run, newest_replica, own_model

    with open_state(folder) as state:
        found = own_model(state, import_path) if own else newest_replica(state, import_path)
        write_export(
            output,
            found.replica,
            found.task,
            state.genesis,
            lambda ref: blob_of_run(state, ref, "held-out text, which has the tokenizer"),
            own=own,
            merged=merged,
        )


def export(ticket: str, folder: Path, import_path: str | None, stop: Stop, merged: bool = False) -> None:
    """Weights and what they are, after the newest round: from a snapshot and the ledger, as for a joiner.

    Raises NoStart, and like the link and `write_export`.
    """
    from ..config import parse_config
    from ..replica import build_replica
    from ..tasks.registry import make_task

    with _session(ticket, stop) as (link, welcome):
        config = parse_config(welcome.body.config)
        task = make_task(config.task, import_path, None)
        replica = build_replica(link.run_id, welcome.body, task, link.peer_id)
        if welcome.head_round == 0:
            raise ThinwireError("the run has no round yet: there is nothing to export")
        _catch_up(link, welcome, replica, config.run.snapshot_every)
        write_export(
            folder,
            replica,
            task,
            welcome.body,
            lambda ref: link.fetch(ref.digest, ref.n_bytes),
            merged=merged,
        )


def write_export(
    folder: Path,
    replica: Replica,
    task: Task,
    body: GenesisBody,
    blob: Callable[[BlobRef], bytes],
    own: bool = False,
    merged: bool = False,
) -> None:
    """What `export` writes. `blob`: gives those that record 0 names; `own`: the node's own model; `merged`:
    with adapters in the model's weights, where they stay. Of a node of several ranks: the weights as they
    are, also of a model of transformers. Raises ConfigError if the folder cannot be written, or if nothing
    can be merged."""
    from ..tasks.base import Mergeable, Pretrained

    if merged and not isinstance(task, Mergeable):
        raise ConfigError("--merged: adapters are trained by runs of the task 'hf', and this is none")

    text = about_export(body.config, replica.run_id.hex(), replica.round, replica.fingerprint().hex())
    is_whole = replica.strategy.ranks.count == 1
    tokens = b""
    if isinstance(task, Pretrained) and is_whole and body.held_out is not None:
        tokens = blob(body.held_out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(task, Pretrained) and is_whole:
            with replica.strategy.own_model() if own else replica.strategy.replica():
                write = task.export_merged if merged and isinstance(task, Mergeable) else task.export
                _export_whole(folder, lambda aside: write(replica.model, tokens, aside))
            write_aside(folder / "thinwire.json", text)
        else:
            replica.save_weights(folder / "model.safetensors", own=own)
            write_aside(folder / ("thinwire.json" if isinstance(task, Pretrained) else "config.json"), text)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}") from e
    whose = "this node's own weights" if own else "the weights"
    log.info("wrote %s after round %d to %s", whose, replica.round, folder)
    if not own and replica.strategy.merged(replica.round, replica.course.n_rounds) == 0:
        log.warning(
            "these weights are untrained: the run's peers have models of their own, of which nothing was "
            "merged yet (thinwire export STATE --own gives a node's)"
        )


def about_export(config: str, run_id: str, round_: int, fingerprint: str) -> bytes:
    """JSON: of which run the weights beside it are. `config`: as in record 0; `fingerprint`: in hex."""
    run = json.loads(config)
    about = {
        "run": run["run"]["name"],
        "run_id": run_id,
        "round": round_,
        "fingerprint": fingerprint,
        "config": run,
    }
    return json.dumps(about, indent=2).encode() + b"\n"


def _export_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """What a library writes goes aside first: a full disk leaves no half of it under its own name."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as aside:
        write(Path(aside))
        for path in sorted(Path(aside).iterdir()):
            path.replace(folder / path.name)


def _catch_up(link: Link, welcome: Welcome, replica: Replica, snapshot_every: int) -> None:
    """To the head that is known now."""
    from ..batches import batches
    from ..history import History
    from ..joining import CatchingUp, Joiner
    from ..snapshots.store import SnapshotStore

    with tempfile.TemporaryDirectory(prefix="thinwire-export-") as folder:
        history = History.of(replica, snapshot_every)
        store = SnapshotStore(Path(folder), link.run_id)
        joiner = Joiner(
            link,
            replica,
            store,
            history,
            base=welcome.body.base,
            kept_from=welcome.kept_from,
            stopped=lambda: False,
        )
        joiner.read_ledger()
        joiner.begin()
    catching_up = CatchingUp(replica.round)
    for commits in batches(link.records(replica.round), replica.strategy):
        replica.apply_batch(commits, link.payload)
        catching_up.tell(replica.round, link.head)


@contextmanager
def _session(ticket: str, stop: Stop) -> Iterator[tuple[Link, Welcome]]:
    """Opens a link of a reader and closes it in the end; a signal closes it at once."""
    from ..links.core import About
    from ..links.hivemind import HivemindLink
    from ..links.telling import follow_events
    from .offline import telling_what_is_here

    about = About(agent=READER)
    link = HivemindLink(Ticket.parse(ticket), patience_s=READER_PATIENCE_S, about=about)
    events = follow_events(link)
    # Closing waits for the goodbye: not in the signal handler.
    stop.on_stop.append(lambda: threading.Thread(target=link.close, name="leave", daemon=True).start())
    try:
        with telling_what_is_here(ticket):
            welcome = link.open()
        yield link, welcome
    finally:
        link.close()
        events.join(timeout=5)


def _told(summary: Summary) -> str:
    n_reports = sum(len(entries) for entries in summary.reports.values())
    absent = f" (some of the rounds up to {summary.absent_to} are gone)" if summary.absent_to else ""
    unsigned = ""
    if summary.unsigned:
        spans = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in summary.unsigned[:MAX_SPANS])
        more = ", ..." if len(summary.unsigned) > MAX_SPANS else ""
        unsigned = f"; without signatures that show whose the offers are: rounds {spans}{more}"
    return (
        f"run {summary.run_id.hex()[:16]}, {counted(summary.rounds, 'round')}, "
        f"{counted(summary.n_blobs, 'payload')} beside them{absent}, {counted(n_reports, 'fingerprint')}, "
        f"{summary.n_bytes:,} bytes{unsigned}"
    )
