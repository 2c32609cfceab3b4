"""The coordinator's state directory: one process at a time, and where each thing lies in it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..compression.errors import ConfigError
from .entry.rules import MAX_BYTES as MAX_RULES_BYTES
from .entry.rules import OPEN, EntryRules
from .entry.tickets import ADDRESS_NAME
from .observe.page_history import MAX_SAVED_BYTES
from .protocol.files import KEY_NAMES, FolderLock, remove_asides, write_aside
from .protocol.identity import public_key_of
from .protocol.settings import KEEP_SNAPSHOTS, MAX_KEEP_CHARS, Keep

VOTE_NAME: Final = "vote"
"""Of the file with a seat's votes: the one thing that is not to be copied."""


class StateDir:
    """Locked from the construction to `close`. Raises ConfigError if another process has it."""

    def __init__(self, path: Path) -> None:
        self._lock = FolderLock(path, "coordinator")
        remove_asides(path)
        self.path = path
        self.ledger_path = path / "ledger.db"
        self.blobs_path = path / "blobs"
        self.key_path = path / KEY_NAMES["coordinator"]
        self.is_new = not self.key_path.exists()
        """Nobody has ever voted with what is here: the key is made from now on."""
        self.history_path = path / "history.json"
        self._banned_path, self._keep_path = path / "banned", path / "keep"
        self._rules_path, self._run_file_path = path / "admission", path / "run-file"
        self._asked_rules_path = path / "admission-of-run-file"

    def token(self) -> str:
        """The access token of the run's tickets; made at the first call, mode 0600."""
        path = self.path / "token"
        if not path.exists():
            self.rotate_token()
        return path.read_text("ascii").strip()

    def save_token(self, token: str) -> None:
        """That of a run that another coordinator has begun. Raises OSError."""
        write_aside(self.path / "token", token.encode(), 0o600)

    def forget_votes(self) -> None:
        """This folder is an older copy of itself: what its seat has voted for since, nobody knows."""
        (self.path / VOTE_NAME).unlink(missing_ok=True)

    def rotate_token(self) -> None:
        """Tickets given out so far let no newcomer in any more; who was let in before stays. Raises
        OSError, with nothing changed."""
        self.save_token(secrets.token_urlsafe(24))

    def ban(self, peer_ids: Sequence[str]) -> None:
        """Added to those that are banned already. Raises ConfigError for what is no peer id."""
        for peer_id in peer_ids:
            public_key_of(peer_id)
        self.save_banned(self.banned().union(peer_ids))

    def unban(self, peer_ids: Sequence[str]) -> None:
        """They are let in again."""
        self.save_banned(self.banned().difference(peer_ids))

    def save_banned(self, peer_ids: Iterable[str]) -> None:
        """In the place of those that were. Raises OSError."""
        lines = "".join(f"{peer_id}\n" for peer_id in sorted(peer_ids))
        write_aside(self._banned_path, lines.encode())

    def banned(self) -> frozenset[str]:
        """Peers that are not let in; a line of the file each."""
        if not self._banned_path.exists():
            return frozenset()
        return frozenset(self._banned_path.read_text("ascii").split())

    def port(self) -> int | None:
        """The port of the last start, so that tickets stay valid; None at the first one."""
        path = self.path / "port"
        if not path.exists():
            return None
        try:
            return int(path.read_text("ascii"))
        except ValueError as e:
            raise ConfigError(f"{path} should hold a port number: correct or delete it") from e

    def history(self) -> bytes | None:
        """What the last coordinator saw of the run beside its ledger; None: nothing that is kept."""
        try:
            with self.history_path.open("rb") as file:
                data = file.read(MAX_SAVED_BYTES + 1)
        except OSError:
            return None
        return data if len(data) <= MAX_SAVED_BYTES else None

    def save_history(self, data: bytes) -> None:
        """Raises OSError."""
        write_aside(self.history_path, data)

    def keep(self) -> Keep:
        """What is kept of payloads; as always before anybody chose. Raises ConfigError."""
        try:
            with self._keep_path.open("rb") as file:
                return Keep.parse(file.read(MAX_KEEP_CHARS).decode("ascii", "replace"))
        except FileNotFoundError:
            return KEEP_SNAPSHOTS

    def save_keep(self, text: str) -> None:
        """`text`: as `Keep.parse` takes it. Raises OSError."""
        write_aside(self._keep_path, text.encode())

    def save_run_file(self, digest: bytes, loss_unit: str) -> None:
        """A run file of this digest says the same as record 0. Raises OSError."""
        write_aside(self._run_file_path, f"{digest.hex()} {loss_unit}".encode())

    def loss_unit_of(self, digest: bytes) -> str | None:
        """What `save_run_file` was told of this digest last; None: it was told of another one."""
        try:
            known, _, loss_unit = self._run_file_path.read_text("utf-8").partition(" ")
        except (OSError, ValueError):
            return None
        return loss_unit if known == digest.hex() else None

    def rules(self) -> EntryRules:
        """Who may come in; whoever has a ticket before anybody chose. Raises ConfigError."""
        return _rules_in(self._rules_path) or OPEN

    def save_rules(self, rules: EntryRules) -> None:
        """Raises OSError."""
        write_aside(self._rules_path, rules.to_bytes())

    def start_with_rules(self, asked: EntryRules) -> None:
        """`asked`: by the run file. If it asked for the same at the last start, what an order has said since
        stays: whoever was let in by that is not shut out by a restart. Raises ConfigError and OSError."""
        if _rules_in(self._asked_rules_path) == asked:
            return
        self.save_rules(asked)
        write_aside(self._asked_rules_path, asked.to_bytes())

    def save_address(self, line: str) -> None:
        """`line`: a ticket without a token, see `ticket_for`. Raises OSError."""
        write_aside(self.path / ADDRESS_NAME, line.encode())

    def save_port(self, port: int) -> None:
        """Raises OSError."""
        path, data = self.path / "port", str(port).encode()
        if not (path.exists() and path.read_bytes() == data):  # a full disk keeps nobody from starting again
            write_aside(path, data)

    def close(self) -> None:
        """Gives the lock back."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rules_in(path: Path) -> EntryRules | None:
    """None: there is no such file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return EntryRules.parse(file.read(MAX_RULES_BYTES))
    except FileNotFoundError:
        return None
