"""A node's copy of the replicated state: base weights and the ledger applied to them, nothing else.

Live training, catching up and replaying all go through `Replica.apply_batch`: nothing else
changes weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Final

import msgpack
import torch
from blake3 import blake3
from torch import Tensor, nn

from ..compression import wire
from ..compression.base import Fields, Payload, Turn
from ..compression.errors import BadPayload, ConfigError, ReplicaDiverged
from ..compression.fingerprint import fingerprint, parameter_sums
from ..coordinator.protocol.files import write_aside
from ..coordinator.protocol.messages import Commit, GenesisBody, OfferEntry
from ..coordinator.protocol.schedule import float32_of_bits
from ..coordinator.protocol.settings import Course, strategy_options
from ..coordinator.protocol.trust.paces import Paces
from ..coordinator.protocol.trust.standing import Standing
from ..coordinator.protocol.trust.worked import Worked
from ..optim.base import Noise, Own, Round, Share, Strategy
from ..optim.parts.clip import Weighing
from ..optim.registry import build_strategy
from ..optim.robust.weights import with_copies
from .config import parse_config
from .genesis import check_layout, in_dtype, initialise, layout_hash, layout_of
from .ranks.collective_errors import collective_errors
from .snapshots.format import Manifest, Stored
from .snapshots.incoming import DATA, write_file
from .snapshots.local_state import BadLocalState, LocalState, encode
from .snapshots.parts import read_parts, weight_pieces, weights_of, write_parts
from .snapshots.store import SnapshotStore, local_name, read_local
from .snapshots.writer import SnapshotWriter
from .tasks.base import Task
from .tasks.buffers import persistent_buffers

log = logging.getLogger("thinwire.node")

PayloadBytes = Callable[[OfferEntry], bytes]
"""The bytes of a counted offer: from the commit itself, or fetched; blocks until it has them."""


def round_seed(run_id: bytes, round: int, peer_id: str = "") -> int:
    """The unsigned 64-bit seed of a round, shared (no peer id) or a peer's own."""
    data = run_id + round.to_bytes(8, "little") + peer_id.encode()
    return int.from_bytes(blake3(data).digest(8), "little")


def data_seed(run_id: bytes, round: int, peer_id: str, micro_batch: int) -> int:
    """The seed of a batch: a restarted node never repeats a round's data."""
    data = (
        b"data" + run_id + round.to_bytes(8, "little") + micro_batch.to_bytes(8, "little") + peer_id.encode()
    )
    return int.from_bytes(blake3(data).digest(8), "little")


def shared_seed(digest: bytes, micro_batch: int) -> int:
    """The seed of a batch that all auditors of a round's offers from other data have. `digest`: of the commit
    that counted them, which nobody knew when they were made."""
    return int.from_bytes(blake3(b"shared" + digest + micro_batch.to_bytes(8, "little")).digest(8), "little")


COUNTED_KEPT: Final = 16
"""Rounds."""


@dataclass(slots=True)
class _Ahead:
    """Where a replica will be after the commits that were read and not applied yet."""

    round: int
    digest: bytes
    lr_factor: float
    course: Course
    peers: dict[int, str]
    bad: Counter[str]
    senders: list[int]  # of the last round's shares, in their order
    counted: dict[int, tuple[str, ...]]  # by round, of the offers with samples


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a round made of a peer's payload: its norm against the median, and what it was scaled by."""

    size: float
    kept: float


def _weighed(found: Weighing | None, senders: Sequence[str]) -> dict[str, Weighed]:
    if found is None or len(found.kept) != len(senders):  # no commit yet, or no bound
        return {}
    every = zip(senders, found.sizes, found.kept, strict=True)
    return {peer: Weighed(size, kept) for peer, size, kept in every}


