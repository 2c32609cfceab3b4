"""The owner's side: an order through the door of a running coordinator, or written by the order itself.

Both need the coordinator's state folder: a ticket never suffices.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError, SwarmUnreachable
from ..entry.guard import guard, rules_of
from ..ledger import Ledger
from ..protocol.files import FolderInUse
from ..protocol.identity import load_or_create, peer_id_of
from ..protocol.messages import AccessEntry, BadMessage, decode_record, digest_of
from ..serving.offerless import Last, offerless
from ..state import StateDir
from .orders import MODES, CheckStrategy, Order, Ordered, Place, plan
from .wire import HEAD, MAX_FRAME, MAX_STATUS, Answer, frame, length, socket_path

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


def status_within(folder: Path) -> dict[str, Any] | None:
    """What the coordinator that runs on this folder says of its run. None: none does, or one of an earlier
    thinwire, which does not say it here. Raises SwarmUnreachable: it does not answer."""
    sock = _connected(folder)
    if sock is None:
        return None
    until_s = time.monotonic() + CONNECT_S
    with sock:
        try:
            sock.sendall(frame(Order(what="status")))
            if _receive(sock, lambda: time.monotonic() > until_s).what != "told":
                return None
            status: dict[str, Any] = json.loads(_body(sock, lambda: time.monotonic() > until_s, MAX_STATUS))
        except (OSError, EOFError, ValueError, BadMessage) as e:
            raise SwarmUnreachable(f"the coordinator of {folder} does not answer: {e or 'it goes'}") from e
    return status


def write_order(folder: Path, order: Order, check: CheckStrategy) -> Answer:
    """Signs and appends a record without a coordinator; of a guarding order, writes what the next one reads.
    Raises as `give_order` does."""
    with StateDir(folder) as state:
        key = load_or_create(state.key_path)
        ledger = Ledger.open(state.ledger_path, key.public_key())
        try:
            last = Last.of(ledger)
            place = Place(ledger.head_round + 1, True, last.course.run.is_over(ledger.head_round))
            if not order.is_guarding:
                ordered = plan(order, last.course, place, check)
            elif last.access is None:
                return Answer(what="done", told=guard(state, order))
            else:
                ordered = _guarded(state, ledger, order, last.access)
            admitted = ledger.pending_admissions()
            body = offerless(ledger, last, admitted=admitted, changes=ordered.changes, access=ordered.access)
            ledger.append(body, key)
        finally:
            ledger.close()
    return Answer(what="done", round=ordered.round, told=ordered.told)


def _guarded(state: StateDir, ledger: Ledger, order: Order, access: AccessEntry) -> Ordered:
    """Where the ledger tells who may come in, a record says what changes. Raises ConfigError."""
    if not ledger.committee.is_only(peer_id_of(load_or_create(state.key_path).public_key())):
        raise ConfigError("several coordinators order this run: start them, and say it to the one that leads")
    told = guard(state, order, access)
    token = digest_of(state.token().encode()) if order.what == "rotate-token" else access.token
    changed = access.model_copy(update={"token": token, "banned": tuple(sorted(state.banned()))})
    if order.what in MODES:
        rules = rules_of(order)
        changed = changed.model_copy(update={"mode": rules.mode, "listed": tuple(sorted(rules.peers))})
    return Ordered(ledger.head_round + 1, told, (), access=changed)


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
    except TimeoutError as e:
        raise SwarmUnreachable("stopped; the order stands: it comes with the round") from e
    except (OSError, EOFError, BadMessage) as e:
        raise SwarmUnreachable(f"the coordinator went away before it answered: {e or 'no bytes'}") from e
    if answer.what == "refused":
        raise ConfigError(answer.text)
    return answer


def _receive(sock: socket.socket, stopped: Callable[[], bool]) -> Answer:
    return decode_record(Answer, _body(sock, stopped))


def _body(sock: socket.socket, stopped: Callable[[], bool], most: int = MAX_FRAME) -> bytes:
    return _exactly(sock, length(_exactly(sock, HEAD.size, stopped), most), stopped)


def _exactly(sock: socket.socket, n_bytes: int, stopped: Callable[[], bool]) -> bytes:
    """A round may take its time: waits until it is stopped. Raises TimeoutError then, OSError, EOFError."""
    data = b""
    sock.settimeout(0.5)
    while len(data) < n_bytes:
        try:
            piece = sock.recv(n_bytes - len(data))
        except TimeoutError:
            if stopped():
                raise TimeoutError("no answer in time") from None
            continue
        if not piece:
            raise EOFError
        data += piece
    return data
