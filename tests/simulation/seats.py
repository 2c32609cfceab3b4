"""A committee of coordinators and their nodes under generated schedules: real seats, services and ledgers on
disk; crashes at any edge, freezes, cuts, lost and doubled words, lost votes, committees that change.

    python -m tests.simulation.seats 1000 --first 1        so many schedules, from that seed on

The oracle: of every round one record, sealed, on every disk; no offer in another round than its own; what a
node has seen stays; payloads of records are where votes were given; and once all is well, rounds go on.
"""

from __future__ import annotations

import argparse
import heapq
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.host import SNAPSHOT_EVERY, genesis_of
from tests.simulation.oracle import first_state, next_state
from tests.simulation.peer import BLOB_BYTES, Disk, End, Peer, Wire, manifest
from tests.simulation.seat_host import SeatHost
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Change,
    Commit,
    CommitteeEntry,
    encode_message,
)
from thinwire.coordinator.quorum.recollection import Recollection
from thinwire.coordinator.quorum.words import Word, decode_word

STEP_S = 0.05
N_SEATS, N_SPARE = 3, 2
PATIENCE_S = 60.0
"""Within which a run in which all is well must go on."""

BUGS = ("votes_blindly", "skips_a_commit")
"""Planted on purpose: a simulation that does not find them proves nothing. Records are proposed and voted for
without their payloads; and a follower does not look at every record. (Votes that are forgotten, and such:
tests/coordinator/quorum/world.py.)"""

ANY = range(40)
"""Chances after which a fuse cuts the power: a round of a leader has some 30."""


