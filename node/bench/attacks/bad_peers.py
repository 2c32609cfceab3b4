"""Attacks: what peers that are members like others put into their offers.

A bad peer does the honest work, and sends something else in its place: its frames are well formed, its
membership is real, the contents are not what they say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
from blake3 import blake3
from torch import Tensor, nn

from ....compression import wire
from ....compression.base import Payload
from ....coordinator.protocol.messages import GenesisBody, Offer
from ....optim.base import Closure
from ...genesis import layout_hash
from ...links.base import Link
from ...replica import Replica
from ...tasks.base import Task
from .contents import Contents, ProbeContents, TensorContents, contents_of
from .neighbours import Lie

if TYPE_CHECKING:
    from ...runner import Runner

WAIT_S: Final = 120.0
"""For another peer's payload of the same round."""

Twist = Callable[[Contents, np.random.Generator, Replica], Payload]
"""A function of this module, which other processes find by its name, and at most arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """`twist`: what is sent instead of the honest payload; None: that itself. `copies`: it is taken from an
    honest peer, or from the first bad one, and `altered`: scaled by that before it is sent. `most_samples`:
    as many are claimed as an offer may carry; `own_data`: it is declared to be made from data that others do
    not have; `inverts`: the work is done to raise the loss; `other_data`: honest work on a text of its own.

    `against`: what it is compared with, the same peers sending empty payloads or none that arrive: the former
    where bounds make an attack as good as that, the latter where its peers are left out or found out.
    `strategy`: of one alone, by name; `where_selected`: only where every peer selects its own coefficients;
    `least_bad`: peers that it takes. `identities`: that each bad peer has; `joins_after`: so many rounds;
    `leaves_after`: so many, then its offers never arrive. `lies`: in gossip, to its neighbours.
    """

    twist: Twist | None = None
    copies: Literal["honest", "bad"] | None = None
    altered: float | None = None
    most_samples: bool = False
    own_data: bool = False
    inverts: bool = False
    other_data: bool = False
    against: Literal["empty", "absent"] = "empty"
    strategy: str | None = None
    where_selected: bool = False
    least_bad: int = 1
    identities: int = 1
    joins_after: int = 0
    lies: Lie | None = None
    leaves_after: int | None = None


def _scale(factor: float, contents: Contents, _rng: np.random.Generator, _replica: Replica) -> Payload:
    return contents.scaled(factor)


def _scaled(factor: float) -> Twist:
    return partial(_scale, factor)


def _constant(contents: Contents, _rng: np.random.Generator, _replica: Replica) -> Payload:
    return contents.constant(1e3)


def _not_finite(contents: Contents, _rng: np.random.Generator, _replica: Replica) -> Payload:
    return contents.not_finite()


def _most_probes(contents: Contents, _rng: np.random.Generator, replica: Replica) -> Payload:
    assert isinstance(contents, ProbeContents)
    return contents.most(replica.strategy.option("max_probes"))


def _disjoint(contents: Contents, _rng: np.random.Generator, _replica: Replica) -> Payload:
    assert isinstance(contents, TensorContents)
    return contents.disjoint(1e3)


def _noise(contents: Contents, rng: np.random.Generator, _replica: Replica) -> Payload:
    return contents.random(1e3, rng)


HONEST: Final = Attack()
OTHER_DATA: Final = Attack(other_data=True)
EMPTY: Final = Attack(twist=_scaled(0.0), against="absent")

CONTROL: Final = Attack(leaves_after=1, against="absent")
"""An honest peer for one round: by what its ratio is not 1, others may be by chance."""

ATTACKS: Final[Mapping[str, Attack]] = {
    "control": CONTROL,
    "scaled-10": Attack(twist=_scaled(10.0)),
    "scaled-1e3": Attack(twist=_scaled(1e3)),
    "scaled-1e9": Attack(twist=_scaled(1e9)),
    "random": Attack(twist=_noise),
    "constant": Attack(twist=_constant),
    "disjoint-coordinates": Attack(twist=_disjoint, where_selected=True),
    "nan": Attack(twist=_not_finite, against="absent"),
    "max-probes": Attack(twist=_most_probes, strategy="spsa"),
    "most-samples": Attack(twist=_scaled(1e3), most_samples=True),
    "flipped": Attack(twist=_scaled(-1.0), against="absent"),
    "flipped-1e3": Attack(twist=_scaled(-1e3), against="absent"),
    "flipped-1e9": Attack(twist=_scaled(-1e9), against="absent"),
    "own-data-flipped": Attack(twist=_scaled(-1.0), own_data=True, against="absent"),
    "own-data-random": Attack(twist=_noise, own_data=True),
    "inverted": Attack(inverts=True, against="absent"),
    "copied": Attack(copies="honest", against="absent"),
    "copied-nearly": Attack(copies="honest", altered=1.1, against="absent"),
    "empty": EMPTY,
    "flood": Attack(twist=_scaled(-1e3), against="absent", identities=12, joins_after=12),
    "gossip-flipped": Attack(lies="flipped", against="absent", strategy="gossip"),
    "gossip-1e3": Attack(lies="scaled-1e3", against="absent", strategy="gossip"),
    "gossip-stale": Attack(lies="stale", against="absent", strategy="gossip"),
    "gossip-silent": Attack(lies="silent", against="absent", strategy="gossip"),
    "colluding": Attack(twist=_scaled(-1.0), copies="bad", against="absent", least_bad=2),
}


class Board:
    """Payloads of one swarm in one process, for those who copy: any thread puts, any thread waits."""

    def __init__(self) -> None:
        self._payloads: dict[str, tuple[int, bytes]] = {}
        self._changed = threading.Condition()

    def put(self, peer_id: str, round_: int, payload: bytes) -> None:
        with self._changed:
            self._payloads[peer_id] = (round_, payload)
            self._changed.notify_all()

    def get(self, peer_id: str, round_: int) -> bytes | None:
        """That peer's payload of the round; None: it offers nothing in it, or goes ahead already."""

        def is_there() -> bool:
            return self._payloads.get(peer_id, (0, b""))[0] >= round_

        with self._changed:
            self._changed.wait_for(is_there, WAIT_S)
            its_round, payload = self._payloads.get(peer_id, (0, b""))
            return payload if its_round == round_ else None


