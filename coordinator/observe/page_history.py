"""What the page shows of a run's past: its trend, the newest commits, and what happened to peers.

All but what only was measured or seen can be read from the ledger; that is kept in one small file beside it,
so that a restart shows what was there before.
"""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

from ..protocol.figures import mean_loss, printable
from ..protocol.messages import PHASES, Commit, Heartbeat, Phases, Rejected
from .trend import Trend

log = logging.getLogger("thinwire.coordinator")

KEPT_ENTRIES: Final = 32
KEPT_HAPPENINGS: Final = 100
KEPT_DEVICES: Final = 512
CHANGES_SHOWN: Final = 12
MAX_SAVED_BYTES: Final = 2**20
RECENT_ROUNDS: Final = 16
"""Peers' speeds and shares are those of so many rounds."""

TOGETHER_MS: Final = 60_000
"""The same thing again within this time is not told again, but counted."""

HappeningKind = Literal["joined", "left", "lost", "differs", "rejected", "changed", "failed", "condemned"]
_FORMAT: Final = 1
_Work = tuple[int, int, int]
"""Peer, samples, tokens."""


@dataclass(slots=True)
class Entry:
    """A commit. `why` it was closed and `duration_s`: None if only the ledger is left to tell."""

    round: int
    time_ms: int
    n_offers: int
    n_bytes: int
    loss: float | None
    digest: str
    why: str | None = None
    duration_s: float | None = None


@dataclass(slots=True)
class Happening:
    """`n`: how often, the last time at `time_ms`."""

    time_ms: int
    kind: HappeningKind
    text: str
    n: int = 1


class Pace(NamedTuple):
    """What a peer did in the recent rounds; `share` of all samples."""

    tokens_per_s: float | None
    samples_per_s: float | None
    share: float


