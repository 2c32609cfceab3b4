"""Lines of log that peers cause: few a minute, whatever they do, and a count of the rest."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

EVERY_S: Final = 60.0
LINES: Final = 3
"""Of one peer and kind, in EVERY_S."""

LINES_OF_A_KIND: Final = 60
"""Of all peers together, in EVERY_S."""


@dataclass(slots=True)
class _Said:
    since_s: float
    level: int
    n_said: int = 0
    n_quiet: int = 0


class QuietLog:
    """What is beyond a limit is counted, and told once the minute is over: "... and 12 more". `clock`:
    monotonic seconds."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float]) -> None:
        self._log, self._clock = log, clock
        self._said: dict[tuple[str, str], _Said] = {}
        self._kinds: Counter[str] = Counter()
        self._next_s = 0.0

    def say(self, level: int, who: str, kind: str, text: str, *values: object) -> bool:
        """`who`: whom the line is of; `kind`: one of few words; `text`, `values`: as of a logger. False: it
        was only counted."""
        self.flush()
        said = self._entry(who, kind, level)
        if said.n_said >= LINES or self._kinds[kind] >= LINES_OF_A_KIND:
            said.n_quiet += 1
            said.level = max(said.level, level)
            return False
        said.n_said += 1
        self._kinds[kind] += 1
        self._log.log(level, text, *values)
        return True

    def flush(self) -> None:
        """Tells what was counted, if a minute is over."""
        now_s = self._clock()
        if now_s < self._next_s:
            return
        over = {key: said for key, said in self._said.items() if now_s >= said.since_s + EVERY_S}
        for (who, kind), said in over.items():
            del self._said[who, kind]
            if said.n_quiet:
                self._log.log(said.level, "%s: %s: ... and %d more", who or "others", kind, said.n_quiet)
        self._kinds = Counter[str]()
        for (_, kind), said in self._said.items():
            self._kinds[kind] += said.n_said
        self._next_s = min((said.since_s for said in self._said.values()), default=now_s) + EVERY_S

    def _entry(self, who: str, kind: str, level: int) -> _Said:
        """Of its own; where a kind has too many, all further ones share one."""
        known = self._said.get((who, kind))
        if known is not None:
            return known
        key = ("", kind) if self._kinds[kind] >= LINES_OF_A_KIND else (who, kind)
        return self._said.setdefault(key, _Said(self._clock(), level))
