"""What must hold of a run, worked out a second time from what was delivered and from what is on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from blake3 import blake3

from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.protocol.attested import Attested, Snapshots
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.messages import Commit, CommitBody, Offer, OfferEntry, Report, digest_of
from thinwire.coordinator.protocol.trust.standing import Standing
from thinwire.coordinator.reports import PER_COMMIT
from thinwire.coordinator.retention import LATE_ROUNDS


def first_state(run_id: bytes) -> bytes:
    """A replica before round 1."""
    return digest_of(b"base weights" + run_id)


def next_state(state: bytes, body: CommitBody, payloads: Sequence[bytes]) -> bytes:
    """A replica of 32 bytes: depends on every earlier share, on their order and on all of their bytes."""
    mixed = blake3(state)
    mixed.update(f"round {body.round}".encode())
    for entry, payload in zip(body.offers, payloads, strict=True):
        mixed.update(f"peer {entry.peer} samples {entry.n_samples} bytes {len(payload)}".encode())
        mixed.update(digest_of(payload))
    return mixed.digest()


def name_of(offer: Offer | OfferEntry) -> bytes:
    """BLAKE3 of the payload."""
    if offer.digest is not None:
        return offer.digest
    assert offer.payload is not None
    return digest_of(offer.payload)


class Tally:
    """Which offers must count in the open round: the first one of each peer whose bytes are here."""

    def __init__(self) -> None:
        self.standing: dict[int, Offer] = {}
        self.eligible: set[int] = set()

    def offered(self, peer: int, offer: Offer, blobs: BlobStore) -> None:
        """An offer for the open round is being handed over in the peer's open session."""
        stored = None if offer.digest is None else blobs.size(offer.digest)
        here = stored if offer.payload is None else len(offer.payload)
        if here is not None and here != offer.n_bytes:
            return
        if peer not in self.eligible and name_of(self.standing.get(peer, offer)) != name_of(offer):
            del self.standing[peer]
        first = self.standing.setdefault(peer, offer)
        if name_of(first) == name_of(offer) and here is not None:
            self.eligible.add(peer)

    def arrived(self, digest: bytes, n_bytes: int) -> None:
        """A blob of this size is in the store."""
        for peer, offer in list(self.standing.items()):
            if offer.digest == digest and offer.n_bytes == n_bytes:
                self.eligible.add(peer)
            elif offer.digest == digest:
                del self.standing[peer]


