"""The owner's side: an order through the door of a running coordinator, or written by the order itself.

Both need the coordinator's state folder: a ticket never suffices.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ...compression.errors import ConfigError, SwarmUnreachable
from ..entry.guard import guard
from ..ledger import Ledger
from ..protocol.files import FolderInUse
from ..protocol.identity import load_or_create
from ..protocol.messages import BadMessage, CommitBody, decode_record
from ..protocol.schedule import lr_factor_bits
from ..protocol.settings import Course
from ..state import StateDir
from .orders import CheckStrategy, Order, Ordered, Place, plan
from .wire import HEAD, Answer, frame, length, socket_path

CONNECT_S: Final = 5.0


def give_order(
    folder: Path,
    order: Order,
    check: CheckStrategy,
    planned: Callable[[Answer], object],
    stopped: Callable[[], bool],
) -> Answer:
    """Through the door if a coordinator runs, else into its ledger under the folder's lock. `planned` is told
    what waits for the open round to close.

    Raises ConfigError (refused; no folder of a coordinator), SwarmUnreachable (it does not answer, or this
    was stopped) or LedgerCorrupt (the key is not the run's).
    """
    if not (folder / "key").is_file() or not (folder / "ledger.db").is_file():
        raise ConfigError(
            f"{folder} is not the state folder of a coordinator: it has no key and ledger. Name the folder "
            f"that the coordinator keeps its run in, on its machine: a ticket does not suffice."
        )
    until_s = time.monotonic() + CONNECT_S
    while (sock := _connected(folder)) is None:
        try:
            return write_order(folder, order, check)
        except FolderInUse:  # by another order, or by a coordinator that starts or ends
            if stopped() or time.monotonic() > until_s:
                raise
            time.sleep(0.1)
    with sock:
        return _ask(sock, order, planned, stopped)


def write_order(folder: Path, order: Order, check: CheckStrategy) -> Answer:
    """Signs and appends a record without a coordinator; of a guarding order, writes what the next one reads.
    Raises as `give_order` does."""
    with StateDir(folder) as state:
        if order.is_guarding:
            return Answer(what="done", told=guard(state, order))
        key = load_or_create(state.key_path)
        ledger = Ledger.open(state.ledger_path, key.public_key())
        try:
            bodies = (commit.body for commit in ledger.all_commits())
            course = Course.of(ledger.genesis.config).after_all(bodies)
            place = Place(ledger.head_round + 1, True, course.run.is_over(ledger.head_round))
            ordered = plan(order, course, place, check)
            ledger.append(_record(ledger, course, ordered), key)
        finally:
            ledger.close()
    return Answer(what="done", round=ordered.round, told=ordered.told)


def _record(ledger: Ledger, course: Course, ordered: Ordered) -> CommitBody:
    after = course.after(ordered.changes)
    return CommitBody(
        round=ordered.round,
        parent=ledger.head_digest,
        offers=(),
        admitted=ledger.pending_admissions(),
        lr_factor_bits=lr_factor_bits(after.settings.schedule, ordered.round + 1, after.n_rounds),
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=time.time_ns() // 10**6,
        changes=ordered.changes,
    )


def _connected(folder: Path) -> socket.socket | None:
    """None: no coordinator listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_S)
    try:
        with socket_path(folder) as path:
            sock.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError as e:
        sock.close()
        raise SwarmUnreachable(f"the coordinator of {folder} cannot be reached: {e}") from e
    return sock


def _ask(
    sock: socket.socket, order: Order, planned: Callable[[Answer], object], stopped: Callable[[], bool]
) -> Answer:
    try:
        with contextlib.suppress(BrokenPipeError):  # it may have refused before, and said why
            sock.sendall(frame(order))
        answer = _receive(sock, stopped)
        if answer.what == "planned":
            planned(answer)
            answer = _receive(sock, stopped)
    except (OSError, EOFError, BadMessage) as e:
        raise SwarmUnreachable(f"the coordinator went away before it answered: {e or 'no bytes'}") from e
    if answer.what == "refused":
        raise ConfigError(answer.text)
    return answer


def _receive(sock: socket.socket, stopped: Callable[[], bool]) -> Answer:
    return decode_record(Answer, _exactly(sock, length(_exactly(sock, HEAD.size, stopped)), stopped))


def _exactly(sock: socket.socket, n_bytes: int, stopped: Callable[[], bool]) -> bytes:
    """A round may take its time: waits until it is stopped."""
    data = b""
    sock.settimeout(0.5)
    while len(data) < n_bytes:
        try:
            piece = sock.recv(n_bytes - len(data))
        except TimeoutError:
            if stopped():
                raise SwarmUnreachable("stopped; the order stands: it comes with the round") from None
            continue
        if not piece:
            raise EOFError
        data += piece
    return data
