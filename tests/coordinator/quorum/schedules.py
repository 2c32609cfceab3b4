"""Generated schedules of a committee's seats. `python -m tests.coordinator.quorum.schedules 10000` runs that
many on all cores, and says the seeds of those with a fault."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Final

from tests.coordinator.quorum.adversary import Adversary
from tests.coordinator.quorum.bugs import BUGS
from tests.coordinator.quorum.misfortunes import Weather
from tests.coordinator.quorum.stand_ins import Fault
from tests.coordinator.quorum.world import Bug, Schedule, World

_CHUNK: Final = 50
_TELL_S: Final = 10.0


def schedule_of(seed: int, *, bug: str | None = None) -> Schedule:
    """Which kind of world a seed stands for: of ten, six are aimed, two hostile, two mild."""
    rng = random.Random(seed)
    is_aimed, is_hostile = seed % 10 < 6, seed % 10 < 8
    if bug == "old_copy" or (is_hostile and rng.random() < 0.5):
        return Schedule(3, 0, is_hostile, is_aimed, changes=False, bug=bug)
    n_seats = rng.choice([3, 3, 1, 5]) if not is_hostile else rng.choice([3, 3, 3, 1])
    restores = n_seats > 1 and rng.random() < 0.3
    return Schedule(n_seats, 2, is_hostile, is_aimed, changes=True, restores=restores, bug=bug)


def run(seed: int, bug: str | None = None) -> Counter[str]:
    """How often what happened. Raises Fault."""
    world = World(seed, schedule_of(seed, bug=bug), BUGS[bug] if bug else Bug())
    if world.schedule.is_aimed:
        adversary = Adversary(world)
        for name in world.names:
            world.boot(name)
        adversary.storm()
        weather = Weather(world)
        weather.carry_on(adversary.flying)
    else:
        weather = Weather(world)
        for name in world.names:
            world.boot(name)
        weather.storm()
    weather.peace()
    return world.happened


def faults(seeds: Iterable[int], bug: str | None = None) -> tuple[dict[int, str], Counter[str]]:
    """The seeds whose worlds have one, and all that happened in the others."""
    found, happened = {}, Counter[str]()
    for seed in seeds:
        try:
            happened += run(seed, bug)
        except Fault as fault:
            found[seed] = str(fault)
    return found, happened


def main(tell: Callable[[str], None]) -> int:
    """1 if a schedule has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--bug", choices=BUGS, help="planted, to see that it is found")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    happened, n_bad, n_done, told_s = Counter[str](), 0, 0, time.monotonic()
    ends = options.first + options.n
    chunks = [range(seed, min(seed + _CHUNK, ends)) for seed in range(options.first, ends, _CHUNK)]
    with ProcessPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(faults, chunk, options.bug): len(chunk) for chunk in chunks}
        for done in as_completed(waiting):
            found, also = done.result()
            happened, n_bad, n_done = happened + also, n_bad + len(found), n_done + waiting[done]
            for seed, fault in found.items():
                tell(f"seed {seed}: {fault}")
            if time.monotonic() > told_s + _TELL_S:
                told_s = time.monotonic()
                tell(f"{n_done} of {options.n} schedules, {n_bad} with a fault")
    tell(f"{n_done} schedules, {n_bad} with a fault; in the others: {dict(happened)}")
    return int(n_bad > 0)


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(_tell))
