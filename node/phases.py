"""Where a node's time goes: CPU time of calls on its own objects, by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any


class Stopwatch:
    """Seconds of one thread by phase; what a phase within another one takes is not counted twice.

    By default they are CPU seconds: work that this thread hands to others (torch's own, a GPU's) is not in
    them.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.rounds: list[defaultdict[str, float]] = [defaultdict(float)]
        """Seconds by phase, between one call of `next_round` and the next."""
        self._clock = clock
        self._open: list[str] = []
        self._since_s = 0.0

    def next_round(self) -> None:
        self.rounds.append(defaultdict(float))

    def restart(self) -> None:
        """Forgets all rounds and begins another one."""
        self.rounds[:] = [defaultdict(float)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now_s = self._clock()
        if self._open:
            self.rounds[-1][self._open[-1]] += now_s - self._since_s
        self._since_s = now_s


def time_calls(thing: Any, phases: Mapping[str, str], stopwatch: Stopwatch) -> None:
    """From now on calls of these methods of this one object belong to these phases.

    The object gets a class of its own, under its class's name, so that nobody who has it notices; also one
    with slots, or frozen.
    """
    kind = type(thing)

    def timed(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with stopwatch.phase(phase):
                return method(*args, **options)

        return call

    methods = {name: timed(getattr(kind, name), phase) for name, phase in phases.items()}
    same = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    object.__setattr__(thing, "__class__", type(kind.__name__, (kind,), {**same, **methods}))


def time_compressor(strategy: Any, stopwatch: Stopwatch, decode: str = "decode") -> None:
    """What a strategy's compressor does: packing as "pack", decoding as `decode`, each in all its forms."""
    compressor = getattr(strategy, "compressor", None)
    if compressor is not None:
        packing = dict.fromkeys(("pack", "pack_many", "fused_send"), "pack")
        decoding = dict.fromkeys(("decode", "decode_on", "decode_entries", "fused_update"), decode)
        time_calls(compressor, {**packing, **decoding}, stopwatch)


def typical(stopwatches: list[Stopwatch], phase: str) -> float:
    """Median over all rounds of all stopwatches: compiling kernels in the first round does not count."""
    times = [round_[phase] for watch in stopwatches for round_ in watch.rounds if round_]
    return median(times) if times else 0.0
