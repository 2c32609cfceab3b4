"""A world that goes by the clock: words lost, late, doubled, out of order, one-way cuts, crashes, stops,
disks that fail; and then peace, in which all must come to agree."""

from __future__ import annotations

import heapq
from typing import Final

from tests.coordinator.quorum.oracle import is_well
from tests.coordinator.quorum.stand_ins import Fault
from tests.coordinator.quorum.world import Flying, World
from thinwire.coordinator.quorum.events import Role
from thinwire.coordinator.quorum.words import Word

PEACE_S: Final = 8.0
"""Sixteen times the patience of these seats."""


class Weather:
    """Of one world: it carries the words, and makes time pass."""

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, world.rng
        self.loss, self.late = 0.05, 0.1
        self.eagerness = 0.5
        """Of leaders to propose the next record."""
        self.cut: set[tuple[str, str]] = set()
        self.stopped: set[str] = set()
        self.flying: list[Flying] = []
        world.post = self._post

    def _post(self, sender: str, to: str, word: Word) -> None:
        draw, world = self.rng.random(), self.world
        if (sender, to) in self.cut or to not in world.seats or draw < self.loss:
            return
        is_late = self.rng.random() < self.late
        delay_s = self.rng.uniform(0.05, 1.5) if is_late else self.rng.uniform(0.001, 0.03)
        heapq.heappush(self.flying, Flying(world.now_s + delay_s, self.rng.random(), sender, to, word))
        if self.rng.random() < 0.3 * self.late:
            late_s = world.now_s + self.rng.uniform(0, 2)
            heapq.heappush(self.flying, Flying(late_s, self.rng.random(), sender, to, word))

    def carry_on(self, flying: list[Flying]) -> None:
        """With words of a world without a clock."""
        world = self.world
        world.now_s = max(world.clock(name) for name in world.names)
        for word in flying:
            heapq.heappush(self.flying, word._replace(arrives_s=world.now_s + self.rng.uniform(0, 1)))

    def run_for(self, seconds: float) -> None:
        world = self.world
        end_s = world.now_s + seconds
        while True:
            arrives_s = self.flying[0].arrives_s if self.flying else end_s
            awake = [(seat.wake_s, name) for name, seat in world.seats.items() if name not in self.stopped]
            wakes_s, name = min(awake, default=(end_s, ""))
            world.now_s = max(world.now_s, min(arrives_s, wakes_s, end_s))
            if world.now_s >= end_s:
                return
            if arrives_s <= wakes_s:
                name = self._arrive()
            else:
                world.tick(name)
            if self.rng.random() < self.eagerness:
                world.propose(name)

    def _arrive(self) -> str:
        flying = heapq.heappop(self.flying)
        if flying.to in self.stopped:
            heapq.heappush(self.flying, flying._replace(arrives_s=self.world.now_s + 0.3))
        elif flying.to in self.world.seats and (flying.sender, flying.to) not in self.cut:
            self.world.deliver(flying)
        return flying.to

    def misfortune(self) -> None:
        world, rng, names = self.world, self.rng, self.world.names
        draw, name = rng.random(), rng.choice(names)
        is_hostile = world.schedule.is_hostile
        if is_hostile and draw < 0.4:
            world.crash(name)
            world.boot(name)
            self.stopped.discard(name)
        elif is_hostile and draw < 0.45:
            self._freeze_the_leader()
        elif draw < 0.55 and name in world.seats:
            world.crash(name)
            self.stopped.discard(name)
        elif draw < 0.65 and name not in world.seats:
            world.boot(name)
        elif draw < 0.7 and name in world.seats:
            self.stopped.add(name)
        elif draw < 0.75:
            self.stopped.discard(name)
        elif draw < 0.87:
            share = rng.choice([0.2, 0.6])
            self.cut = {(a, b) for a in names for b in names if a != b and rng.random() < share}
        else:
            self.cut = set()
        self.loss = rng.choice([0.0, 0.05, 0.3])
        world.late_payloads = rng.choice([0.0, 0.0, 0.5])

    def _freeze_the_leader(self) -> None:
        """With what it has proposed on its way."""
        for name, seat in self.world.seats.items():
            if seat.role is Role.LEADING and name not in self.stopped:
                self.world.propose(name)
                self.stopped.add(name)
                return

    def storm(self) -> None:
        """Misfortunes."""
        world, rng = self.world, self.rng
        world.disk_faults = rng.choice([0, 5, 20])
        for _ in range(rng.randint(30, 120) if world.schedule.is_hostile else rng.randint(5, 15)):
            self.run_for(rng.uniform(0.005, 0.1) if world.schedule.is_hostile else rng.uniform(0.05, 1.5))
            self.misfortune()

    def peace(self) -> None:
        """Raises Fault unless all come to agree, and go on. What was sent before may still arrive."""
        world = self.world
        self.cut, self.loss, self.late, self.stopped = set(), 0.0, 0.0, set()
        self.eagerness = 1.0
        world.be_kind()
        for name in world.names:
            if name not in world.seats:
                world.boot(name)
        head = max(disk.head for disk in world.disks.values())
        ends_s = world.now_s + PEACE_S
        while not is_well(world.disks, head):
            if world.now_s >= ends_s:
                raise Fault(f"no progress although all is well: {world.state()}")
            self.run_for(0.25)
        world.oracle.look_at_all(world.disks)
