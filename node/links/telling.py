"""What a link waits for, told in the log."""

from __future__ import annotations

import logging
import threading

from .base import Link

log = logging.getLogger("thinwire.node")


def follow_events(link: Link) -> threading.Thread:
    """Until the link is closed."""

    def pump() -> None:
        for event in link.events():
            log.log(logging.WARNING if event.warning else logging.INFO, "%s", event.text)

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    return thread
