"""Which counted offers are audited, and by whom: drawn from the digest of the commit that counted them.

The digest is known to nobody before the offers are fixed: no peer can steer what it is drawn for. A
coordinator can: it may order the same offers in many ways, at other times, and keep the one that it likes.

Everything is integers, so that any language draws the same. All draws of a round come from one stream of
bytes, BLAKE3's of (run, digest of the commit): the i-th counted offer reads the i-th unsigned 64-bit number,
little-endian, and is drawn if it is below a threshold. Its auditors come from a stream of the target's own.
An audit costs each auditor about the work of one round; so that all audits together take the share `rate` of
the swarm's work, an offer with `a` auditors is drawn with the probability rate / a. Offers of suspects are
drawn with 1 / 10, beyond that share: of newcomers until one audit has passed, and of who has failed one. In
runs that say so the first offers of newcomers are drawn more often: it is the same one audit, only sooner.
In runs with a `Stock` all audits of who is not known come out of that, and the known ones do them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import unpack
from typing import Final, Protocol

from blake3 import blake3

from ..messages import CommitBody
from .stock import Stock

MIN_AUDITORS: Final = 3
"""Fewer prove nothing; a round that has no more peers than these is not audited."""

MAX_AUDITORS: Final = 5
"""Of one offer. With five, two that collude are outvoted by any three."""

SUSPECTS_MILLIONTHS: Final = 100_000
"""How often an offer of a suspect is audited, at least."""

_WHAT: Final = b"thinwire audits\n"


class Known(Protocol):
    """What the ledger says of peers after the commit: `Standing`."""

    def has_worked(self, peer: int) -> bool: ...

    def is_suspect(self, peer: int) -> bool: ...

    def is_fresh(self, peer: int) -> bool: ...

    def is_known(self, peer: int) -> bool: ...

    def is_looked_at(self, peer: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """An offer, by the index of its peer, and who is to do its work again (indices, sorted; an odd number).

    `for_suspects`: to be done only where the replica's own scores say that the target is suspect, which the
    ledger does not know. Then all of the auditors find the same, because replicas are.
    """

    target: int
    auditors: tuple[int, ...]
    for_suspects: bool = False


def audits_of(
    run_id: bytes,
    digest: bytes,
    body: CommitBody,
    standing: Known,
    rate: float,
    own_data_auditors: bool = True,
    newcomers_rate: float = 0.0,
    stock: Stock | None = None,
) -> tuple[Draw, ...]:
    """The audits of this commit's offers, in their order. `digest`: of the commit; `standing`: after it;
    `rate`: share of the swarm's work that goes into audits of those who are no suspects, 0 to 1; 0: none.
    `own_data_auditors`: peers whose offers were made from data of their own are drawn as auditors, too;
    `newcomers_rate`: share that is audited of the first offers of others, where it is more. `stock`: what
    audits of newcomers take their auditors' work from, in rounds that come in order; then newcomers with data
    of their own are drawn as often, and auditors from those who are known. None: in older runs."""
    counted = {o.peer: o.own_data for o in body.offers if o.n_samples > 0}
    targets = [peer for peer in counted if standing.has_worked(peer)]
    able = list(dict.fromkeys(peer for peer in targets if own_data_auditors or not counted[peer]))
    rate_millionths = round(rate * 1_000_000)
    if rate_millionths == 0:
        return ()
    for_fresh = _threshold(round(newcomers_rate * 1_000_000), 1_000_000)
    known = [] if stock is None else [peer for peer in able if standing.is_known(peer)]
    places = _Places(frozenset(able), frozenset(known))
    drawn = list[_Drawn]()
    for peer, number in zip(targets, _numbers(_WHAT + run_id + digest, len(targets)), strict=True):
        n_auditors = places.n_auditors(peer)
        if n_auditors == 0:
            continue
        usual = _threshold(rate_millionths, 1_000_000 * n_auditors)
        most = max(usual, _threshold(SUSPECTS_MILLIONTHS, 1_000_000))
        if standing.is_fresh(peer) and not (counted[peer] and stock is None):
            most = max(most, for_fresh)
        if number < most:
            is_for_suspects = number >= usual and not standing.is_suspect(peer)
            drawn.append(_Drawn(peer, number, n_auditors, is_for_suspects))
    left_out = frozenset[int]() if stock is None else _left_out(drawn, standing, stock, len(known or able))
    key = _WHAT + run_id + digest
    return tuple(
        Draw(d.target, _auditors_of(d, able, known, key), d.for_suspects)
        for d in drawn
        if d.target not in left_out
    )


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An offer whose `number` is small enough."""

    target: int
    number: int
    n_auditors: int
    for_suspects: bool


@dataclass(frozen=True, slots=True)
class _Places:
    """Who can audit, and who of them is known."""

    able: frozenset[int]
    known: frozenset[int]

    def n_auditors(self, peer: int) -> int:
        """Of its offer; 0: too few others can. If some of the others are known they all come from those, or
        as many as there are: of many who are new most may be one."""
        n_others, n_known = (len(peers) - (peer in peers) for peers in (self.able, self.known))
        if n_others < MIN_AUDITORS:
            return 0
        if 0 < n_known < MIN_AUDITORS:
            return MIN_AUDITORS
        return _n_auditors(n_known or n_others)


def _left_out(drawn: Sequence[_Drawn], standing: Known, stock: Stock, n_able: int) -> frozenset[int]:
    """Newcomers who wait for a later round: the stock does not last for all of them, or it is not known yet
    what the last audit of their offers has found. Who was drawn by a smaller number comes first."""
    stock.next_round()
    found = set[int]()
    for d in sorted(drawn, key=lambda d: d.number):
        if not standing.is_known(d.target) and (
            standing.is_looked_at(d.target) or not stock.take(d.n_auditors, n_able)
        ):
            found.add(d.target)
    return frozenset(found)


def _auditors_of(drawn: _Drawn, able: Sequence[int], known: Sequence[int], key: bytes) -> tuple[int, ...]:
    """Sorted."""
    pool, sure = ([p for p in peers if p != drawn.target] for peers in (able, known))
    if len(sure) >= MIN_AUDITORS:
        pool, sure = sure, []
    else:
        pool = [p for p in pool if p not in sure]
    places = _some(len(pool), drawn.n_auditors - len(sure), key + drawn.target.to_bytes(2, "little"))
    return tuple(sorted([*sure, *(pool[j] for j in places)]))


def _n_auditors(n_others: int) -> int:
    """The largest odd number of them, MAX_AUDITORS at most."""
    return min(MAX_AUDITORS, (n_others - 1) // 2 * 2 + 1)


def _threshold(numerator: int, denominator: int) -> int:
    """A 64-bit number is below it with that probability; at most always."""
    return min(2**64, numerator * 2**64 // denominator)


def _numbers(key: bytes, n: int) -> tuple[int, ...]:
    return unpack(f"<{n}Q", blake3(key).digest(8 * n))


def _some(n_peers: int, n: int, key: bytes) -> Iterator[int]:
    """`n` of the numbers below `n_peers`, each as likely as another (but for 2^-54): the first steps of a
    Fisher-Yates shuffle. `moved`: what is no more at its own place."""
    moved = dict[int, int]()
    for i, number in enumerate(_numbers(key, n)):
        j = i + (number * (n_peers - i) >> 64)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
