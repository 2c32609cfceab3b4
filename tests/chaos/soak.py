"""`make soak SECONDS=120 PEERS=4 EVERY=10 SEED=1 SEATS=1`: real processes, and a fault every so often.

A fifth of the time (10 to 60 s) passes without faults, to have something to compare with; then the seed
chooses. Node 0 is never killed, so that one process lives from the beginning to the end; all else happens to
it. Recovery is measured from the moment that what was broken is there again (the process started, the link
restored) until an offer of the hit peer counts; for a coordinator until the next commit.

With SEATS=3 two of three faults hit the coordinators, mostly the one that leads. What counts then is how long
after the harm the next commit came (`next_commit_*_s`; where all were killed: after they were started again),
and that all ledgers are one (`forks`).

The last line on stdout is one JSON object. `hangs`: no commit for 30 s, or a peer that never
recovered; `ended`: processes that gave up by themselves. Exit 1 if there was any of these, or a mismatch.
Ctrl-C ends it with what it has.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest

from tests.chaos.disk import small_disk
from tests.chaos.faults import EDGE_KINDS, KINDS, Course, Kind, NotHarmed, Until
from tests.chaos.harness import Swarm
from tests.chaos.program import Node
from tests.chaos.seat_faults import LEADER_KILLED, SEAT_KINDS

_BESIDE_SEATS = (*[kind for kind in KINDS if kind.name in ("killed", "frozen", "bit flipped")], *EDGE_KINDS)
"""Nodes have no proxies of their own there."""

DISK_BYTES = 64 * 2**20

SETTINGS = {"strategy.compressor.name": "dct_topk", "strategy.compressor.k": 512}
"""Payloads of 7.5 kB: they travel as blobs, from node to node."""

WORK_S = 0.2
HANG_S = 30.0
"""Without a commit for so long, while a node trains, the swarm hangs."""

SETTLE_S = 60.0
SAMPLE_S = 2.0
LONG_LIVED_S = 30.0


@dataclass
class Fault:
    """One that happened. Times are monotonic seconds; `over_s`: everything was there again."""

    kind: Kind
    node: Node
    course: Course
    until: Until
    began_s: float
    over_s: float | None = None
    recovered_s: float | None = None
    also: Until | None = None
    after: int = 0
    struck: tuple[float, int] | None = None
    """When a coordinator was harmed, and the newest round then."""
    next_commit_s: float | None = None
    """After that."""

    @property
    def name(self) -> str:
        return f"{self.kind.name} ({self.node.name})" if self.kind.hits_node else self.kind.name

    @property
    def recovery_s(self) -> float | None:
        if self.over_s is None or self.recovered_s is None:
            return None
        return self.recovered_s - self.over_s


@dataclass
class Watched:
    """A process: seconds since it began, resident bytes, open files."""

    name: str
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    @property
    def is_long_lived(self) -> bool:
        return len(self.samples) > 1 and self.samples[-1][0] - self.samples[0][0] >= LONG_LIVED_S

    def growth(self, what: int) -> float:
        """The mean of the last quarter over that of the second one: by then it has loaded what it needs."""
        n = max(1, len(self.samples) // 4)
        values = [sample[what] for sample in self.samples]
        return fmean(values[-n:]) / fmean(values[n : 2 * n])


class Soak:
    """`seconds`: reference and faults together; starting, and settling in the end, come on top."""

    def __init__(self, swarm: Swarm, seconds: float, every_s: float) -> None:
        self.has_seats = len(swarm.coordinators.all) > 1
        self.swarm, self.seconds, self.every_s = swarm, seconds, every_s
        self.faults: list[Fault] = []
        self.hangs = self.ended = 0
        self.not_harmed: Counter[str] = Counter()
        self.reference_rate = self.rate = 0.0
        self.first_round = self.reference_round = self.last_round = 0
        self.is_settled = False
        self._bags: tuple[list[Kind], list[Kind]] = ([], [])
        self._n_drawn = 0
        self._watched: dict[int, Watched] = {}
        self._sampled_s = 0.0
        self._committed_s = time.monotonic()

    def run(self) -> None:
        """Returns when all is over; may be interrupted, and asked for a report then."""
        book, began_s = self.swarm.book, time.monotonic()
        self.first_round = self.swarm.head()
        reference_s = min(max(10.0, self.seconds / 5), 60.0)
        self._watch_until(began_s + reference_s)
        self.reference_round = self.last_round = book.head
        self.reference_rate = book.n_offers(self.first_round, book.head) / reference_s
        self._say(f"without faults: {self.reference_rate:.1f} offers counted per second")
        faults_began_s = time.monotonic()
        try:
            while time.monotonic() < began_s + self.seconds:
                self._break_something()
                self._watch_until(min(time.monotonic() + self.every_s, began_s + self.seconds))
        finally:
            self.last_round = book.head
            offers = book.n_offers(self.reference_round, book.head)
            self.rate = offers / (time.monotonic() - faults_began_s)
        self._settle()

    # ------------------------------------------------------------------------------------------- faults

    def _break_something(self) -> None:
        """The next kind, on a node that has nothing to recover from."""
        swarm, open_ = self.swarm, [f for f in self.faults if f.recovered_s is None]
        busy = {f.node.number for f in self.faults if f.recovered_s is None and f.kind.hits_node}
        if any(not f.kind.hits_node for f in open_):
            return
        healthy = [node for node in swarm.nodes if node.number not in busy]
        if len(healthy) < 2:
            self._say("everybody is still recovering: nothing more is broken now")
            return
        kind = self._draw()
        if not self._fits(kind):
            return
        victims = [node for node in healthy if node.number > 0 or not kind.is_lethal]
        if not victims:
            return
        node = swarm.rng.choice(victims)
        fault = Fault(kind, node, kind.course(swarm, node), lambda: True, time.monotonic())
        self.faults.append(fault)
        self._say(f"fault {len(self.faults)}: {fault.name}")
        self._advance(fault)

    def _draw(self) -> Kind:
        """A phase edge every other time; each kind once before any comes again."""
        self._n_drawn += 1
        if self.has_seats:
            which, kinds = int(self._n_drawn % 3 > 0), (_BESIDE_SEATS, SEAT_KINDS)
        else:
            which, kinds = self._n_drawn % 2, (EDGE_KINDS, KINDS)
        bag = self._bags[which]
        if not bag:
            bag += kinds[which]
            self.swarm.rng.shuffle(bag)
        return bag.pop()

    def _fits(self, kind: Kind) -> bool:
        """One that takes nodes waits until all are well; it comes again."""
        if kind.takes_node and any(f.recovered_s is None for f in self.faults):
            self._bags[1].insert(0, kind)
            return False
        return True

    def _advance(self, fault: Fault) -> None:
        """Goes on with a fault as far as it can."""
        try:
            while fault.over_s is None and fault.until():
                fault.until = next(fault.course)
        except StopIteration as stop:
            fault.over_s, fault.also = time.monotonic(), stop.value
            fault.after = self.swarm.head()
        except NotHarmed as e:
            self.swarm.struck = None
            self.not_harmed[fault.kind.name] += 1
            self.faults.remove(fault)
            self._say(f"no harm done by {fault.name}: {e}")
        if self.swarm.struck is not None:
            fault.struck, self.swarm.struck = self.swarm.struck, None

    def _look_for_next_commit(self, fault: Fault) -> None:
        """Of a committee that was harmed."""
        if fault.struck is None or fault.next_commit_s is not None:
            return
        struck_s, head = fault.struck
        if self.swarm.book.head > head:
            from_s = fault.over_s if fault.kind.is_total and fault.over_s is not None else struck_s
            fault.next_commit_s = time.monotonic() - from_s
            self._say(f"the next commit came {fault.next_commit_s:.1f} s after {fault.name}")

    def _look_for_recovery(self, fault: Fault) -> None:
        book = self.swarm.book
        if fault.kind.hits_node:
            done = self.swarm.is_counted(fault.node, fault.after)
        else:
            done = book.head > (fault.after if fault.struck is None else fault.struck[1])
        if done and (fault.also is None or fault.also()):
            fault.recovered_s = time.monotonic()
            self._say(f"recovered in {fault.recovery_s:.1f} s from {fault.name}")

    # ----------------------------------------------------------------------------------------- watching

    def _watch_until(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            self._tick()
            time.sleep(0.05)

    def _tick(self) -> None:
        head = self.swarm.book.head
        if self.swarm.head() > head:
            self._committed_s = time.monotonic()
        for fault in list(self.faults):
            self._look_for_next_commit(fault)
            if fault.over_s is None:
                self._advance(fault)
            elif fault.recovered_s is None:
                self._look_for_recovery(fault)
        self._look_for_hang()
        self._look_for_deaths()
        self._sample()

    def _look_for_hang(self) -> None:
        if time.monotonic() - self._committed_s > HANG_S:
            self.hangs += 1
            self._committed_s = time.monotonic()
            self._say(f"HANG: no commit for {HANG_S:g} s\n{self.swarm.seen(30)}")

    def _look_for_deaths(self) -> None:
        """A program that ended although nobody has killed it is told of, and started again."""
        broken = [f.kind for f in self.faults if f.over_s is None]
        if any(kind.takes_node for kind in broken):
            return
        meant = {f.node.number for f in self.faults if f.over_s is None and f.kind.hits_node}
        for node in self.swarm.nodes:
            if not node.is_running and node.number not in meant:
                self.ended += 1
                self._say(f"{node.name} ENDED by itself with {node.code}:\n{_tail(node.text())}")
                self.swarm.start(node)
        if any(not kind.hits_node for kind in broken):
            return
        for one in self.swarm.coordinators.all:
            if not one.is_running:
                self.ended += 1
                self._say(f"{one.name} ENDED by itself:\n{_tail(one.text())}")
                if self.has_seats:
                    one.begin_again()
                else:
                    self.swarm.start_coordinator(wait=False)

    def _sample(self) -> None:
        now_s = time.monotonic()
        if now_s - self._sampled_s < SAMPLE_S:
            return
        self._sampled_s = now_s
        for program in (*self.swarm.coordinators.all, *self.swarm.nodes):
            for process in program.processes() if program.is_running else ():
                try:
                    sample = (now_s, process.memory_info().rss, process.num_fds())
                    name = f"{program.name} ({process.name()})"
                except psutil.Error:
                    continue
                if sample[1]:  # one that has just ended is still listed
                    self._watched.setdefault(process.pid, Watched(name)).samples.append(sample)

    def _settle(self) -> None:
        """Nothing more is broken: everybody recovers, and in the end all say the same."""
        self._say("no more faults: waiting until everybody trains and agrees")
        end_s = time.monotonic() + SETTLE_S
        while any(f.recovered_s is None for f in self.faults) and time.monotonic() < end_s:
            self._watch_until(time.monotonic() + 0.2)
        for fault in self.faults:
            if fault.recovered_s is None:
                self.hangs += 1
                told = _tail(fault.node.text()) if fault.kind.hits_node else self.swarm.seen(20)
                self._say(f"NEVER RECOVERED from {fault.name}:\n{told}")
        after = self.swarm.head()
        while time.monotonic() < end_s + SETTLE_S and not self.is_settled:
            self._watch_until(time.monotonic() + 0.2)
            self.is_settled = self.swarm.agreed_round(self.swarm.nodes, after) is not None
        heads = self.swarm.book.compare()
        self._say(f"ledgers end at rounds {', '.join(map(str, heads))}")
        if not self.is_settled:
            self._say(f"NOT EVERYBODY agrees in the end\n{self.swarm.seen(8)}")

    # --------------------------------------------------------------------------------------- the results

    def result(self) -> dict[str, Any]:
        """The JSON object of the last line."""
        times_s = sorted(f.recovery_s for f in self.faults if f.recovery_s is not None)
        mismatches = list(self.swarm.book.disagreements())
        for round_, reports in mismatches:
            said = {peer: value.hex() for peer, value in reports.items()}
            self._say(f"MISMATCH after round {round_}: {said}")
        for round_, path in sorted(self.swarm.book.forks):
            self._say(f"FORK at round {round_} in {path}")
        long_lived = [w for w in self._watched.values() if w.is_long_lived]
        return {
            "faults": len(self.faults),
            "rounds": self.last_round - self.first_round,
            "mismatches": len(mismatches),
            "forks": len(self.swarm.book.forks),
            "hangs": self.hangs,
            "ended": self.ended,
            "recovery_p50_s": _quantile(times_s, 0.5),
            "recovery_p99_s": _quantile(times_s, 0.99),
            "recovery_max_s": _quantile(times_s, 1.0),
            "goodput_ratio": round(self.rate / self.reference_rate, 3) if self.reference_rate else None,
            "rss_growth_ratio": round(max((w.growth(1) for w in long_lived), default=1.0), 3),
            "fd_growth_ratio": round(max((w.growth(2) for w in long_lived), default=1.0), 3),
            "peers": len(self.swarm.nodes),
            **self._committee_figures(),
            "agreed_in_the_end": self.is_settled,
        }

    def _committee_figures(self) -> dict[str, Any]:
        """Of faults of several coordinators. `never`: after which no commit came."""
        if not self.has_seats:
            return {}
        struck = [fault for fault in self.faults if fault.struck is not None]
        leaders = [fault for fault in struck if fault.kind is LEADER_KILLED]
        return {
            "seats": len(self.swarm.coordinators.all),
            "leader_kills": len(leaders),
            **_next_commit_figures("next_commit_after_kill", leaders),
            **_next_commit_figures("next_commit", struck),
            "never": sum(fault.next_commit_s is None for fault in struck),
        }

    def table(self) -> Iterator[str]:
        """For people."""
        yield f"{'fault':<28}{'times':>6}{'back':>6}{'p50 s':>8}{'p99 s':>8}{'max s':>8}"
        for name in sorted({f.kind.name for f in self.faults}):
            of_kind = [f for f in self.faults if f.kind.name == name]
            yield _row(name, of_kind)
        yield _row("all", self.faults)
        if self.has_seats:
            yield f"{'next commit after':<28}{'times':>6}{'came':>6}{'p50 s':>8}{'p99 s':>8}{'max s':>8}"
            struck = [fault for fault in self.faults if fault.struck is not None]
            for name in sorted({f.kind.name for f in struck}):
                yield _next_row(name, [f for f in struck if f.kind.name == name])
            yield _next_row("all", struck)
        result = self.result()
        yield f"rounds committed   {result['rounds']}"
        yield f"goodput            {self.rate:.1f} offers/s, {self.reference_rate:.1f} without faults"
        for watched in self._watched.values():
            if watched.is_long_lived:
                first, last = watched.samples[len(watched.samples) // 4], watched.samples[-1]
                yield (
                    f"{watched.name:<24} {first[1] / 2**20:.0f} -> {last[1] / 2**20:.0f} MiB, "
                    f"{first[2]} -> {last[2]} open files in {last[0] - first[0]:.0f} s"
                )
        yield f"mismatches         {result['mismatches']}"
        yield f"forks              {result['forks']}"
        yield f"hangs              {self.hangs}"
        yield f"ended by itself    {self.ended}"
        for name, n in sorted(self.not_harmed.items()):
            yield f"did not come about {name} ({n} times)"

    def _say(self, text: str) -> None:
        stamp = time.strftime("%H:%M:%S")
        sys.stderr.write(f"{stamp} round {self.swarm.book.head}: {text}\n")
        sys.stderr.flush()


def _next_commit_figures(name: str, faults: list[Fault]) -> dict[str, float | None]:
    times_s = sorted(f.next_commit_s for f in faults if f.next_commit_s is not None)
    return {f"{name}_{q}_s": _quantile(times_s, at) for q, at in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def _row(name: str, faults: list[Fault]) -> str:
    return _times_row(name, len(faults), [f.recovery_s for f in faults])


def _next_row(name: str, faults: list[Fault]) -> str:
    return _times_row(name, len(faults), [f.next_commit_s for f in faults])


def _times_row(name: str, n: int, found_s: list[float | None]) -> str:
    times_s = sorted(time_s for time_s in found_s if time_s is not None)
    quantiles = [_quantile(times_s, q) for q in (0.5, 0.99, 1.0)]
    shown = "".join(f"{'-' if q is None else f'{q:.1f}':>8}" for q in quantiles)
    return f"{name:<28}{n:>6}{len(times_s):>6}{shown}"


def _quantile(values: list[float], q: float) -> float | None:
    """The smallest value that at least this part of them does not exceed."""
    if not values:
        return None
    return round(values[max(0, math.ceil(q * len(values)) - 1)], 3)


def _tail(text: str, n_lines: int = 30) -> str:
    return "\n".join(text.splitlines()[-n_lines:])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="reference and faults (default 120)")
    parser.add_argument("--peers", type=int, default=4, help="nodes (default 4)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between faults (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the faults (default 1)")
    parser.add_argument("--seats", type=int, default=1, help="coordinators (default 1)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, ExitStack() as stack:
        swarm = Swarm(
            Path(folder),
            options.peers,
            settings=SETTINGS,
            seed=options.seed,
            proxied=True,
            strings=True,
            work_s=WORK_S,
            n_seats=options.seats,
        )
        if options.seats > 1:
            _make_disks(swarm, stack)
        sys.stderr.write(f"starting {options.peers} peers\n")
        with swarm:
            soak = Soak(swarm, options.seconds, options.every)
            try:
                soak.run()
            except KeyboardInterrupt:
                sys.stderr.write("interrupted: this is what there is\n")
            sys.stderr.write("\n".join(soak.table()) + "\n")
            result = soak.result()
    sys.stdout.write(json.dumps(result) + "\n")
    return int(any(result.get(what) for what in ("mismatches", "forks", "hangs", "ended", "never")))


def _make_disks(swarm: Swarm, stack: ExitStack) -> None:
    """For each coordinator, where this user may mount one."""
    for one in swarm.coordinators.all:
        try:
            swarm.disks[one.number] = stack.enter_context(small_disk(one.state, DISK_BYTES))
        except pytest.skip.Exception as e:
            sys.stderr.write(f"no full disks: {e}\n")
            return


if __name__ == "__main__":
    sys.exit(main())
