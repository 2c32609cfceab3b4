"""One swarm of honest and bad peers: real nodes as threads of this process, over a coordinator's service."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from ....compression.errors import ReplicaDiverged, ThinwireError
from ....coordinator.protocol.identity import peer_id_of
from ....coordinator.protocol.messages import Offer
from ...config import RunConfig, load_config
from ...genesis import make_genesis
from ...links.base import Link
from ...links.local import LocalSwarm, local_swarm
from ...runner import Runner
from ...tasks.corpora import read_text
from ...tasks.registry import make_task
from .bad_peers import Attack, BadPeer, Board, changed_link, invert
from .neighbours import lie_to_neighbours

LOCO: Final = {"feedback_decay": 0.95, "outer_lr": 1.0, "outer_momentum": 0.0}

STRATEGIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "decoupled": {"name": "decoupled", "lr": 3e-3, "beta": 0.95},
    "decoupled-without-sign": {
        "name": "decoupled",
        "lr": 0.3,
        "beta": 0.95,
        "sign": False,
        "compressor": {"name": "dct_topk", "bits": 8},
    },
    "diloco-dense": {
        "name": "diloco",
        "lr": 3e-3,
        "inner_steps": 3,
        "compressor": {"name": "dense", "bits": "e3m0"},
    },
    "diloco-sparse": {
        "name": "diloco",
        "lr": 3e-3,
        "inner_steps": 3,
        **LOCO,
        "compressor": {"name": "topk", "k": 64, "bits": 2},
    },
    "gossip": {"name": "gossip", "lr": 3e-3, "inner_steps": 3, "topology": "ring", "merge_every": 5},
    "spsa": {"name": "spsa", "lr": 6e-4, "probes": 4},
}
"""What a row is called -> a run's [strategy]; all else is what new runs have."""

TASK: Final = {"layers": 1, "width": 32, "heads": 2, "context": 32, "batch": 4, "held_out_bytes": 8192}
"""The built-in text, and a model of 32 thousand parameters."""

LONGEST_JOIN_S: Final = 60.0
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """One swarm to be trained. `attack`: None, the bad peers' offers never arrive. `seed`: of weights and
    batches: runs that differ in their attack only are paired; with other settings a run has another id, and
    so other batches. `settings`: dotted key -> value, over the rest. `watched_from`: the loss is measured
    after every round from this one on. `joins_after`: so many rounds, then the bad peers join."""

    strategy: Mapping[str, Any]
    attack: Attack | None
    n_honest: int
    n_bad: int
    n_rounds: int
    seed: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    watched_from: int | None = None
    joins_after: int = 0

    @property
    def n_peers(self) -> int:
        """With all identities."""
        return self.n_honest + self.n_bad * (1 if self.attack is None else self.attack.identities)

    @property
    def n_first(self) -> int:
        """Of them, those who are there from the start."""
        return self.n_honest if self.joins_after else self.n_peers

    def config(self) -> RunConfig:
        """Raises ConfigError."""
        run = {"rounds": self.n_rounds, "min_peers": self.n_first, "seed": self.seed, "eval_every": 0}
        flat: dict[str, Any] = {f"run.{key}": value for key, value in run.items()}
        flat |= {f"task.{key}": value for key, value in TASK.items()}
        flat |= {f"strategy.{key}": value for key, value in self.strategy.items()}
        flat |= {"policy.name": "all", "schedule.warmup_rounds": min(5, self.n_rounds)}
        flat |= {"network.heartbeat_s": 60.0}  # nobody is given up because the machine is busy
        return load_config(None, flat | dict(self.settings), environ={})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the honest peers. `held_out`: their loss after the last round, infinite: the replica did
    not stay finite. `fingerprint`: of all of their replicas, `weights` by name. `found_after`: so many
    rounds, then no bad peer's offer weighs anything any more; None: not so far. `judged`: every audit that
    was decided: in which round, of which peer's offer, and whether it has failed. `losses`: held-out ones by
    round, as far as they were watched."""

    held_out: float
    fingerprint: bytes
    weights: Mapping[str, Tensor]
    found_after: int | None
    judged: Sequence[tuple[int, int, bool]] = ()
    losses: Mapping[int, float] = field(default_factory=dict)

    def loss_after(self, round_: int | None) -> float:
        """None, or a round that was not watched: the last one's."""
        return self.held_out if round_ is None else self.losses.get(round_, self.held_out)


def trained(plan: Plan) -> Outcome:
    """Raises ConfigError, and ThinwireError if honest replicas differ or a node fails."""
    with tempfile.TemporaryDirectory(prefix="thinwire-attacks-") as folder:
        return _Swarm(plan, Path(folder)).run()