class BadPeer:
    """Makes the offers of one bad peer out of honest ones. `victim`: whose payloads it copies, if it does."""

    def __init__(self, attack: Attack, peer_id: str, board: Board, victim: str = "") -> None:
        self._attack, self._peer_id, self._board, self._victim = attack, peer_id, board, victim

    def offer(self, honest: Offer, replica: Replica, genesis: GenesisBody) -> Offer:
        """`replica`: at the round before the offer's."""
        assert honest.payload is not None
        payload = self._payload(honest.payload, honest.round, replica, genesis)
        self._board.put(self._peer_id, honest.round, payload)
        return honest.model_copy(
            update={
                "payload": payload,
                "n_bytes": len(payload),
                "n_samples": genesis.limits.max_samples if self._attack.most_samples else honest.n_samples,
                "own_data": self._attack.own_data,
                "loss": None if honest.loss is None else abs(honest.loss),
            }
        )

    def _payload(self, honest: bytes, round_: int, replica: Replica, genesis: GenesisBody) -> bytes:
        if self._victim and (copied := self._board.get(self._victim, round_)) is not None:
            if self._attack.altered is None or not copied:
                return copied
            return self._twisted(_scaled(self._attack.altered), copied, round_, replica, genesis)
        if self._attack.twist is None or not honest:
            return honest
        return self._twisted(self._attack.twist, honest, round_, replica, genesis)

    def _twisted(
        self, twist: Twist, honest: bytes, round_: int, replica: Replica, genesis: GenesisBody
    ) -> bytes:
        turn, layout = replica.turn(), layout_hash(genesis)
        fields = replica.strategy.fields(turn)
        payload = wire.decode(honest, fields, round_, layout, genesis.limits.max_payload_bytes)
        contents = contents_of(replica.strategy, turn, payload)
        seed = int.from_bytes(blake3(f"{self._peer_id} {round_}".encode()).digest(8), "little")
        rng = np.random.Generator(np.random.Philox(key=seed))
        return wire.encode(twist(contents, rng, replica), fields, round_, layout)


def changed_link(link: Link, change: Callable[[Offer], Offer]) -> Link:
    """The link, but that offers are changed on their way into it."""
    return cast("Link", _ChangedLink(link, change))


class _ChangedLink:
    def __init__(self, link: Link, change: Callable[[Offer], Offer]) -> None:
        self._link, self._change = link, change

    def offer(self, offer: Offer) -> None:
        self._link.offer(self._change(offer))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


def invert(runner: Runner) -> None:
    """From now on the runner works to raise the loss. Before its first round."""
    runner.work.task = cast("Task", Inverted(runner.work.task))


class Inverted:
    """A task whose batches give the loss with the other sign; all else is the task's own."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        closure = self._task.draw(model, seed, rank, ranks)

        def negated() -> Tensor:
            return -closure()

        return negated

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)