class Replica:
    """Model, strategy and the place in the ledger: `round`, `digest` of its commit, `peers` by index.

    `course`: the settings that hold for the next round. `bad` counts payloads that were left out, by reason.
    `standing`: who is condemned in which round. It may know later commits already; in runs with audits it has
    to know the earlier ones before the replica goes on from a snapshot.
    `counted`: whose offers each of the last commits has, by round, condemned peers apart; without those of
    which that is not known.
    `weighed`: the last round's peers, by id; of no meaning to the replica, and empty without a bound.
    `to_score`: the last applied round, and of each peer with a share in it, by index, what it is scored by.
    """

    def __init__(
        self, run_id: bytes, genesis: GenesisBody, model: nn.Module, strategy: Strategy, peer_id: str
    ) -> None:
        self.run_id = run_id
        self.model = model
        self.strategy = strategy
        self.peer_id = peer_id
        self.round = 0
        self.digest = run_id
        self.peers: dict[int, str] = {}
        self.bad: Counter[str] = Counter()
        self.weighed: dict[str, Weighed] = {}
        self.counted: dict[int, tuple[str, ...]] = {}
        self.to_score: tuple[int, dict[int, Payload]] = 0, {}
        self._to_measure: Round | None = None
        self._genesis = genesis
        self._unchanged = {name: strategy.option(name) for name in strategy.facts.changeable}
        self.course = Course.of(genesis.config)
        options, rules = strategy.param_groups[0], self.course.settings.audits
        paces = Paces() if options.get("pace", "none") != "none" else None
        worked = Worked() if options.get("weights") == "work" else None
        self.standing = Standing(run_id, rules, paces, worked)
        self._seed = parse_config(genesis.config).run.seed
        self._lr_factor = float32_of_bits(genesis.lr_factor_bits)
        self._layout_hash = layout_hash(genesis)
        self._max_bytes = genesis.limits.max_payload_bytes

    def turn(self) -> Turn:
        """What the next round fixes for everybody, and this peer's own seed."""
        return self._turn(self.round + 1, self._lr_factor)

    def turn_of(self, round: int, peer_id: str, lr_factor: float | None = None) -> Turn:
        """A round as that peer has it. `lr_factor`: that round's; None: the next one's."""
        return self._turn(round, self._lr_factor if lr_factor is None else lr_factor, peer_id)

    def _turn(
        self, round: int, lr_factor: float, peer_id: str | None = None, course: Course | None = None
    ) -> Turn:
        own = self.peer_id if peer_id is None else peer_id
        return Turn(
            round=round,
            shared_seed=round_seed(self.run_id, round),
            own_seed=round_seed(self.run_id, round, own),
            lr_factor=lr_factor,
            n_rounds=(course or self.course).n_rounds,
        )

    def encode(self, payload: Payload, turn: Turn) -> bytes:
        """The bytes of an offer for the turn's round, as `wire.decode` reads them."""
        return wire.encode(payload, self.strategy.fields(turn), turn.round, self._layout_hash)

    def decode(self, data: bytes, turn: Turn) -> Payload:
        """The payload in the bytes of an offer for the turn's round. Raises BadPayload."""
        return self._decode(data, self.strategy.fields(turn), turn)

    def _decode(self, data: bytes, fields: Fields, turn: Turn) -> Payload:
        payload = wire.decode(data, fields, turn.round, self._layout_hash, self._max_bytes)
        self.strategy.check(payload, turn)
        return payload

    def apply(self, commit: Commit, payload_bytes: PayloadBytes, offered: bool) -> Own:
        """Applies the next commit exactly. `offered`: this replica's strategy made an offer for that round.

        Returns what became of it. Raises as `apply_batch` does.
        """
        (own,) = self.apply_batch([commit], payload_bytes, {commit.body.round} if offered else ())
        return own

    def apply_batch(
        self, commits: Sequence[Commit], payload_bytes: PayloadBytes, offered: Container[int] = ()
    ) -> list[Own]:
        """Applies the next commits exactly: the same bits as one by one, maybe in less time (see `batches`).

        `offered`: the rounds for which this replica's strategy made an offer. Returns what became of each.
        Raises ReplicaDiverged when the strategy fails or leaves a non-finite replica. With nothing changed
        raises it for a commit that does not follow (checked by the link already), and what `payload_bytes`
        raises.
        """
        if not commits:
            return []
        ahead = _Ahead(
            self.round,
            self.digest,
            self._lr_factor,
            self.course,
            dict(self.peers),
            Counter(),
            [],
            dict(self.counted),
        )
        courses: list[Course] = []
        rounds: list[Round] = []
        for commit in commits:
            courses.append(ahead.course)
            rounds.append(self._read(commit, ahead, payload_bytes, offered))
        with collective_errors(self.strategy.ranks):
            try:
                for course, some in _alike(rounds, courses):
                    self._follow(course)
                    self.strategy.apply_many(some)
                self._follow(ahead.course)
            except Exception as e:  # whatever it was, the parameters are in no known state now
                raise ReplicaDiverged(
                    f"applying {_rounds(self.round, ahead.round)} failed: {type(e).__name__}: {e}"
                ) from e
            self._refuse_non_finite(ahead.round)
        self.round, self.digest, self._lr_factor = ahead.round, ahead.digest, ahead.lr_factor
        self.peers.update(ahead.peers)
        self.bad.update(ahead.bad)
        self.weighed = _weighed(self.strategy.weighing, [ahead.peers[peer] for peer in ahead.senders])
        last = rounds[-1]
        parts = self.strategy.scored_parts([share.payload for share in last.shares], last.turn)
        self.to_score = self.round, dict(zip(ahead.senders, parts, strict=True))
        self.counted = {r: who for r, who in ahead.counted.items() if r > self.round - COUNTED_KEPT}
        evaluator = commits[-1].body.evaluator
        is_ours = evaluator is not None and self.peers.get(evaluator) == self.peer_id
        self._to_measure = rounds[-1] if is_ours else None
        return [r.own for r in rounds]

    def noise(self) -> Noise | None:
        """Of the payloads of the round that was applied last, where its commit names this peer to evaluate.
        They are forgotten then. None: nothing is known of it."""
        found, self._to_measure = self._to_measure, None
        return None if found is None else self.strategy.noise(found.shares, found.turn)

    def _follow(self, course: Course) -> None:
        """These settings hold for the next round. Raises ConfigError for options that no strategy has."""
        if course is not self.course:
            self._options_of(course)
            self.course = course

    def _options_of(self, course: Course) -> None:
        self.strategy.change({**self._unchanged, **strategy_options(course.changes)})

    def _read(
        self, commit: Commit, ahead: _Ahead, payload_bytes: PayloadBytes, offered: Container[int]
    ) -> Round:
        """The next commit as the strategy sees it; moves `ahead` on by it."""
        body = commit.body
        if body.round != ahead.round + 1 or body.parent != ahead.digest:
            raise ReplicaDiverged(f"commit {body.round} does not follow this replica's round {ahead.round}")
        ahead.peers.update({a.index: a.peer_id for a in body.admitted})
        turn = self._turn(body.round, ahead.lr_factor, course=ahead.course)
        offers = self.heard(commit)
        if len(offers) < len(body.offers):
            ahead.bad["condemned"] += len(body.offers) - len(offers)
        shares, own_counted = self._shares(commit, offers, turn, payload_bytes, ahead)
        own: Own = ("counted" if own_counted else "missed") if body.round in offered else None
        ahead.round, ahead.digest = body.round, commit.digest
        ahead.counted[body.round] = tuple(ahead.peers[offer.peer] for offer in offers if offer.n_samples > 0)
        ahead.lr_factor = float32_of_bits(body.lr_factor_bits)
        try:
            ahead.course = ahead.course.after(body.changes)
        except ConfigError as e:
            raise ReplicaDiverged(f"record {body.round} changes what cannot be changed: {e}") from e
        return Round(shares, turn, own)

    def heard(self, commit: Commit) -> tuple[OfferEntry, ...]:
        """The commit's offers without those of condemned peers, which are as if they were not there. Raises
        ReplicaDiverged: an earlier commit is not known."""
        condemned = self.condemned(commit)
        return tuple(offer for offer in commit.body.offers if offer.peer not in condemned)

    def condemned(self, commit: Commit) -> frozenset[int]:
        """Peers whose offers weigh nothing in the commit's round; the commit is known from then on."""
        body = commit.body
        try:
            self.standing.committed(body, commit.digest)
            return self.standing.condemned_in(body.round)
        except ValueError as e:
            raise ReplicaDiverged(f"round {body.round} cannot be applied: {e}") from e

    def newcomers(self, commit: Commit) -> frozenset[int]:
        """Those with an offer in the commit, which is known, whose last audit has not passed before it."""
        return self.standing.new_among(commit.body)

    def failed(self, commit: Commit) -> frozenset[int]:
        """The same, that weigh nothing: whose last audit has failed, or, in a flood, has not passed."""
        return self.standing.weightless_among(commit.body)

    def paces(self, commit: Commit) -> tuple[dict[int, int], int]:
        """Of a commit that is known: the rounds since the last counted offer of each peer with one in it, and
        how many peers have offered lately. Nothing, in runs that do not weigh by that."""
        paces, round_ = self.standing.paces, commit.body.round
        if paces is None:
            return {}, 0
        return {o.peer: paces.gap(o.peer, round_) for o in commit.body.offers}, paces.n_active(round_)

    def _shares(
        self,
        commit: Commit,
        offers: tuple[OfferEntry, ...],
        turn: Turn,
        payload_bytes: PayloadBytes,
        ahead: _Ahead,
    ) -> tuple[list[Share], bool]:
        """The counted offers that pass `check`, in the ledger's order, and whether ours is among them."""
        fields = self.strategy.fields(turn)
        newcomers, failed = self.newcomers(commit), self.failed(commit)
        gaps, n_active = self.paces(commit)
        shares: list[Share] = []
        senders: list[int] = []
        sent: list[bytes] = []
        own_counted = False
        for offer in offers:
            if offer.n_samples == 0:  # changes nothing; what its peer packed stays with it
                continue
            peer_id = ahead.peers[offer.peer]
            data = payload_bytes(offer)
            try:
                payload = self._decode(data, fields, turn)
            except BadPayload as e:
                ahead.bad[e.reason] += 1
                log.warning("round %d: payload of %s left out: %s", turn.round, peer_id, e)
                continue
            seed = round_seed(self.run_id, turn.round, peer_id)
            shares.append(
                Share(
                    seed,
                    self._n_samples(offer, peer_id, turn),
                    payload,
                    own_data=offer.own_data,
                    is_new=offer.peer in newcomers,
                    has_failed=offer.peer in failed,
                    gap=gaps.get(offer.peer, 1),
                    n_active=n_active,
                )
            )
            senders.append(offer.peer)
            sent.append(data if offer.digest is None else offer.digest)
            own_counted = own_counted or peer_id == self.peer_id
        ahead.senders = senders
        return with_copies(shares, sent), own_counted

    def _n_samples(self, offer: OfferEntry, peer_id: str, turn: Turn) -> int:
        """What the offer counts for: its own samples, or also those of its peer's rounds before."""
        worked = self.standing.worked
        if worked is None:
            return offer.n_samples
        after = self.strategy.counts_after(turn, lambda round_: round_seed(self.run_id, round_, peer_id))
        if after is None:
            return offer.n_samples
        return worked.samples(offer.peer, after, turn.round)

    def _refuse_non_finite(self, last: int) -> None:
        """What is not finite once stays so: one look after a batch is enough."""
        for name, t in self.tensors().items():
            # The sum takes a third of the time; it may overflow where nothing is wrong.
            if not isfinite(float(t.sum())) and not bool(torch.isfinite(t).all()):
                raise ReplicaDiverged(
                    f"{_rounds(self.round, last)} made {name} non-finite. This is the run's own arithmetic "
                    f"and the same on every peer: start again with a smaller learning rate."
                )

    @property
    def has_frozen(self) -> bool:
        """Whether the model has what the strategy leaves as it is, parameters or buffers of the base weights:
        no snapshot holds it."""
        if self._genesis.base is not None and any(True for _ in persistent_buffers(self.model)):
            return True
        return len(self.strategy.parameters_in_order()) < len(list(self.model.parameters()))

    @property
    def n_bytes(self) -> int:
        """Size of the replicated tensors, those of all ranks together."""
        parts = self.strategy.replicated_parts()
        return sum(parts[name].n_global * t.itemsize for name, t in self.tensors().items())

    def sums(self) -> dict[str, int]:
        """Name of a replicated tensor -> its part of the fingerprint: shows which tensors differ."""
        return self._sums_of(self.tensors())

    def _sums_of(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Over all ranks. What every rank has whole counts once."""
        parts, ranks = self.strategy.replicated_parts(), self.strategy.ranks
        counted = {
            name: t for name, t in tensors.items() if ranks.index == 0 or parts[name] != parts[name].entire
        }
        own = parameter_sums(counted, {name: parts[name].start for name in counted})
        sums = dict.fromkeys(sorted(tensors), 0)
        for data in ranks.gather(msgpack.packb(own)):
            for name, n in msgpack.unpackb(data).items():
                sums[name] = (sums[name] + n) % 2**64
        return sums

    def fingerprint(self) -> bytes:
        """8 bytes: equal on all peers after the same round."""
        return fingerprint(self.sums())

    def tensors(self) -> dict[str, Tensor]:
        """All that is replicated, live: parameters, and what `apply` keeps beside them. What this rank holds
        of them."""
        return self.strategy.replicated_tensors()

    def weights(self) -> dict[str, Tensor]:
        """What a user wants to have in a file, see `weights_of`. On a node of one rank."""
        with self.strategy.replica():
            return weights_of(self.model)

    def save_weights(self, path: Path | None, own: bool = False) -> None:
        """The same as a safetensors file that rank 0 writes (the others: None), one whole tensor at a time.
        `own`: of the peer's own model (see `Strategy.own_model`). Raises OSError."""
        with self.strategy.own_model() if own else self.strategy.replica():
            pieces = weight_pieces(self.model)
            try:
                if path is not None:
                    write_aside(path, pieces)
            finally:
                for _ in pieces:  # the other ranks give what they have, whatever became of the file
                    pass

    def saved(self) -> Saved:
        """A copy of the replicated state on the CPU, for a snapshot or to come back to."""
        tensors = {name: t.to("cpu", copy=True) for name, t in self.tensors().items()}
        return Saved(self.round, self.digest, self._lr_factor, self.course, dict(self.peers), tensors)

    def restore(self, saved: Saved) -> None:
        """Becomes what `saved` returned before."""
        self._become(saved.tensors)
        self._follow(saved.course)
        self.round, self.digest, self._lr_factor = saved.round, saved.digest, saved.lr_factor
        self.counted = {}
        self.peers = dict(saved.peers)

    def adopt(self, manifest: Manifest, tensors: Mapping[str, Tensor], commit: Commit) -> None:
        """Becomes the replica in a snapshot. `commit`: the ledger's record of its round, which must match;
        `peers` has to hold those that it admitted and the earlier ones.

        Raises ReplicaDiverged, with nothing changed, when the snapshot is not what it says.
        """
        if manifest.run_id != self.run_id:
            raise ReplicaDiverged("the snapshot is of another run")
        if (manifest.round, manifest.commit) != (commit.body.round, commit.digest):
            raise ReplicaDiverged(f"the snapshot's round {manifest.round} is not on the run's ledger")
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if found != {name: (tuple(t.shape), t.dtype) for name, t in self.tensors().items()}:
            raise ReplicaDiverged("the snapshot's tensors are not those of the run's layout")
        if fingerprint(self._sums_of(tensors)) != manifest.fingerprint:
            raise ReplicaDiverged("the snapshot's tensors do not have the fingerprint that it states")
        self._become(tensors)
        try:
            self._follow(Course.of(self._genesis.config, manifest.changes))
        except ConfigError as e:
            raise ReplicaDiverged(f"the snapshot's settings are not the run's: {e}") from e
        self.round, self.digest, self.counted = manifest.round, manifest.commit, {}
        self._lr_factor = float32_of_bits(commit.body.lr_factor_bits)

    def take(self, store: SnapshotStore, stored: Stored, commit: Commit) -> None:
        """Becomes the replica in a snapshot on disk, see `adopt`. Raises what `SnapshotStore.load` raises."""
        manifest, tensors = store.load(stored)
        self.adopt(manifest, tensors, commit)

    def take_file(self, path: Path, manifest: Manifest, commit: Commit) -> None:
        """The same from the data in a file, of which every rank reads its rows."""
        with collective_errors(self.strategy.ranks):
            tensors = read_parts(path, self.strategy.replicated_parts())
        self.adopt(manifest, tensors, commit)

    def write_snapshot(self, writer: SnapshotWriter) -> None:
        """Goes on as soon as the tensors are copied."""
        writer.take(
            self.tensors(),
            round=self.round,
            commit=self.digest,
            fingerprint=self.fingerprint(),
            local=self._local_state(),
            changes=self.course.changes,
        )

    def write_part(self, folder: Path) -> None:
        """What this rank has of a snapshot into a folder of the store, durably."""
        ranks = self.strategy.ranks
        with collective_errors(ranks):
            parts = self.strategy.replicated_parts()
            write_parts(folder / DATA, self.tensors(), parts, is_first=ranks.index == 0)
            write_file(folder / local_name(ranks.index, ranks.count), encode(self._local_state()))

    def _local_state(self) -> LocalState:
        return LocalState(self.round, self.strategy.local_state_dict())

    def take_local_state(self, folder: Path) -> bool:
        """Momentum and the like, from beside a snapshot of this round; False: there is none that was saved by
        as many ranks. Raises BadLocalState and OSError."""
        ranks = self.strategy.ranks
        with collective_errors(ranks):
            local = read_local(folder, local_name(ranks.index, ranks.count))
        is_here = local is not None and local.round == self.round
        if ranks.sums([float(is_here)])[0] < ranks.count:
            return False
        assert local is not None
        with collective_errors(ranks):
            try:
                self.strategy.load_state_dict(local.strategy)
            except (ConfigError, LookupError, TypeError, ValueError) as e:
                raise BadLocalState(f"{type(e).__name__}: {e}") from e
            finally:
                self._options_of(self.course)  # the ledger's, not those of the file
        return True

    def begin(self, base: bytes | Path | None) -> None:
        """Becomes the replica before round 1. `base`: the base weights, bytes or a file; None: exact
        initialisation."""
        with collective_errors(self.strategy.ranks):
            initialise(self.model, self._genesis, self._seed, base)
        self.strategy.begin()
        self._follow(Course.of(self._genesis.config))
        self.round, self.digest, self.counted = 0, self.run_id, {}
        self._lr_factor = float32_of_bits(self._genesis.lr_factor_bits)

    def _become(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, t in self.tensors().items():
                t.copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class Saved:
    """Replicated state on the CPU: after `round`, whose commit has this digest."""

    round: int
    digest: bytes
    lr_factor: float
    course: Course
    peers: dict[int, str]
    tensors: dict[str, Tensor]


def _alike(rounds: Sequence[Round], courses: Sequence[Course]) -> Iterator[tuple[Course, Sequence[Round]]]:
    """Cut where settings change: a change acts from its round on. `courses`: what holds in each round."""
    first = 0
    for end in range(1, len(rounds) + 1):
        if end == len(rounds) or courses[end] is not courses[first]:
            yield courses[first], rounds[first:end]
            first = end


def _rounds(before: int, last: int) -> str:
    """The rounds after `before`, in words."""
    return f"round {last}" if last == before + 1 else f"one of the rounds {before + 1} to {last}"


def build_replica(
    run_id: bytes, genesis: GenesisBody, task: Task, peer_id: str = "", device: torch.device | str = "cpu"
) -> Replica:
    """The replica of a run before its weights are set (see `Replica.begin` and `Replica.adopt`).

    `peer_id`: whose; empty for one that makes no offers. Raises Incompatible when the task's model is not the
    run's, and ConfigError for an unknown strategy.
    """
    model = in_dtype(task.model(), parse_config(genesis.config)).to(device)
    return Replica(run_id, genesis, model, strategy_for(genesis, task, model), peer_id)


def strategy_for(genesis: GenesisBody, task: Task, model: nn.Module) -> Strategy:
    """The run's, over the task's model. Raises as `build_replica` does."""
    strategy = build_strategy(parse_config(genesis.config).strategy, model.named_parameters())
    check_layout(genesis, layout_of(model, task))
    return strategy