class _Swarm:
    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        self._board = Board()
        self._found: dict[int, int] = {}
        """Peer index -> the last round that it weighed anything in."""
        self._judged: list[tuple[int, int, bool]] = []
        self._losses: dict[int, float] = {}
        self._audited = dict.fromkeys(range(plan.n_peers), (0, 0))
        """By peer: how many audits have passed and failed."""
        self._errors: list[Exception] = []
        self._may_join, self._have_joined = threading.Event(), threading.Event()
        self._came = set[str]()
        """Of the bad peers, who has begun to train."""

    def run(self) -> Outcome:
        plan, config = self._plan, self._plan.config()
        # Nobody else meets this coordinator: with a key and a time that are always the same, batches and
        # noise are the same in every execution.
        key = Ed25519PrivateKey.from_private_bytes(plan.seed.to_bytes(32, "little"))
        genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(key.public_key()), 0)
        with local_swarm(self._folder, genesis.body, key, blobs=genesis.blobs, lose=self._is_lost) as swarm:
            honest = [self._honest(swarm, i) for i in range(plan.n_honest)]
            bad = [self._bad(swarm, i) for i in range(plan.n_peers - plan.n_honest)]
            runners = [*honest, *bad]
            self._train(runners[: plan.n_first], runners[plan.n_first :])
            return self._outcome(honest)

    def _is_lost(self, peer_id: str, round_: int) -> bool:
        attack = self._plan.attack
        last = 0 if attack is None else attack.leaves_after
        return last is not None and round_ > last and peer_id.startswith("bad")

    def _honest(self, swarm: LocalSwarm, number: int) -> Runner:
        peer_id = f"honest-{number}"

        def seen(offer: Offer) -> Offer:
            self._board.put(peer_id, offer.round, offer.payload or b"")
            return offer

        link = changed_link(swarm.link(peer_id), seen)
        return Runner(link, on_proposing=self._look) if number == 0 else Runner(link)

    def _bad(self, swarm: LocalSwarm, number: int) -> Runner:
        peer_id, attack = f"bad-{number}", self._plan.attack
        link: Link = swarm.link(peer_id)
        runner = partial(Runner, on_proposing=lambda _runner: self._comes(peer_id))
        if attack is None:
            return runner(link)
        if attack.lies is not None:
            return runner(link, on_prepared=partial(lie_to_neighbours, attack.lies))
        if attack.other_data:
            text = self._folder / "other-data.txt"
            text.write_bytes(read_text("stdlib"))
            return runner(link, data=text)
        peer = BadPeer(attack, peer_id, self._board, self._victim(attack, number))
        made: list[Runner] = []
        link = changed_link(link, lambda offer: peer.offer(offer, made[0].replica, made[0].genesis))
        made.append(runner(link, on_prepared=invert) if attack.inverts else runner(link))
        return made[0]

    def _comes(self, peer_id: str) -> None:
        self._came.add(peer_id)
        if len(self._came) == self._plan.n_peers - self._plan.n_honest:
            self._have_joined.set()

    def _victim(self, attack: Attack, number: int) -> str:
        if attack.copies == "honest":
            return f"honest-{number % self._plan.n_honest}"
        return "bad-0" if attack.copies == "bad" and number > 0 else ""

    def _look(self, runner: Runner) -> None:
        """Who is found out by now: the first honest peer looks before each of its offers."""
        standing, round_ = runner.prepared.history.standing, runner.replica.round
        if self._plan.watched_from is not None and round_ >= self._plan.watched_from:
            self._losses[round_] = runner.work.evaluate()
        if round_ >= self._plan.joins_after and not self._may_join.is_set():
            self._may_join.set()
            if self._plan.n_first < self._plan.n_peers:  # in which round they begin is no chance
                self._have_joined.wait(LONGEST_JOIN_S)
        for index, before in self._audited.items():
            now = self._audited[index] = standing.audited(index)
            for failed in (False, True):
                self._judged += [(round_, index, failed)] * (now[failed] - before[failed])
        for index in range(self._plan.n_honest, self._plan.n_peers):
            if standing.is_condemned(index):
                self._found.setdefault(index, round_)

    def _train(self, first: list[Runner], late: list[Runner]) -> None:
        threads = self._started(first)
        while late and any(thread.is_alive() for thread in threads):
            if self._may_join.wait(POLL_S):
                threads += self._started(late)
                break
        for thread in threads:
            thread.join()

    def _started(self, runners: list[Runner]) -> list[threading.Thread]:
        for runner in runners:  # admitted in this order in every execution
            runner.link.open()
        threads = [threading.Thread(target=self._in_thread, args=(r.run,), daemon=True) for r in runners]
        for thread in threads:
            thread.start()
        return threads

    def _in_thread(self, run: Callable[[], object]) -> None:
        try:
            run()
        except Exception as e:  # noqa: BLE001 - told by the thread that asked for the training
            self._errors.append(e)

    def _outcome(self, honest: list[Runner]) -> Outcome:
        for error in self._errors:
            if not isinstance(error, ReplicaDiverged):
                raise error
        if self._errors:
            return Outcome(inf, b"", {}, None)
        fingerprints = {runner.replica.fingerprint() for runner in honest}
        if len(fingerprints) != 1:
            raise ThinwireError("the replicas of honest peers differ")
        is_found = len(self._found) == self._plan.n_peers - self._plan.n_honest > 0
        found_after = max(self._found.values()) if is_found else None
        first = honest[0]
        loss, weights = first.work.evaluate(), first.replica.weights()
        return Outcome(loss, fingerprints.pop(), weights, found_after, self._judged, self._losses)
