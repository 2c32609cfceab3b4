"""`Link` inside of a Ray cluster: offers and commits as actor calls, blobs through the object store.

The cluster is one domain of trust: a peer is who it says it is, and is named by its actor.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.transport import Transport
from ..links.core import About
from ..links.remote import RemoteLink
from ..links.upload_limit import UploadLimit
from .transport import RayNodeTransport


class RayLink(RemoteLink):
    """See `Link`. The process must be connected to the cluster (`ray.init`, or an actor's); the ticket's
    address names the namespace of the coordinator's actor. The arguments are those of `RemoteLink`."""

    def __init__(
        self,
        ticket: Ticket,
        peer_id: str,
        *,
        run_folder: Path | None = None,
        patience_s: float = 600.0,
        limit: UploadLimit | None = None,
        metrics: Callable[[], bytes] = bytes,
        about: About = About(),  # noqa: B008 - frozen
    ) -> None:
        async def open_transport() -> Transport:
            return RayNodeTransport(peer_id, ticket.peer_id)

        super().__init__(
            ticket,
            peer_id,
            open_transport,
            run_folder=run_folder,
            patience_s=patience_s,
            limit=limit,
            metrics=metrics,
            about=about,
        )
        self.neighbours = None