class Oracle:
    """Follows the ledger from commit to commit. `states`: what replicas are, by the digest of a record."""

    def __init__(self, run_id: bytes, founder: str, snapshot_every: int) -> None:
        self.run_id, self._founder, self._snapshot_every = run_id, founder, snapshot_every
        self.states: dict[bytes, bytes] = {run_id: first_state(run_id)}
        self.reported: dict[str, set[tuple[int, bytes | None, bytes | None]]] = {}
        self.tally = Tally()
        self.ledger: list[Commit] = []
        self.exempt: set[int] = set()
        """Rounds that came back from nodes: their payloads may have been lost with the newer disk."""
        self._rewind([])

    def _rewind(self, ledger: list[Commit]) -> None:
        self._chain = Chain(self.run_id, self._founder)
        self._standing = Standing()
        self._snapshots = Snapshots(self._snapshot_every, self._standing)
        self._names: list[str] = []
        self.kept_after = 0
        self.last_use: dict[bytes, int] = {}
        self.ledger = []
        for commit in ledger:
            self._follow(commit)

    def restarted(self, found: list[Commit]) -> None:
        """The coordinator is back from a crash: nothing is missing, open offers are forgotten."""
        digests = [commit.digest for commit in found]
        assert digests == [commit.digest for commit in self.ledger], "commits are lost after a restart"
        self.tally = Tally()
        self.last_use = {digest: len(found) + 1 for digest in self.last_use}

    def restored(self, found: list[Commit]) -> None:
        """The coordinator runs on an older copy of its disk."""
        assert [c.digest for c in found] == [c.digest for c in self.ledger[: len(found)]]
        self._rewind(found)
        self.tally = Tally()

    def said(self, peer: str, report: Report) -> None:
        """A report is being handed over."""
        self.reported.setdefault(peer, set()).add((report.round, report.fingerprint, report.snapshot))

    def used(self, digest: bytes) -> None:
        """An upload or an offer of this blob was handed over."""
        self.last_use[digest] = len(self.ledger) + 1

    def committed(self, commit: Commit, blobs: BlobStore, needed_after: Sequence[int]) -> None:
        """A new commit was made by the coordinator, out of what it was given."""
        body = commit.body
        counted = {entry.peer for entry in body.offers}
        assert body.changes or counted
        assert not counted or counted == self.tally.eligible, (
            f"round {body.round}: {counted} counted, {self.tally}"
        )
        for entry in body.offers:
            offer = self.tally.standing[entry.peer]
            made = offer.round, offer.n_samples, offer.n_bytes, name_of(offer)
            assert made == (body.round, entry.n_samples, entry.n_bytes, name_of(entry))
        self.tally = Tally()
        self._follow(commit)
        payloads = [resolve(entry, blobs) for entry in body.offers]
        self.states[commit.digest] = next_state(self.states[body.parent], body, payloads)
        self._check_old_blobs(blobs, min([self.kept_after, body.round - LATE_ROUNDS, *needed_after]))

    def adopted(self, commit: Commit) -> None:
        """A commit came back from a node: it is one that had been made before."""
        assert commit.digest in self.states, f"round {commit.body.round} was never made"
        self._follow(commit)
        self.exempt.add(commit.body.round)

    def _follow(self, commit: Commit) -> None:
        body = commit.body
        self._chain.check(commit)
        for admission in body.admitted:
            assert admission.index == len(self._names), f"round {body.round}: {admission}"
            assert admission.peer_id not in self._names
            self._names.append(admission.peer_id)
        peers = [entry.peer for entry in body.offers]
        assert peers or body.changes, f"round {body.round} is empty"
        assert peers == sorted(set(peers)), f"round {body.round}: {peers}"
        for entry in body.reports:
            known = {(r, fingerprint) for r, fingerprint, _ in self.reported[self._names[entry.peer]]}
            assert (entry.round, entry.fingerprint) in known, f"round {body.round}: {entry} was not said"
            assert entry.round < body.round
        assert all(n <= PER_COMMIT for n in Counter(entry.peer for entry in body.reports).values())
        for kept in body.snapshots:
            manifests = {(r, snapshot) for r, _, snapshot in self.reported[self._names[kept.peer]]}
            assert (kept.round, kept.manifest) in manifests
        self._standing.committed(body)
        self._snapshots.committed(body)
        attested = self._snapshots.attested()
        self.kept_after = max(self.kept_after, attested[-2].round if len(attested) >= 2 else 0)
        self.ledger.append(commit)
        self.last_use.update((e.digest, body.round) for e in body.offers if e.digest is not None)

    def attested(self) -> list[Attested]:
        return self._snapshots.attested()

    def _check_old_blobs(self, blobs: BlobStore, floor: int) -> None:
        """What nobody may ask for any more does not stay for ever."""
        old = [d for d, round_ in self.last_use.items() if round_ <= floor]
        assert not any(digest in blobs for digest in old), f"payloads up to round {floor} are kept"
        for digest in old:
            del self.last_use[digest]

    def check_blobs(self, blobs: BlobStore, needed_after: Sequence[int]) -> None:
        """Every payload that somebody may ask for is in the store."""
        for commit in self.ledger[min([self.kept_after, *needed_after]) :]:
            if commit.body.round not in self.exempt:
                for entry in commit.body.offers:
                    if entry.digest is not None:
                        size = blobs.size(entry.digest)
                        text = f"round {commit.body.round}: the payload of peer {entry.peer} has size {size}"
                        assert size == entry.n_bytes, text


def resolve(entry: OfferEntry, blobs: BlobStore) -> bytes:
    """The payload's bytes. Fails if they are not there or are others."""
    if entry.payload is not None:
        assert len(entry.payload) == entry.n_bytes
        return entry.payload
    assert entry.digest is not None
    assert entry.digest in blobs, f"an offer of peer {entry.peer} counts, its payload is not here"
    payload = blobs.read(entry.digest)
    assert digest_of(payload) == entry.digest
    assert len(payload) == entry.n_bytes
    return payload