class PageHistory:
    """Of one run; fed by the service. `rejected`: what was counted by reason, and told, before."""

    def __init__(self, n_params: int, rejected: Mapping[Rejected, int] | None = None) -> None:
        self.trend = Trend(n_params)
        self.entries: deque[Entry] = deque(maxlen=KEPT_ENTRIES)
        self.happenings: deque[Happening] = deque(maxlen=KEPT_HAPPENINGS)
        self.devices: dict[int, str] = {}
        self.offered_ms: dict[int, int] = {}
        """When each peer's newest counted offer was committed."""
        self._recent: deque[tuple[int, list[_Work]]] = deque(maxlen=RECENT_ROUNDS + 1)
        self._beats: dict[int, Heartbeat] = {}
        self._rejected: Counter[Rejected] = Counter(rejected)

    # ------------------------------------------------------------------------------------- what happens

    def committed(self, commit: Commit) -> None:
        """The next commit, live or while the ledger is read."""
        body = commit.body
        self.trend.committed(body)
        self.entries.append(
            Entry(
                round=body.round,
                time_ms=body.time_ms,
                n_offers=len(body.offers),
                n_bytes=sum(o.n_bytes for o in body.offers),
                loss=mean_loss(body),
                digest=commit.digest.hex()[:12],
            )
        )
        self._recent.append((body.time_ms, [(o.peer, o.n_samples, o.n_tokens) for o in body.offers]))
        self.offered_ms.update((o.peer, body.time_ms) for o in body.offers)

    def closed(self, why: str, duration_s: float) -> None:
        """How the newest commit came about."""
        entry = self.entries[-1]
        entry.why, entry.duration_s = why, duration_s
        self.trend.closed(entry.round, duration_s)

    def opened(self, index: int, device: str) -> None:
        """A peer's session; `device`: what it calls it."""
        self.devices.pop(index, None)
        self.devices[index] = printable(device)
        while len(self.devices) > KEPT_DEVICES:
            del self.devices[next(iter(self.devices))]

    def beat(self, index: int, beat: Heartbeat) -> None:
        """What a peer has sent, and how long the parts of its rounds took, since its last heartbeat.

        The first one after a restart, of either side, says nothing about now.
        """
        last, self._beats[index] = self._beats.get(index), beat
        if last is None or beat.sent_bytes < last.sent_bytes:
            return
        if (n_rounds := beat.round - last.round) > 0:
            sent = beat.sent_bytes - last.sent_bytes
            self.trend.spread(beat.round, n_rounds, sent=sent, beaten=n_rounds)
        before, now = last.phases, beat.phases
        if before is None or now is None or now.rounds <= before.rounds:
            return
        sums = {phase: (_ms(now, phase) - _ms(before, phase)) / 1000 for phase in PHASES}
        if min(sums.values()) >= 0:
            n_timed = now.rounds - before.rounds
            self.trend.spread(beat.round, n_timed, phased=n_timed, **sums)

    def happened(self, time_ms: int, kind: HappeningKind, text: str, n: int = 1) -> None:
        """`n`: how often. What has just been told is counted up, and moves to the end."""
        for known in self.happenings:
            if (known.kind, known.text) == (kind, text) and time_ms < known.time_ms + TOGETHER_MS:
                self.happenings.remove(known)
                self.happenings.append(Happening(time_ms, kind, text, known.n + n))
                return
        self.happenings.append(Happening(time_ms, kind, text, n))

    def rejected(self, time_ms: int, so_far: Mapping[Rejected, int]) -> None:
        """Totals by reason, of this process."""
        for reason, n in so_far.items():
            if n > self._rejected[reason]:
                self.happened(time_ms, "rejected", reason, n - self._rejected[reason])
                self._rejected[reason] = n

    def forget_rejected(self, so_far: Mapping[Rejected, int]) -> None:
        """Another process counts, from here."""
        self._rejected = Counter(so_far)

    # ------------------------------------------------------------------------------------ what is shown

    def errors(self) -> list[str]:
        """With which nodes have left, the newest last."""
        return [h.text for h in self.happenings if h.kind == "failed"]

    def changes(self) -> list[str]:
        """What records have changed of the run lately, in words, the newest one last."""
        return [h.text for h in self.happenings if h.kind == "changed"][-CHANGES_SHOWN:]

    def paces(self) -> dict[int, Pace]:
        """Of peers that counted in the recent rounds."""
        if not self._recent:
            return {}
        rounds = list(self._recent)[1:] if len(self._recent) > 1 else list(self._recent)
        seconds = (self._recent[-1][0] - self._recent[0][0]) / 1000
        tokens, samples = Counter[int](), Counter[int]()
        for _, offers in rounds:
            for peer, n_samples, n_tokens in offers:
                samples[peer] += n_samples
                tokens[peer] += n_tokens
        return {
            peer: Pace(
                tokens_per_s=tokens[peer] / seconds if seconds > 0 and tokens[peer] else None,
                samples_per_s=n / seconds if seconds > 0 else None,
                share=n / samples.total(),
            )
            for peer, n in samples.items()
        }

    # ---------------------------------------------------------------------------------------- the file

    def saved(self, run_id: str, traffic: Sequence[Sequence[int]] = ()) -> bytes:
        """What `restore` takes. `traffic`: of the run's statistics."""
        return json.dumps(
            {
                "format": _FORMAT,
                "run_id": run_id,
                "trend": self.trend.saved(),
                "closed": [[e.round, e.digest, e.why, e.duration_s] for e in self.entries if e.why],
                "happenings": [list(asdict(h).values()) for h in self.happenings if h.kind != "changed"],
                "devices": list(self.devices.items()),
                "traffic": [list(row) for row in traffic],
            },
            allow_nan=False,
            separators=(",", ":"),
        ).encode()

    def restore(self, data: bytes, run_id: str) -> list[Any]:
        """After the ledger was read. Another run's file is nothing to us; a damaged one costs its figures.
        Returns the traffic that is kept in it, as it was read."""
        try:
            saved = json.loads(data)
            if saved["format"] != _FORMAT or saved["run_id"] != run_id:
                return []
            closed = {(int(r), str(digest)): (str(why), float(s)) for r, digest, why, s in saved["closed"]}
            happenings = [_happening(*row) for row in saved["happenings"][-KEPT_HAPPENINGS:]]
            devices = {int(i): printable(str(words)) for i, words in saved["devices"][-KEPT_DEVICES:]}
            traffic = list(saved.get("traffic", ()))
            self.trend.restore(saved["trend"])
        except (ValueError, KeyError, TypeError, IndexError) as e:
            log.warning("what the page showed before cannot be read, it begins anew: %s", e)
            return []
        for entry in self.entries:
            entry.why, entry.duration_s = closed.get((entry.round, entry.digest), (None, None))
        # What the ledger says stands there already.
        known = {(h.time_ms, h.kind, h.text): h for h in (*self.happenings, *happenings)}
        in_order = sorted(known.values(), key=lambda h: h.time_ms)
        self.happenings = deque(in_order, maxlen=KEPT_HAPPENINGS)
        self.devices.update(devices)
        return traffic


def _ms(phases: Phases, phase: str) -> int:
    return int(getattr(phases, f"{phase}_ms"))


def _happening(time_ms: Any, kind: Any, text: Any, n: Any) -> Happening:
    if kind not in get_args(HappeningKind):
        raise ValueError(f"{kind!r} does not happen")
    return Happening(int(time_ms), kind, str(text)[:200], int(n))
