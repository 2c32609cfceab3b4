"""The node's loop, one for live rounds and for catching up: for every commit, apply and report;
if it was the newest one, propose and offer.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from thinwire.compression.errors import ReplicaDiverged, SwarmUnreachable, ThinwireError
from thinwire.coordinator.messages import (
    BlobRef,
    Commit,
    GenesisBody,
    NodeState,
    Offer,
    OfferEntry,
    Report,
    Welcome,
)
from thinwire.node.config import RunConfig, parse_config
from thinwire.node.genesis import initialise
from thinwire.node.link import Link
from thinwire.node.metrics import NodeMetrics
from thinwire.node.replica import Replica, build_replica, data_seed
from thinwire.node.tasks import Task, make_task
from thinwire.optim.base import Closure

log = logging.getLogger("thinwire.node")

SNAPSHOT_TRIES = 3


class NoDonor(ThinwireError):
    """Nobody can give a late joiner the replica."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished node knows. `fingerprint` is hex; `held_out`: (round, nats) that this node measured."""

    rounds: int
    fingerprint: str
    held_out: tuple[tuple[int, float], ...]
    sent_bytes: int
    received_bytes: int
    payload_bytes: int
    counted: int
    missed: int


class Runner:
    """One node in one run, from `open` to the last round.

    `import_path` and `data` come from the user's own command line (see `tasks.make_task`).
    `stop` may be set from any thread (or a signal handler): the node leaves the swarm cleanly.
    """

    def __init__(
        self,
        link: Link,
        *,
        import_path: str | None = None,
        data: Path | None = None,
        device: str = "cpu",
        metrics: NodeMetrics | None = None,
    ) -> None:
        self.link = link
        self.import_path = import_path
        self.data = data
        self.device = torch.device(device)
        self.metrics = metrics or NodeMetrics()
        self.stop = threading.Event()
        self._offered_round = 0
        self._counted = self._missed = self._payload_bytes = 0
        self._held_out: list[tuple[int, float]] = []

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Raises what `Link.open` and `Link.commits` raise, Incompatible, ConfigError, NoDonor."""
        welcome = self.link.open(None, None)
        self._prepare(welcome)
        if welcome.head_round > 0:
            self.link.state(NodeState.JOINING)
            take_replica(self.link, self.replica, welcome.head_round)
        try:
            self._follow()
        finally:
            self.link.state(NodeState.LEAVING)
        return self.result()

    def request_stop(self) -> None:
        """Safe in a signal handler: leaves the swarm after what is being computed right now."""
        self.stop.set()
        threading.Thread(target=self.link.close, name="leave", daemon=True).start()

    def _prepare(self, welcome: Welcome) -> None:
        """Task, model, strategy, base weights; nothing is downloaded before the layout was compared."""
        body: GenesisBody = welcome.body
        self.config: RunConfig = parse_config(body.config)
        self.peer_index = welcome.peer_index
        self.task: Task = make_task(self.config.task, self.import_path, self.data)
        self.replica = build_replica(self.link.run_id, body, self.task, self.link.peer_id, self.device)
        self.model: nn.Module = self.replica.model
        strategy = self.replica.strategy
        self.task.load(self._download(body.corpus, "text"), self._download(body.held_out, "held-out text"))
        if welcome.head_round == 0:
            initialise(self.model, body, self.config.run.seed, self._download(body.base, "base weights"))
        self.model.train(strategy.needs_grad)
        n_parameters = sum(p.tensor.numel() for p in strategy.parameters_in_order())
        log.info(
            "run %s: %d parameters, strategy %s, %d rounds, peer %d",
            *(self.config.run.name, n_parameters, self.config.strategy["name"], self.config.run.rounds),
            self.peer_index,
        )

    def _download(self, blob: BlobRef | None, what: str) -> bytes | None:
        if blob is None:
            return None
        log.info("fetching the %s (%s bytes)", what, f"{blob.n_bytes:,}")
        return self.link.fetch(blob.digest)

    def _follow(self) -> None:
        rounds = self.config.run.rounds
        started_s = time.monotonic()
        if self.replica.round == rounds:
            self._report(evaluate=False)
            return
        if self.replica.round >= self.link.head:
            self.link.state(NodeState.TRAINING)
            if self.replica.round == 0:
                self._report(evaluate=self.peer_index == 0)
            self._propose()
        for commit in self.link.commits(self.replica.round):
            if self.stop.is_set():
                return
            self._apply(commit)
            at_head = self.replica.round >= self.link.head
            self._report(evaluate=commit.body.evaluator == self.peer_index and at_head)
            if self.link.wanted_snapshot():
                self._publish_snapshot()
            self.metrics.round(self.replica.round, time.monotonic() - started_s, self.link.traffic())
            started_s = time.monotonic()
            if self.replica.round == rounds:
                return
            if at_head:
                self.link.state(NodeState.TRAINING)
                self._propose()

    # ------------------------------------------------------------------------------------------ one round

    def _propose(self) -> None:
        """This replica is at the head of the ledger: local work and an offer for the next round."""
        turn = self.replica.turn()
        micro_batches = 0

        def draw() -> Closure:
            nonlocal micro_batches
            seed = data_seed(self.replica.run_id, turn.round, self.link.peer_id, micro_batches)
            micro_batches += 1
            return self.task.draw(self.model, seed)

        strategy = self.replica.strategy
        started_s = time.monotonic()
        payload = self.replica.encode(strategy.propose(draw, turn), turn)
        self._offered_round = turn.round
        self._payload_bytes += len(payload)
        self.metrics.proposed(strategy.last_loss, len(payload), time.monotonic() - started_s)
        self.link.offer(
            Offer(
                round=turn.round,
                n_samples=self.task.n_samples * micro_batches,
                n_tokens=self.task.n_tokens * micro_batches,
                loss=strategy.last_loss,
                n_bytes=len(payload),
                payload=payload,
                digest=None,
            )
        )

    def _apply(self, commit: Commit) -> None:
        offered = self._offered_round == commit.body.round
        started_s = time.monotonic()
        own = self.replica.apply(commit, self._payload, offered)
        self._counted += own == "counted"
        self._missed += own == "missed"
        self.metrics.applied(own, time.monotonic() - started_s)
        counted = commit.body.offers
        losses = [o.loss for o in counted if o.loss is not None]
        log.info(
            "round %d/%d: %d offers, loss %s%s",
            *(self.replica.round, self.config.run.rounds, len(counted)),
            f"{sum(losses) / len(losses):.4f}" if losses else "-",
            ", ours came too late" if own == "missed" else "",
        )

    def _payload(self, offer: OfferEntry) -> bytes:
        return offer.payload if offer.payload is not None else self.link.fetch(offer.digest or b"")

    def _publish_snapshot(self) -> None:
        blob = self.replica.snapshot()
        digest = self.link.publish(blob)
        self.link.report(Report(round=self.replica.round, snapshot=digest, snapshot_bytes=len(blob)))

    def _report(self, evaluate: bool) -> None:
        """The fingerprint when it is due, the held-out loss when this node is asked to measure it."""
        due = self.replica.round == self.config.run.rounds or (
            self.replica.round > 0 and self.replica.round % self.config.run.verify_every == 0
        )
        held_out = self._evaluate() if evaluate else None
        if due or held_out is not None:
            fingerprint = self.replica.fingerprint() if due else None
            self.link.report(Report(round=self.replica.round, fingerprint=fingerprint, held_out=held_out))

    def _evaluate(self) -> float:
        self.model.eval()
        with torch.no_grad():
            loss = self.task.evaluate(self.model)
        self.model.train(self.replica.strategy.needs_grad)
        self._held_out.append((self.replica.round, loss))
        self.metrics.held_out(loss)
        log.info("round %d: held-out loss %.4f", self.replica.round, loss)
        return loss

    def result(self) -> Result:
        traffic = self.link.traffic()
        return Result(
            rounds=self.replica.round,
            fingerprint=self.replica.fingerprint().hex(),
            held_out=tuple(self._held_out),
            sent_bytes=sum(traffic.sent.values()),
            received_bytes=sum(traffic.received.values()),
            payload_bytes=self._payload_bytes,
            counted=self._counted,
            missed=self._missed,
        )


def take_replica(link: Link, replica: Replica, head: int) -> None:
    """Takes the whole replica from a live node; what came after it is on the ledger. Raises NoDonor."""
    for _ in range(SNAPSHOT_TRIES):
        log.info("the run is at round %d: asking a live node for its replica", head)
        ref = link.snapshot()
        if ref is None:
            raise NoDonor(
                f"the run is at round {head} and no live node can give its replica. "
                f"Start this node again once another one trains, or start a new run."
            )
        try:
            blob = link.fetch(ref.digest, ref.holder)
            replica.adopt(blob, next(link.commits(ref.round - 1)))
        except (SwarmUnreachable, ReplicaDiverged) as e:
            log.warning("the replica from %s cannot be used (%s); asking another node", ref.holder, e)
            continue
        log.info("took the replica after round %d (%s bytes)", ref.round, f"{ref.n_bytes:,}")
        return
    raise NoDonor(f"{SNAPSHOT_TRIES} snapshots in a row could not be used; see the warnings above")


def follow_events(link: Link) -> threading.Thread:
    """Logs what the link waits for until it is closed."""

    def pump() -> None:
        for event in link.events():
            log.log(logging.WARNING if event.warning else logging.INFO, "%s", event.text)

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    return thread