class World:
    """`seed`: of everything that is drawn; `bug`: see BUGS."""

    def __init__(self, seed: int, folder: Path, bug: str | None = None) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.happened: Counter[str] = Counter()
        self.ledger: list[Commit] = []
        self.loss = 0.0
        self.cut: set[tuple[str, str]] = set()
        self._mail: list[tuple[float, float, Callable[[], None]]] = []
        keys = [Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32)) for i in range(N_SEATS + N_SPARE)]
        self.hosts = [self._host(folder, i, key) for i, key in enumerate(keys)]
        self._by_name = {host.name: host for host in self.hosts}
        self.n_bytes = BLOB_BYTES if bug else self.rng.choice([40, BLOB_BYTES])
        policy = self.rng.choice(["all", "deadline", "fastest"])
        genesis = genesis_of(keys[0], policy, 2, 10_000, self.rng.choice([2, 1000]))
        for host in self.hosts:
            host.bug = bug
            path = host.folder / "ledger.db"
            if host is self.hosts[0]:
                Ledger.create(path, genesis, keys[0]).close()
            else:
                founder = self.hosts[0]
                Ledger.begin(path, founder.ledger.genesis_record, founder.ledger.genesis_signature).close()
            host.boot()
        self.run_id, self._founder = self.hosts[0].ledger.run_id, self.hosts[0].name
        self._chain = Chain(self.run_id, self._founder)
        self.states = {self.run_id: first_state(self.run_id)}
        self.disks: dict[str, Disk] = {}
        self.peers: dict[str, Peer] = {}
        self._lives = 0
        self._beat_s = 0.0
        signers = [Ed25519PrivateKey.from_private_bytes(bytes([i + 60] * 32)) for i in range(3)]
        self._signers = {peer_id_of(key.public_key()): key for key in signers[: self.rng.randint(2, 3)]}
        for name in self._signers:
            self.start_peer(name)

    def _host(self, folder: Path, i: int, key: Ed25519PrivateKey) -> SeatHost:
        path = folder / f"seat-{i}"
        path.mkdir()
        return SeatHost(self, path, key, self.rng.randint(-5000, 5000), self.rng)

    # ------------------------------------------------------------------------------- what hosts see

    def post(self, sender: str, to: str, word: Word) -> None:
        """Lost, late, doubled."""
        draw = self.rng.random()
        if (sender, to) in self.cut or draw < self.loss:
            return
        data = encode_message(word)

        def arrive() -> None:
            host = self._by_name[to]
            if host.is_frozen:
                self._later(0.3, arrive)
            elif host.is_up and (sender, to) not in self.cut:
                with host.awake():
                    host.receive(sender, decode_word(data))

        self._later(self.rng.uniform(0.001, 0.04) if draw < 0.95 else self.rng.uniform(0.1, 1.5), arrive)
        if draw > 0.98:
            self._later(self.rng.uniform(0, 2), arrive)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._mail, (self.now_s + seconds, self.rng.random(), what))

    def fetch(self, host: SeatHost, digest: bytes, n_bytes: int) -> None:
        """From whoever has it, if there is somebody by then."""

        def arrive() -> None:
            payload = self._fetch(digest)
            if payload is not None and host.is_up and not host.is_frozen:
                with host.awake():
                    host.fetched(payload, digest)

        self._later(self.rng.uniform(0.005, 0.1), arrive)

    def sealed(self, host: SeatHost, commit: Commit) -> None:
        """A record is on the host's disk."""
        round_ = commit.body.round
        if round_ <= len(self.ledger):
            assert self.ledger[round_ - 1].digest == commit.digest, f"two records of round {round_}"
            return
        self._chain.check(commit)
        self._check_record(host, commit)
        self.ledger.append(commit)
        self.happened["sealed"] += 1

    def _check_record(self, host: SeatHost, commit: Commit) -> None:
        body = commit.body
        assert len(host.ledger.work(body.work) or b"") == 64 * len(body.offers), "signatures are lost"
        assert not self.ledger or body.time_ms >= self.ledger[-1].body.time_ms, "time runs backwards"
        payloads = []
        need = self._chain.committee.need if body.committee is None else 1
        for offer in body.offers:
            payload, digest = offer.payload, offer.digest
            if digest is not None:
                holders = [h for h in self.hosts if (h.folder / "blobs" / digest.hex()).exists()]
                assert len(holders) >= need, f"{len(holders)} seats hold a payload of round {body.round}"
                payload = (holders[0].folder / "blobs" / digest.hex()).read_bytes()
            assert payload is not None
            assert payload.rstrip(b".").endswith(f" {body.round}".encode()), "an offer of another round"
            payloads.append(payload)
        self.states[commit.digest] = next_state(self.states[body.parent], body, payloads)

    # ------------------------------------------------------------------------------------------ nodes

    def start_peer(self, name: str) -> None:
        """Its earlier life is over."""
        old = self.peers.pop(name, None)
        if old is not None and old.wire is not None:
            old.wire.up.append(End())
        self._lives += 1
        self.peers[name] = Peer(
            name=name,
            life=self._lives,
            disk=self.disks.setdefault(name, Disk()),
            run_id=self.run_id,
            founder=self._founder,
            snapshot_every=SNAPSHOT_EVERY,
            n_rounds=10_000,
            fetch=self._fetch,
            borrow=self._borrow,
            key=self._signers[name],
        )

    def _fetch(self, digest: bytes) -> bytes | None:
        """From seats that are up, and nodes."""
        for host in self.hosts:
            if host.is_up and not host.is_frozen and digest in host.blobs:
                return host.blobs.read(digest)
        return next((p.payloads[digest] for p in self.peers.values() if digest in p.payloads), None)

    def _borrow(self, round_: int, named: bytes) -> bytes | None:
        found = (peer.disk.snapshots.get(round_) for peer in self.peers.values())
        return next((s for s in found if s is not None and manifest(round_, s) == named), None)

    def _live(self, peer: Peer) -> None:
        """A node's share of a step: it dials, hears, works."""
        if peer.wire is None and peer.refused is None and self.rng.random() < 0.3:
            host = self.rng.choice([h for h in self.hosts if h.service is not None] or self.hosts)
            if host.is_up and not host.is_frozen:
                wire = Wire(peer)
                host.wires.append(wire)
                peer.connect(wire)
        wire = peer.wire
        for _ in range(self.rng.randint(0, 8)):
            if wire is None or not wire.down:
                break
            message = wire.down.popleft()
            if peer.wire is wire:
                peer.receive(message)
        assert peer.refused is None, f"{peer.name} was refused: {peer.refused}"
        peer.work(f"{peer.name} {peer.life}", self.n_bytes)
        if self.now_s >= self._beat_s:
            peer.beat()
        if len(peer.disk.copy) > len(self.ledger):
            raise AssertionError(f"{peer.name} has seen a round that no disk has")

    def _serve(self, host: SeatHost) -> None:
        for wire in list(host.wires):
            for _ in range(self.rng.randint(0, 6)):
                if not host.is_up or wire.is_closed or not wire.up:
                    break
                with host.awake():
                    host.deliver_up(wire)
            if host.is_up and not wire.is_closed and wire.uploads and self.rng.random() < 0.7:
                with host.awake():
                    host.upload(wire)
            if host.is_up and not wire.is_closed:
                host.pump(wire)

    # ------------------------------------------------------------------------------------------- time

    def step(self) -> None:
        self.now_s += STEP_S
        while self._mail and self._mail[0][0] <= self.now_s:
            heapq.heappop(self._mail)[2]()
        for host in self.hosts:
            if host.is_up and not host.is_frozen:
                self._serve(host)
            if host.is_up and not host.is_frozen:
                with host.awake():
                    host.pass_time()
        for peer in list(self.peers.values()):
            self._live(peer)
        if self.now_s >= self._beat_s:
            self._beat_s = self.now_s + 0.5

    def run_for(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            self.step()

    def leaders(self) -> list[SeatHost]:
        return [host for host in self.hosts if host.is_up and not host.is_frozen and host.service is not None]

    # ------------------------------------------------------------------------------------ misfortunes

    def misfortune(self) -> None:
        kinds: dict[str, Callable[[], None]] = {
            "leader crashes at an edge": self._cut_power_of_leader,
            "crash": self._crash,
            "boot": self._boot,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "cut": self._cut,
            "mend": self._mend,
            "node restarts": self._restart_node,
            "order": self._order,
            "committee": self._change_committee,
        }
        weights = (8, 2, 8, 1, 2, 2, 2, 2, 2, 1)
        (what,) = self.rng.choices(list(kinds), weights)
        kinds[what]()

    def _cut_power_of_leader(self) -> None:
        for host in self.leaders():
            host.fuse = self.rng.choice(ANY)
            self.happened["fuses"] += 1

    def _crash(self) -> None:
        host = self.rng.choice(self.hosts)
        if host.is_up:
            host.crash()
            self.happened["crashes"] += 1

    def _boot(self) -> None:
        for host in self.hosts:
            if not host.is_up and self.rng.random() < 0.7:
                others_rest = any(h.disk.rests for h in self.hosts if h is not host)
                is_restored = not others_rest and self.rng.random() < 0.3
                self.happened["restored"] += is_restored
                host.boot(is_restored=is_restored)

    def _freeze(self) -> None:
        self.rng.choice(self.hosts).is_frozen = True

    def _thaw(self) -> None:
        for host in self.hosts:
            host.is_frozen = False

    def _cut(self) -> None:
        """Some words do not arrive, in one direction or both."""
        names, share = list(self._by_name), self.rng.choice([0.2, 0.5])
        pairs = [(a, b) for a in names for b in names if a != b]
        self.cut = {pair for pair in pairs if self.rng.random() < share}
        self.loss = self.rng.choice([0.0, 0.05, 0.2])

    def _mend(self) -> None:
        self.cut, self.loss = set(), 0.0

    def _restart_node(self) -> None:
        self.start_peer(self.rng.choice(list(self.peers)))

    def _order(self) -> None:
        what = self.rng.choice(["set", "pause", "resume"])
        changes = (Change(key="schedule.warmup_rounds", value=self.rng.randint(0, 5)),) * (what == "set")
        self._ask(lambda host: host.service.order(Order(what=what, changes=changes), self.now_s))

    def _ask(self, what: Callable[[SeatHost], object]) -> None:
        for host in self.leaders():
            with host.awake():
                try:
                    what(host)
                except ConfigError:  # paused already, or the reign is just ending
                    self.happened["refused orders"] += 1

    def _change_committee(self) -> None:
        """One seat takes the place of another, or two come or go."""
        for host in self.leaders():
            seats = set(host.ledger.committee.seats)
            spare, others = set(self._by_name) - seats, seats - {host.name}
            draw = self.rng.random()
            if len(seats) == N_SEATS and draw < 0.6:
                seats = seats - {self._pick(others)} | {self._pick(spare)}
            elif len(seats) == N_SEATS:
                seats |= spare
            else:
                seats -= {self._pick(others), self._pick(others)}
            if len(seats) >= 3:
                self.name(sorted(seats))

    def _pick(self, names: set[str]) -> str:
        return self.rng.choice(sorted(names))

    def name(self, seats: list[str]) -> None:
        """Asks whoever leads to name this committee."""
        entry = CommitteeEntry(
            seats=tuple(self._by_name[seat].entry for seat in seats), need=len(seats) // 2 + 1
        )
        self.happened["committees"] += 1
        self._ask(lambda host: host.service.name_committee(entry, self.now_s))

    # -------------------------------------------------------------------------------------- a schedule

    def go(self) -> Counter[str]:
        """From one seat to three, then misfortunes, then peace. Returns how often what happened."""
        self._until(lambda: bool(self.ledger), "the founder alone makes no record")
        self.name([host.name for host in self.hosts[:N_SEATS]])
        self._until(lambda: len(self._chain.committee.seats) == N_SEATS, "no committee is named")
        for _ in range(self.rng.randint(6, 14)):
            self.run_for(self.rng.uniform(0.3, 3.0))
            self.misfortune()
        self._peace()
        return self.happened

    def _until(self, is_done: Callable[[], bool], what: str) -> None:
        until_s = self.now_s + PATIENCE_S
        while not is_done():
            assert self.now_s < until_s, f"{what}: {list(self._told())}"
            self.step()

    def _told(self) -> Iterator[str]:
        for host in self.hosts:
            votes = dict(host.checks.refused)
            yield f"{host.name[-4:]} {host.seat.role} head {host.ledger.head_round} no votes {votes}"

    def _peace(self) -> None:
        self._mend()
        for host in self.hosts:
            host.is_frozen, host.fuse = False, None
            if not host.is_up:
                host.boot()
        self._until(lambda: bool(self.leaders()), "nobody leads")
        self._ask(lambda host: host.service.order(Order(what="resume"), self.now_s))
        goal = len(self.ledger) + 4
        self._until(lambda: len(self.ledger) >= goal, "no progress although all is well")
        self._until(lambda: self._is_settled(goal), "seats and nodes do not come together")
        self.happened["reigns"] += sum(host.reigns for host in self.hosts)
        for host in self.hosts:
            self._check_host(host)

    def _is_settled(self, round_: int) -> bool:
        """Everybody has the ledger up to that round, and no seat rests."""
        seated = self._chain.committee.seats
        heads = [host.ledger.head_round for host in self.hosts]
        copies = [min(len(peer.disk.copy), peer.round) for peer in self.peers.values()]
        rests = [host for host in self.hosts if host.name in seated and host.disk.rests is not None]
        missing = [host for host in self.hosts if host.recollection.missing_payloads()]
        return min(heads + copies) >= round_ and not rests and not missing

    def _check_host(self, host: SeatHost) -> None:
        """Its ledger is the run's, and what it has derived on the way is what reading it gives."""
        found = [commit.digest for commit in host.ledger.all_commits()]
        assert found == [commit.digest for commit in self.ledger[: len(found)]]
        host.recollection.catch_up()
        again = Recollection(host.ledger, BlobStore(host.folder / "blobs")).derived
        derived = host.recollection.derived
        for name in ("course", "peers", "committee", "access", "last_ms"):
            assert getattr(derived, name) == getattr(again, name), name
        for peer in derived.peers:
            assert derived.standing.work(peer) == again.standing.work(peer)
        assert derived.open_round() == again.open_round()
        assert derived.retention.snapshots.attested() == again.retention.snapshots.attested()
        assert derived.statistics.n_offers == again.statistics.n_offers

    def check_nodes(self) -> None:
        """What a node has seen is in the ledger, and its replica is what the ledger gives."""
        for disk in self.disks.values():
            seen = [commit.digest for commit in disk.copy]
            assert seen == [commit.digest for commit in self.ledger[: len(seen)]], "a round has changed"
        for peer in self.peers.values():
            at = self.ledger[peer.round - 1].digest if peer.round else self.run_id
            assert peer.replica == self.states[at], f"{peer.name} differs after round {peer.round}"

    def close(self) -> None:
        for host in self.hosts:
            if host.is_up:
                host.crash()


def run(seed: int, bug: str | None = None) -> Counter[str]:
    """One schedule. Raises AssertionError."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tw-", dir=memory if memory.is_dir() else None))
    try:
        world = World(seed, folder, bug)
        try:
            happened = world.go()
            world.check_nodes()
        finally:
            world.close()
        return happened
    finally:
        shutil.rmtree(folder)


def main(tell: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--bug", choices=BUGS, help="planted, to see that it is found")
    options = parser.parse_args()
    logging.disable()
    happened: Counter[str] = Counter()
    n_faults = 0
    for seed in range(options.first, options.first + options.n):
        try:
            happened += run(seed, options.bug)
        except AssertionError as e:
            n_faults += 1
            tell(f"seed {seed}: {e}")
    tell(f"{options.n} schedules, {n_faults} with a fault; {dict(happened)}")
    return int(n_faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
