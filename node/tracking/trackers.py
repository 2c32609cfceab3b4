"""The log of a node's run, for people's own tools: JSONL always, TensorBoard and W&B where asked for.

An entry is a flat dict: `time` (seconds since 1970), `kind`, `round`, and figures by name. Kinds: `start`,
`round` (one for each live round; one for many while catching up), `held_out`, `evaluation`, `replay`, `end`.
A tracker that fails never stops training: that is said once, and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from ...compression.errors import ConfigError
from .jsonl import JsonLines
from .metrics import NodeMetrics, TrackerName

log = logging.getLogger("thinwire.node")

OPTIONAL: Final[tuple[TrackerName, ...]] = ("tensorboard", "wandb")
"""What --track may say: packages, and extras of thinwire of the same name."""

_WAITING: Final = 1000
"""Entries that a slow tracker may lag behind by; then it loses some."""

_END_S: Final = 10.0

LogEntry = Mapping[str, Any]


class Tracker(Protocol):
    """Takes entries in order, from one thread. May raise whatever it likes."""

    @property
    def name(self) -> TrackerName: ...

    def track(self, entry: LogEntry) -> None: ...

    def close(self) -> None: ...


def refuse_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ConfigError for a tracker that there is not, or whose package is not installed."""
    for name in names:
        if name not in OPTIONAL:
            raise ConfigError(f"--track {name}: known are {', '.join(OPTIONAL)}; JSONL is always written")
        if find_spec(name) is None:
            raise ConfigError(f"--track {name} needs the package {name}: pip install 'thinwire[{name}]'")


def open_tracks(names: Sequence[TrackerName], folder: Path | None, metrics: NodeMetrics) -> Tracks:
    """`folder`: the node's, of this run; None: nothing is kept, so there is no JSONL."""
    if folder is None:
        return Tracks(metrics)
    made: dict[TrackerName, Callable[[], Tracker]] = {
        "tensorboard": lambda: _tensorboard(folder / "tensorboard"),
        "wandb": lambda: _wandb(folder),
    }
    others = [InBackground(name, made[name], metrics) for name in dict.fromkeys(names)]
    return Tracks(metrics, JsonLines(folder), others)


class Tracks:
    """All trackers of a node. For one thread."""

    def __init__(
        self, metrics: NodeMetrics, file: Tracker | None = None, others: Sequence[InBackground] = ()
    ) -> None:
        """`file` is written at once, so that nothing is lost with the process; the others when they can."""
        self._file = None if file is None else _Guarded(file.name, lambda: file, metrics)
        self._others = others

    def add(self, kind: str, round: int, **figures: Any) -> None:
        entry = {"time": time.time(), "kind": kind, "round": round, **figures}
        if self._file is not None:
            self._file.track(entry)
        for other in self._others:
            other.add(entry)

    def close(self) -> None:
        """Waits for the slow ones for a while."""
        if self._file is not None:
            self._file.close()
        for other in self._others:
            other.close()


class _Guarded:
    """A tracker that may fail; it is made when its first entry comes."""

    def __init__(self, name: TrackerName, make: Callable[[], Tracker], metrics: NodeMetrics) -> None:
        self._name, self._make, self._metrics = name, make, metrics
        self._tracker: Tracker | None = None
        self._has_failed = False

    def track(self, entry: LogEntry) -> None:
        try:
            if self._tracker is None:
                self._tracker = self._make()
            self._tracker.track(entry)
        except Exception as e:  # noqa: BLE001 - foreign code that writes for people: training goes on without
            self.failed(f"{type(e).__name__}: {e}")

    def failed(self, why: str) -> None:
        self._metrics.not_tracked(self._name)
        if not self._has_failed:
            log.warning("%s misses records of this run, training goes on: %s", self._name, why)
        self._has_failed = True

    def close(self) -> None:
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as e:  # noqa: BLE001 - as above
            log.warning("%s could not be ended: %s: %s", self._name, type(e).__name__, e)


class InBackground:
    """A tracker in a thread of its own: one that waits for a network holds nobody up."""

    def __init__(self, name: TrackerName, make: Callable[[], Tracker], metrics: NodeMetrics) -> None:
        self._name = name
        self._guarded = _Guarded(name, make, metrics)
        self._entries: queue.Queue[LogEntry | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self._thread.start()

    def add(self, entry: LogEntry) -> None:
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._guarded.failed(f"it is {_WAITING} records behind")

    def close(self) -> None:
        with suppress(queue.Full):
            self._entries.put(None, timeout=_END_S)
        self._thread.join(_END_S)
        if self._thread.is_alive():
            log.warning("%s has not taken all records within %g s: they are lost", self._name, _END_S)

    def _run(self) -> None:
        while (entry := self._entries.get()) is not None:
            self._guarded.track(entry)
        self._guarded.close()


def _tensorboard(folder: Path) -> Tracker:
    from .tensorboard import TensorBoard

    return TensorBoard(folder)


def _wandb(folder: Path) -> Tracker:
    from .wandb import WeightsAndBiases

    return WeightsAndBiases(folder)
