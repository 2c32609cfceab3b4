"""A world without a clock: whatever serves to do harm happens next.

Every seat has a clock of its own: one is frozen for as long as it likes, and leads after all have left it.
Which words are slow, and on which links, and how often seats are cut from power, is drawn anew for every
schedule (swarm testing, Groce and others, 2012): in a schedule whose seals, pings or refusals are slow the
windows in which a forgotten promise matters stay open, in one that treats all alike they hardly ever are.
"""

from __future__ import annotations

from typing import Final

from tests.coordinator.quorum.world import Flying, World
from thinwire.coordinator.quorum.words import (
    Aye,
    Batch,
    Canvass,
    Follow,
    Nack,
    Ping,
    Pong,
    Prepare,
    Promise,
    Propose,
    Sealing,
    Voted,
    Word,
)

_ELECTING: Final = (Canvass, Aye, Prepare, Promise)
_KINDS: Final = (Ping, Pong, Canvass, Prepare, Promise, Nack, Propose, Voted, Follow, Batch, Sealing)
_STEPS: Final = 700
_SLOW: Final = 0.04


class Adversary:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self.world, rng = world, world.rng
        self.rng = rng
        self.flying: list[Flying] = []
        self.past: list[Flying] = []
        names = world.names
        self._slow_kinds = {kind for kind in _KINDS if rng.random() < 0.25}
        if rng.random() < 0.6:
            self._slow_kinds |= {Batch, Sealing, Nack, Ping}
        self._slow_links = {(a, b) for a in names for b in names if a != b and rng.random() < 0.15}
        self._loss = rng.choice([0.0, 0.02, 0.2])
        self._reboots = rng.choice([0.0, 0.02, 0.1])
        self._wakes = rng.choice([0.05, 0.15, 0.3])
        self._again = rng.choice([0.0, 0.03, 0.1])
        self._coups = rng.choice([0.0, 0.03, 0.1])
        world.disk_faults = rng.choice([0, 0, 30, 150])
        world.late_payloads = rng.choice([0.0, 0.0, 0.3])
        world.post = self._post

    def _post(self, sender: str, to: str, word: Word) -> None:
        if to in self.world.names and self.rng.random() >= self._loss:
            self.flying.append(Flying(0.0, self.rng.random(), sender, to, word))

    def storm(self) -> None:
        """So many steps, and the words that are still on their way."""
        for _ in range(_STEPS):
            self._step()
        self.world.disk_faults = 0.0

    def _step(self) -> None:
        world, rng = self.world, self.rng
        draw, name = rng.random(), rng.choice(world.names)
        if name not in world.seats:
            if draw < 0.3:
                world.boot(name)
        elif draw < self._reboots:
            world.crash(name)
            if rng.random() < 0.8:
                world.boot(name)
        elif draw < self._reboots + self._wakes or not self.flying:
            self._wake(name)
        elif draw < self._reboots + self._wakes + self._again and self.past:
            self._deliver(rng.choice(self.past))
        elif draw > 1 - self._coups:
            self._coup(name)
        else:
            self._deliver_one()

    def _coup(self, name: str) -> None:
        """A seat is elected by just as many as it needs, whoever leads by now: all other words wait."""
        world, committee = self.world, self.world.disks[name].committee
        others = [seat for seat in committee.seats if seat != name]
        self.rng.shuffle(others)
        others.sort(key=lambda seat: world.disks[seat].head != world.disks[name].head)
        few = {name, *others[: committee.need - 1]}
        for seat in few:
            world.clocks[seat] = world.clock(seat) + 2 * world.timing.patience_s
        self._wake(name)
        for _ in range(4 * len(few)):
            among = [f for f in self.flying if {f.sender, f.to} <= few and isinstance(f.word, _ELECTING)]
            if not among:
                break
            self.flying.remove(among[-1])
            self._keep(among[-1])
            self._deliver(among[-1])
        world.propose(name)

    def _wake(self, name: str) -> None:
        """Its next moment; or a long time in which it has heard nothing."""
        world = self.world
        if name not in world.seats:
            return
        world.clocks[name] = max(world.clock(name), world.seats[name].wake_s)
        if self.rng.random() < 0.3:
            world.clocks[name] += world.timing.patience_s
        world.tick(name)
        world.propose(name)

    def _deliver_one(self) -> None:
        """One of three words, the newest more often than not; a slow one hardly ever."""
        flying, rng = self.flying, self.rng
        for _ in range(3):
            i = (
                rng.randrange(len(flying))
                if rng.random() < 0.5
                else max(0, len(flying) - 1 - rng.randrange(4))
            )
            is_slow = type(flying[i].word) in self._slow_kinds or flying[i][2:4] in self._slow_links
            if not is_slow or rng.random() < _SLOW:
                taken = flying.pop(i)
                self._keep(taken)
                self._deliver(taken)
                return

    def _keep(self, flying: Flying) -> None:
        self.past.append(flying)
        if len(self.past) > 60:
            self.past.pop(self.rng.randrange(60))

    def _deliver(self, flying: Flying) -> None:
        world = self.world
        if flying.to in world.seats:
            world.clocks[flying.to] = world.clock(flying.to) + 0.0005
            world.deliver(flying)
            if self.rng.random() < 0.7:
                world.propose(flying.to)
