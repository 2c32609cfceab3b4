"""`Link` over libp2p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...compression.errors import ConfigError
from ...coordinator.protocol.identity import load_or_create, new_key, peer_id_of
from ...coordinator.protocol.p2p import start_p2p
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.transport import Transport
from ..system.folder import IDENTITY_NAME
from .core import About
from .remote import RemoteLink
from .upload_limit import UploadLimit


class HivemindLink(RemoteLink):
    """See `Link`. `state`: a folder for this node's identity, None for a new one each time; what belongs
    to this run is in a folder of its own in there, `run_folder`.

    `host`, `port`: where other nodes reach this one; `announce`: addresses that they should try first. The
    other arguments are those of `RemoteLink`.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        state: Path | None = None,
        host: str = "0.0.0.0",
        port: int = 0,
        announce: Sequence[str] = (),
        patience_s: float = 600.0,
        limit: UploadLimit | None = None,
        metrics: Callable[[], bytes] = bytes,
        about: About = About(),  # noqa: B008 - frozen
    ) -> None:
        """Raises ConfigError (identity)."""
        key = new_key() if state is None else load_or_create(_made(state) / IDENTITY_NAME)

        async def open_transport() -> Transport:
            return await start_p2p(key, host=host, port=port, announce=tuple(announce))

        super().__init__(
            ticket,
            peer_id_of(key.public_key()),
            open_transport,
            run_folder=None if state is None else _made(state / ticket.run_id.hex()[:16]),
            key=key,
            patience_s=patience_s,
            limit=limit,
            metrics=metrics,
            about=about,
        )


def _made(state: Path) -> Path:
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise ConfigError(f"--state {state}: {e.strerror}") from e
    return state
