"""Tickets that are made beside a running coordinator, or without one: from its state folder."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

from ...compression.errors import ConfigError
from ..protocol.identity import load_or_create, peer_id_of
from ..protocol.ticket import MAX_CHARS, Ticket
from ..protocol.trust.invitation import Invitation

ADDRESS_NAME: Final = "address"
"""Of the file that says where the coordinator was reached last, and which run it serves."""


def invite(folder: Path, name: str, uses: int, expires_s: int) -> Ticket:
    """A ticket that lets in so many identities. `expires_s`: seconds since 1970, 0: never.

    Raises ConfigError.
    """
    place = _place(folder)
    key = load_or_create(folder / "key")
    invitation = Invitation.make(key, place.run_id, name, uses, expires_s, secrets.token_bytes(8))
    return place.model_copy(update={"token": invitation.text()})


def ticket_with(folder: Path, token: str) -> Ticket:
    """The run's ticket with this token. Raises ConfigError."""
    return _place(folder).model_copy(update={"token": token})


def _place(folder: Path) -> Ticket:
    """Without a token."""
    if not (folder / "key").is_file() or not (folder / "ledger.db").is_file():
        raise ConfigError(
            f"{folder} is not the state folder of a coordinator: it has no key and ledger. Name the folder "
            f"that the coordinator keeps its run in, on its machine."
        )
    try:
        with (folder / ADDRESS_NAME).open("rb") as file:
            place = Ticket.parse(file.read(MAX_CHARS + 1).decode("ascii", "replace"))
    except OSError as e:
        raise ConfigError(
            f"{folder} does not say where its coordinator is reached ({e.strerror}): start it once, thinwire "
            f"coordinator RUN.toml --state {folder}, and try again"
        ) from e
    if place.peer_id != peer_id_of(load_or_create(folder / "key").public_key()):
        raise ConfigError(
            f"{folder / ADDRESS_NAME} is another coordinator's: start this one once, and try again"
        )
    return place
