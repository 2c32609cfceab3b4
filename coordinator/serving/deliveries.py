"""Whether those who were to give payloads gave them: who did not get one comes here for it.

A line may be narrower than it seemed, an address one that nobody reaches, a peer one that gives nothing. Of
whom more than half of the copies of a round were asked for here, by two peers at least, and of all others at
most a quarter, has nothing to give for a while, twice as long each time. Nobody can bring that about alone;
where all lines are slow nobody is to blame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

FIRST_ROUNDS, LAST_ROUNDS = 4, 256

MOST_COPIES: Final = 2**16
"""That are followed in a round."""


class _Round:
    """`sources`: of each payload, by who gets it; `n_told`: copies that each is to give; `askers`: for each,
    who has asked here instead, as often."""

    def __init__(self) -> None:
        self.sources: dict[bytes, dict[str, str]] = {}
        self.holders: dict[bytes, tuple[int, set[str]]] = {}
        """Bytes of each payload, and who gives it."""
        self.n_told: defaultdict[str, int] = defaultdict(int)
        self.askers: defaultdict[str, list[str]] = defaultdict(list)
        self.n_copies = 0

    def failed(self) -> set[str]:
        """Who did not give most of what it was to, where others did."""
        n_asked = sum(map(len, self.askers.values()))
        return {source for source, asked in self.askers.items() if self._is_alone(source, asked, n_asked)}

    def _is_alone(self, source: str, asked: Sequence[str], n_asked: int) -> bool:
        of_others, n_others = n_asked - len(asked), self.n_copies - self.n_told[source]
        is_bad = 2 * len(asked) > self.n_told[source] and len(set(asked)) > 1
        return is_bad and 0 < n_others >= 4 * of_others


class Deliveries:
    """Of a coordinator. Peers ask after the commit of a round, so that each is judged at the end of the next
    one."""

    def __init__(self) -> None:
        self._now, self._before = _Round(), _Round()
        self._n_rounds = 0
        self._rests: dict[str, tuple[int, int]] = {}
        """Until which round, and for how many."""

    def told(self, digest: bytes, sources: Mapping[str, str], n_bytes: int, maker: str | None) -> None:
        """From whom each of these peers gets the payload. `maker`: if others reach it."""
        if self._now.n_copies + len(sources) <= MOST_COPIES:
            self._now.n_copies += len(sources)
            self._now.sources.setdefault(digest, {}).update(sources)
            _, holders = self._now.holders.setdefault(digest, (n_bytes, set()))
            holders.update(sources.values() if maker is None else (maker, *sources.values()))
            for source in sources.values():
                self._now.n_told[source] += 1

    def asked(self, peer: str, digest: bytes) -> None:
        """It asks for the payload here."""
        for round_ in (self._now, self._before):
            source = round_.sources.get(digest, {}).pop(peer, None)
            if source is not None:
                round_.askers[source].append(peer)

    def named(self, peer: str, digest: bytes, holder: str) -> None:
        """It has asked, and was told to get the payload there."""
        for round_ in (self._now, self._before):
            if digest in round_.sources and round_.n_copies < MOST_COPIES:
                round_.sources[digest][peer] = holder
                round_.n_told[holder] += 1
                round_.n_copies += 1
                return

    def holders(self, digest: bytes) -> tuple[int, set[str]]:
        """The payload's bytes, and who has it and was asked for in vain by nobody lately."""
        rounds = (self._now, self._before)
        n_bytes, holders = next((r.holders[digest] for r in rounds if digest in r.holders), (0, set[str]()))
        return n_bytes, {holder for holder in holders if not any(r.askers.get(holder) for r in rounds)}

    def next_round(self) -> None:
        """The open one is over."""
        self._n_rounds += 1
        failed = self._before.failed()
        for source in self._before.n_told:
            if self.rests(source):  # it was told before it had to
                continue
            _, last = self._rests.pop(source, (0, FIRST_ROUNDS // 2))
            if source in failed:
                n_rounds = min(2 * last, LAST_ROUNDS)
                self._rests[source] = self._n_rounds + n_rounds, n_rounds
        self._now, self._before = _Round(), self._now

    def rests(self, peer: str) -> bool:
        """Whether it is to give nothing for now."""
        return self._n_rounds < self._rests.get(peer, (0, 0))[0]
