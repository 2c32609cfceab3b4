"""Neighbours of a swarm in one process: a board on which everybody leaves its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from thinwire.optim.gossip.neighbours import Exchange


@dataclass
class Board:
    """`peers`: by their numbers; who is not `absent` trains now, and its offers of rounds that it has not
    `missed` were counted. `lost`: (sender, receiver, round) -> that message does not arrive. `changed`: what
    arrives in place of a message."""

    peers: list[str]
    lost: Callable[[str, str, int], bool] = lambda sender, receiver, round_: False
    changed: Callable[[str, bytes], bytes] = lambda sender, data: data
    absent: set[str] = field(default_factory=set)
    missed: set[tuple[str, int]] = field(default_factory=set)
    posts: dict[str, dict[int, tuple[list[str], bytes]]] = field(default_factory=dict)
    """By sender and round."""
    n_messages: int = 0

    def of(self, me: str) -> OnBoard:
        return OnBoard(self, me)


@dataclass
class OnBoard:
    """One peer's `Neighbours`."""

    board: Board
    me: str

    def peers(self, round_: int) -> Mapping[str, int]:
        board = self.board
        here = {peer: number for number, peer in enumerate(board.peers) if peer not in board.absent}
        return {peer: number for peer, number in here.items() if (peer, round_) not in board.missed}

    def exchange(self, round_: int, with_: Sequence[str], data: bytes) -> Exchange:
        self.board.posts.setdefault(self.me, {})[round_] = list(with_), data
        self.board.n_messages += len(with_)
        return _OnBoard(self, round_, list(with_))

    def secret(self, peer: str) -> bytes:
        return "\n".join(sorted((self.me, peer))).encode()

    def borrow(self) -> list[tuple[int, bytes]]:
        others = sorted(self.board.posts.keys() - {self.me})
        latest = [max(self.board.posts[peer].items()) for peer in others]
        return [(round_, data) for round_, (_, data) in latest]


@dataclass
class _OnBoard:
    neighbours: OnBoard
    round: int
    with_: list[str]

    def received(self) -> list[tuple[str, bytes]]:
        board, me = self.neighbours.board, self.neighbours.me
        found = []
        for peer in self.with_:
            to, data = board.posts.get(peer, {}).get(self.round, ([], b""))
            if me in to and not board.lost(peer, me, self.round):
                found.append((peer, board.changed(peer, data)))
        return found
