"""The coordinator's end of every connection: does what `stream_server.py` does, one message at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tests.simulation.host import Host
from tests.simulation.peer import End, Wire
from thinwire.compression.errors import ConfigError, SwarmUnreachable, ThinwireError
from thinwire.coordinator.protocol.messages import (
    BadMessage,
    Commit,
    Follow,
    Head,
    Hello,
    Members,
    Message,
    NodeState,
    Notice,
    Offered,
    Refused,
    State,
)
from thinwire.coordinator.service import Service
from thinwire.coordinator.sessions import MAX_QUEUED, MAX_QUEUED_HINTS

IN_FLIGHT = 4
"""Commits that a connection carries at a time."""


class Desk:
    """Sessions by peer id. `adopting`: who gives commits back, and when it was last heard.

    `severed` is called when the host has ended, and all connections with it.
    """

    def __init__(self, folder: Path, severed: Callable[[], None], **run: Any) -> None:
        self._severed = severed
        self._numbers = count(1)
        self.current: dict[str, Wire] = {}
        self.adopting: tuple[Wire, Hello, float] | None = None
        self.host = Host(folder, post=self.post, ended=self._ended, **run)

    def _ended(self) -> None:
        self.adopting = None
        self.current.clear()
        self._severed()

    def post(self, peer_id: str, message: Message) -> None:
        wire = self.current.get(peer_id)
        if wire is None:
            return
        if isinstance(message, Offered) and len(wire.down) >= MAX_QUEUED_HINTS:
            return
        if isinstance(message, Members | Notice):
            old = next((m for m in wire.down if type(m) is type(message)), None)
            if old is not None:
                wire.down.remove(old)
        wire.down.append(message)
        assert len(wire.down) <= MAX_QUEUED + IN_FLIGHT, "what a slow node has to be told grows and grows"

    def deliver_up(self, wire: Wire) -> bool:
        """One message to the coordinator; False: there is none, or another node gives commits back."""
        if self.host.service is None or wire.is_closed or not wire.up:
            return False
        if isinstance(wire.up[0], Hello) and self.adopting is not None:
            return False
        message = wire.up.popleft()
        if isinstance(message, End):
            self.close(wire)
            return True
        self.host.call(lambda service: None)  # what is due by now comes first, as in the server
        try:
            self._hand_over(wire, message)
        except ThinwireError as e:
            self._refuse(wire, e)
        return True

    def _refuse(self, wire: Wire, error: ThinwireError) -> None:
        wire.down.append(Refused.of(error))
        self.close(wire)

    def _hand_over(self, wire: Wire, message: Message) -> None:
        name, number = wire.peer.name, wire.number
        if isinstance(message, Hello):
            self._hello(wire, message)
        elif self.adopting is not None and self.adopting[0] is wire:
            self._take_back(wire, message)
        elif self.current.get(name) is wire and wire.is_ending:
            pass  # nobody answers any more
        elif isinstance(message, Follow):
            wire.follows = message.after
        else:
            if self.current.get(name) is wire:
                self.host.foresee(name, message)
            self.host.call(lambda service: service.receive(name, number, message, self.host.now_s))
            if (
                isinstance(message, State)
                and message.state is NodeState.LEAVING
                and self.host.service is not None
            ):
                wire.down.append(Head(round=self.host.service.head))

    def _hello(self, wire: Wire, hello: Hello) -> None:
        assert self.host.service is not None
        if not hello.is_ahead_of(self.host.service.head):
            self._open(wire, hello)
            return
        self.host.service.hold()
        self.adopting = wire, hello, self.host.now_s
        self.host.is_adopting, self.host.n_adopted = True, 0
        wire.down.append(Follow(after=self.host.service.head))

    def _take_back(self, wire: Wire, message: Message) -> None:
        """As `coordinator/adoption.py` does, one commit at a time."""
        assert self.adopting is not None
        hello = self.adopting[1]
        self.adopting = wire, hello, self.host.now_s
        if not isinstance(message, Commit):
            raise BadMessage(f"a Commit is expected, not {type(message).__name__}")

        def adopt(service: Service) -> None:
            self.host.spark()
            service.adopt([message])
            self.host.spark()

        self.host.call(adopt)
        for other in self.current.values():
            if not other.is_ending:
                other.down.extend([Refused.of(SwarmUnreachable("commits came back")), End()])
                other.is_ending = True
        if self.host.service is not None and not hello.is_ahead_of(self.host.service.head):
            self._go_on()
            self._open(wire, hello)

    def _go_on(self) -> None:
        self.adopting, self.host.is_adopting = None, False
        if self.host.n_adopted:
            self.host.needed_after.clear()
            self.host.oracle.restarted(list(self.host.ledger.all_commits()))
        self.host.call(lambda service: service.go_on(self.host.now_s))

    def _open(self, wire: Wire, hello: Hello) -> None:
        name = wire.peer.name

        def open_(service: Service) -> None:
            number = next(self._numbers)
            welcome = service.open(name, number, hello, self.host.now_s)
            old = self.current.get(name)
            if old is not None and not old.is_ending:
                old.down.extend([Refused.of(ConfigError("replaced")), End()])
                old.is_ending = True
            wire.number = number
            self.current[name] = wire
            self.host.needed_after[name] = welcome.kept_from - 1
            wire.down.append(welcome)

        self.host.call(open_)

    def close(self, wire: Wire) -> None:
        wire.is_closed = True
        wire.down.append(End())
        if self.adopting is not None and self.adopting[0] is wire:
            self._go_on()
        if self.current.get(wire.peer.name) is wire:
            del self.current[wire.peer.name]
        if wire.number:
            self.host.call(lambda service: service.closed(wire.peer.name, wire.number, self.host.now_s))

    def pump(self, wire: Wire) -> None:
        """Commits leave the coordinator while there is room on the way."""
        if self.host.service is None or wire.follows is None or self.current.get(wire.peer.name) is not wire:
            return
        room = IN_FLIGHT - len(wire.down)
        for commit in self.host.service.commits(wire.follows, max(room, 0)):
            wire.down.append(commit)
            wire.follows += 1

    def deliver_upload(self, wire: Wire) -> bool:
        """A payload arrives on a stream of its own; False: there is none."""
        if self.host.service is None or not wire.uploads:
            return False
        digest, payload = wire.uploads.popleft()

        def upload(service: Service) -> None:
            if digest not in self.host.blobs:
                service.may_store(wire.peer.name, len(payload))
                writer = self.host.blobs.writer(digest)
                self.host.half_written = writer
                writer.write(payload[:1000])
                self.host.spark()
                writer.write(payload[1000:])
                writer.finish()
                self.host.half_written = None
            self.host.spark()
            self.host.oracle.used(digest)
            self.host.oracle.tally.arrived(digest, len(payload))
            service.blob_arrived(wire.peer.name, digest, self.host.now_s)

        with contextlib.suppress(BadMessage):  # the node is told that its payload is not taken
            self.host.call(upload)
        return True
