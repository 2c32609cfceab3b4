"""A run of peers with keys that audit each other: commits by hand, and what `Standing` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Admission,
    AuditEntry,
    CommitBody,
    OfferEntry,
    Verdict,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.trust.audits import payload_digest, sign_audit, signed_bytes
from thinwire.coordinator.protocol.trust.standing import Standing

RUN = digest_of(b"an audited run")
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32)) for i in range(12)]
PEERS = [peer_id_of(key.public_key()) for key in KEYS]

VerdictOf = Callable[[int, int], Verdict | None]
"""(auditor, target) -> what it reports; None: nothing."""


@dataclass(frozen=True)
class Rules:
    rate: float = 1.0
    failures: int = 2
    window_rounds: int = 100
    own_data_auditors: bool = True
    newcomers_rate: float = 0.0
    newcomers_budget: float = 0.0
    flood_failures: int = 0


def offer(peer: int, n_samples: int = 1, round_: int = 0, own_data: bool = False) -> OfferEntry:
    payload = b"%d of %d" % (round_, peer)
    return OfferEntry(
        peer=peer,
        n_samples=n_samples,
        n_tokens=0,
        loss=None,
        n_bytes=len(payload),
        payload=payload,
        digest=None,
        own_data=own_data,
    )


def bare(round_: int, offers: Iterable[OfferEntry], audits: Iterable[AuditEntry] = ()) -> CommitBody:
    """Every peer is admitted with the first record."""
    admitted = tuple(Admission(index=i, peer_id=p) for i, p in enumerate(PEERS)) if round_ == 1 else ()
    return CommitBody(
        round=round_,
        parent=digest_of(b""),
        offers=tuple(offers),
        admitted=admitted,
        lr_factor_bits=0,
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=0,
        audits=tuple(sorted(audits, key=lambda a: (a.round, a.target, a.auditor))),
    )


class AuditedRun:
    """`liars`: peers that report the contrary of what `verdict_of` says for honest ones."""

    def __init__(self, n_peers: int, rules: Rules | None = None) -> None:
        self.n_peers = n_peers
        self.standing = Standing(RUN, rules or Rules())
        self.bodies: list[CommitBody] = []
        self._pending: list[AuditEntry] = []

    def report(
        self, round_: int, target: int, auditor: int, verdict: Verdict, key: Ed25519PrivateKey | None = None
    ) -> AuditEntry:
        """As the auditor signs it; `key`: somebody else does."""
        entry = next(o for o in self.bodies[round_ - 1].offers if o.peer == target)
        claim = signed_bytes(RUN, round_, PEERS[target], payload_digest(entry), verdict)
        signature = sign_audit(key or KEYS[auditor], claim)
        return AuditEntry(round=round_, target=target, auditor=auditor, verdict=verdict, signature=signature)

    def commit(self, audits: Iterable[AuditEntry] = (), absent: Collection[int] = ()) -> CommitBody:
        """The next round: everybody offers but those that are absent."""
        round_ = len(self.bodies) + 1
        offers = [offer(p, round_=round_) for p in range(self.n_peers) if p not in absent]
        body = bare(round_, offers, audits)
        self.bodies.append(body)
        self.standing.committed(body, digest_of(encode_record(body)))
        return body

    def live(self, n_rounds: int, verdict_of: VerdictOf, scored: Container[int] = range(2**16)) -> None:
        """Auditors report with the record after the one that has drawn them. `scored`: who is suspect to the
        replicas."""
        for _ in range(n_rounds):
            self.commit(self._pending)
            round_ = self.standing.round
            self._pending = [
                self.report(round_, draw.target, auditor, verdict)
                for draw in self.standing.drawn(round_)
                if not draw.for_suspects or draw.target in scored
                for auditor in draw.auditors
                if (verdict := verdict_of(auditor, draw.target)) is not None
            ]
