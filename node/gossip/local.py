"""`NeighbourLink` of threads in one process. Bytes are counted as if they went over a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from .base import EdgeBytes
from .inbox import Inbox


class LocalBoard:
    """Of one swarm. `is_open`: whether a peer is connected."""

    def __init__(self, is_open: Callable[[str], bool]) -> None:
        self.changed = threading.Condition()
        self.is_open = is_open
        self.peers: dict[str, LocalNeighbours] = {}


class LocalNeighbours:
    """See `NeighbourLink`."""

    def __init__(
        self, board: LocalBoard, me: str, max_bytes: int, count: Callable[[int, int], object]
    ) -> None:
        """`count`: is told of bytes sent and received."""
        self._board, self._me, self._count_bytes = board, me, count
        self.inbox = Inbox()
        self.inbox.max_bytes = max_bytes
        self.last: tuple[int, bytes] | None = None
        self._edges: dict[str, EdgeBytes] = {}
        self._sent_in: dict[int, int] = {}
        with board.changed:
            board.peers[me] = self

    def send(self, round_: int, to: Sequence[str], data: bytes) -> None:
        board = self._board
        with board.changed:
            self.inbox.began(round_, to)
            self.last = round_, data
            for peer in to:
                if (other := board.peers.get(peer)) is not None and board.is_open(peer):
                    self._count(peer, sent=len(data))
                    self._sent_in[round_] = self._sent_in.get(round_, 0) + len(data)
                    other.take(self._me, round_, data)
            board.changed.notify_all()

    def take(self, sender: str, round_: int, data: bytes) -> None:
        """Under the board's lock."""
        refusal = self.inbox.refusal(sender, True, round_, len(data))
        if refusal is not None:
            self.inbox.rejected[refusal] += 1
            return
        self._count(sender, received=len(data))
        self.inbox.put(sender, round_, data)

    def received(self, round_: int, awaited: Collection[str], timeout_s: float) -> list[tuple[str, bytes]]:
        until_s = time.monotonic() + timeout_s
        board = self._board
        with board.changed:
            while board.is_open(self._me) and any(map(board.is_open, self.inbox.missing(round_, awaited))):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                board.changed.wait(min(left_s, 0.2))  # links close without a word to the board
            return self.inbox.of(round_) if board.is_open(self._me) else []

    def latest(self, timeout_s: float) -> list[tuple[int, bytes]]:
        with self._board.changed:
            others = [n for peer, n in sorted(self._board.peers.items()) if peer != self._me]
            found = [n.last for n in others if n.last is not None][:3]
        for _, data in found:
            self._count_bytes(0, len(data))
        return found

    def secret(self, peer: str) -> bytes:
        """Names of threads have no keys: anybody here could know it."""
        return "\n".join(sorted((self._me, peer))).encode()

    def edges(self) -> Mapping[str, EdgeBytes]:
        return dict(self._edges)

    def sent_until(self, round_: int) -> int:
        """Bytes of all messages for the rounds up to that one; what is asked for later is not among them."""
        return sum(n for r, n in list(self._sent_in.items()) if r <= round_)

    def carried(self) -> int:
        return 0

    def rejected(self) -> Mapping[str, int]:
        return {str(why): n for why, n in self.inbox.rejected.items()}

    def _count(self, peer: str, sent: int = 0, received: int = 0) -> None:
        before = self._edges.get(peer, EdgeBytes())
        self._edges[peer] = EdgeBytes(before.sent + sent, before.received + received)
        self._count_bytes(sent, received)
