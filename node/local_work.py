"""What a peer does for itself in a round: batches, a payload, work ahead, evaluation. It may be sloppy.

On a node of several ranks each has one of these over its shards; all call the same methods in the same order.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

import torch

from ..compression.base import Payload, Turn
from ..compression.errors import BadPayload, ConfigError
from ..optim.auditing.evidence import Evidence
from ..optim.base import Allotment, Closure
from .auditing.earlier import Earlier
from .phases import Stopwatch, time_compressor
from .precision import Precision, autocast
from .replica import Replica, data_seed
from .tasks.base import Task, device_of


@dataclass(frozen=True, slots=True)
class Proposal:
    """What goes into an offer for `round`: the encoded `payload`, and what it was made of.

    `n_samples`, `n_tokens`: of all its batches, those that were worked ahead among them; `n_batches`: drawn
    just now, not ahead. `loss`: their mean, in nats; None if every batch was dropped. `compute_s`, `pack_s`:
    what the local work and the packing of its outcome took.
    """

    round: int
    payload: bytes
    n_samples: int
    n_tokens: int
    loss: float | None
    n_batches: int
    compute_s: float = 0.0
    pack_s: float = 0.0


class LocalWork:
    """Of one replica on one task. `task` may be replaced before the first round.

    Raises ConfigError for a task that cannot split its batches where there are several ranks.
    """

    def __init__(self, replica: Replica, task: Task, precision: Precision = "auto") -> None:
        self.task = task
        self._replica = replica
        self._precision = precision
        self._turn: Turn | None = None
        self._n_drawn = self._n_tokens = 0
        self._ahead_for = self._n_drawn_ahead = self._n_tokens_ahead = 0
        self._kept: dict[int, Earlier] = {}
        """By round, for those to come."""
        self.own_held_out: float | None = None
        """What `evaluate_own` has found last."""
        ranks = replica.strategy.ranks
        self._split = () if ranks.count == 1 else (ranks.index, ranks.count)
        if self._split and "ranks" not in inspect.signature(task.draw).parameters:
            raise ConfigError(
                "the task cannot split a batch over the ranks of a node: its draw and evaluate take no "
                "rank and ranks (see thinwire.node.tasks.base.Task). Start the node with --ranks 1"
            )
        self._stopwatch = Stopwatch(time.perf_counter)
        # Its own payload is decoded, too, to be taken away.
        time_compressor(replica.strategy, self._stopwatch, decode="pack")
        self._set_mode()

    def propose(self, allotted: Allotment | None = None) -> Proposal:
        """The round after the one that the replica is at. `allotted`: how much of its work; None: all."""
        self._set_mode()  # between rounds the model is its owner's
        self._turn = turn = self._replica.turn()
        self._n_drawn = self._n_tokens = 0
        strategy = self._replica.strategy
        strategy.allotted = allotted or Allotment()
        watch = self._stopwatch
        watch.restart()
        with watch.phase("compute"):
            proposed = strategy.propose(self._draw, turn)
        with watch.phase("pack"):
            payload = self._replica.encode(proposed, turn)
        times = watch.rounds[-1]
        n_tokens = self._n_tokens + (self._n_tokens_ahead if strategy.n_ahead else 0)
        n_samples = self.task.n_samples * (self._n_drawn + strategy.n_ahead)
        self._n_tokens = self._n_tokens_ahead = 0
        return Proposal(
            turn.round,
            payload,
            n_samples,
            n_tokens,
            strategy.last_loss,
            self._n_drawn,
            compute_s=times["compute"],
            pack_s=times["pack"],
        )

    def propose_again(self, missed: Proposal) -> Proposal | None:
        """What missed its commit, for the round after the one that the replica is at, without further work;
        None: the strategy cannot."""
        turn = self._replica.turn()
        payload = self._replica.strategy.propose_again(turn)
        if payload is None:
            return None
        self._turn, self._n_drawn, self._n_tokens = turn, 0, 0
        return replace(missed, round=turn.round, payload=self._replica.encode(payload, turn), n_batches=0)

    def work_ahead(self, sent: bytes = b"") -> bool:
        """A piece of the next round's work: after `propose`, or before any commit with a strategy of some
        staleness; `sent`: this peer's payload in that commit, where the strategy does not know it any more.
        False, with nothing done, if there is none."""
        strategy, turn = self._replica.strategy, self._replica.turn()
        if strategy.staleness == 0:
            worked = strategy.work_ahead(self._draw, turn)
            self._n_tokens_ahead = self._n_tokens
            return worked
        self._set_mode()
        if self._ahead_for != turn.round + 1:
            self._ahead_for, self._n_drawn_ahead, self._n_tokens_ahead = turn.round + 1, 0, 0
        known = None
        with suppress(BadPayload):
            known = self._replica.decode(sent, turn) if sent else None
        return strategy.work_ahead(self._draw_ahead, turn, known)

    def keep(self) -> Earlier | None:
        """The weights that the offers for the round after the replica's are made from, for `audit`; None:
        they are gone. With a strategy of some staleness, to be called before every commit."""
        staleness, round_ = self._replica.strategy.staleness, self._replica.round + 1
        if staleness == 0 or round_ == 1:
            self._kept[round_] = Earlier(self._replica)
        if staleness:
            self._kept[round_ + staleness] = Earlier(self._replica, staleness)
        found = self._kept.get(round_)
        self._kept = {later: kept for later, kept in self._kept.items() if later > round_}
        return found

    def audit(
        self,
        payloads: Mapping[str, Payload],
        at: Earlier,
        seed: Callable[[int], int],
        n_batches: int,
        sent: Payload | None = None,
    ) -> list[Evidence | None]:
        """What speaks for payloads of a round, at the weights that they were made from, in their order.

        `payloads`: by the peer whose work each is; `seed`: of the batches that they are compared with, by
        number; `n_batches`: that are enough; `at`: the newest of `keep`; `sent`: see `Strategy.moved_by`.
        None: that cannot be told. Nothing changes, local state and the global generators included.
        """
        model, strategy = self._replica.model, self._replica.strategy
        numbers = count()

        def draw() -> Closure:
            return self._in_precision(self.task.draw(model, seed(next(numbers)), *self._split))

        turns = [at.turn_of(peer_id) for peer_id in payloads]
        model.eval()  # dropout would take from the global generators, norms would count a batch twice
        try:
            with at.in_place(), strategy.moved_by(sent, at.turn_before()):
                return strategy.audit(list(payloads.values()), draw, turns, n_batches)
        finally:
            self._set_mode()

    def evaluate(self) -> float:
        """The held-out loss of the replica, in nats: the mean over the ranks, the same on each."""
        model = self._replica.model
        model.eval()
        with torch.no_grad(), self._replica.strategy.replica():
            loss = self.task.evaluate(model, *self._split)
        self._set_mode()
        ranks = self._replica.strategy.ranks
        return ranks.sums([loss])[0] / ranks.count

    def evaluate_own(self) -> float | None:
        """The same of this peer's own model; None: it has none but the replica."""
        strategy, model = self._replica.strategy, self._replica.model
        if not strategy.has_own_model:
            return None
        model.eval()
        with torch.no_grad(), strategy.own_model():
            self.own_held_out = self.task.evaluate(model, *self._split)
        self._set_mode()
        return self.own_held_out

    def _draw(self) -> Closure:
        assert self._turn is not None, "propose() comes before work_ahead()"
        closure = self._batch(self._turn.round, self._n_drawn)
        self._n_drawn += 1
        self._n_tokens += self.task.n_tokens
        return closure

    def _draw_ahead(self) -> Closure:
        closure = self._batch(self._ahead_for, self._n_drawn_ahead)
        self._n_drawn_ahead += 1
        self._n_tokens_ahead += self.task.n_tokens
        return closure

    def _batch(self, round_: int, number: int) -> Closure:
        replica = self._replica
        seed = data_seed(replica.run_id, round_, replica.peer_id, number)
        return self._in_precision(self.task.draw(replica.model, seed, *self._split))

    def _in_precision(self, closure: Closure) -> Closure:
        device, needs_grad = device_of(self._replica.model), self._replica.strategy.needs_grad

        def computed() -> torch.Tensor:
            with autocast(self._precision, device, needs_grad):
                return closure()

        return computed

    def _set_mode(self) -> None:
        self._replica.model.train(self._replica.strategy.needs_grad)
