"""A run as the user of a training loop sees it: a context, and in it an iterator over rounds."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.figures import finite, mean_loss
from ...coordinator.protocol.messages import CommitBody
from ..result import Result
from ..runner import Runner
from ..tracking.observer import Applied

log = logging.getLogger("thinwire.node")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to. `round`: the number of the replica's last one, of `rounds` in the run.

    `loss`: the mean over the counted offers, None if none told a finite one; `peers`: how many counted;
    `counted`: whether this node's own offer did, None if it made none; `lr`: the next round's learning rate.
    """

    round: int
    rounds: int
    loss: float | None
    peers: int
    counted: bool | None
    lr: float


class Swarm:
    """This process's part in a run. `opening`: its runner, with all that is given back in the end.

        with swarm:
            for outcome in swarm:
                ...

    Entering connects, compares the model with the run's and brings it to the newest round. Leaving saves the
    replica and says goodbye, whatever ended the block. All happens in the caller's thread. Not to be entered
    twice.
    """

    def __init__(self, opening: AbstractContextManager[Runner]) -> None:
        self._opening = opening
        self._stack = ExitStack()
        self._entered: Runner | None = None
        self._rounds: Iterator[Applied | None] = iter(())
        self._seen: dict[str, tuple[int, int]] | None = None

    def __enter__(self) -> Self:
        """Raises what `Runner.run` raises."""
        if self._entered is not None:
            raise RuntimeError("this swarm was entered before: call join() anew")
        with ExitStack() as stack:
            runner = self._entered = stack.enter_context(self._opening)
            self._rounds = runner.rounds()
            stack.callback(self._leave)
            self._advance(to_head=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Outcome]:
        return self

    def __next__(self) -> Outcome:
        """One round: waits until it is committed, applies it, and makes an offer for the next one. Several at
        once, if the caller let them pass. StopIteration: the run is over.

        Raises KeyboardInterrupt once the replica is safe, SwarmUnreachable, ReplicaDiverged, ConfigError (the
        model was changed since), and what the caller's `loss` and batches raise."""
        while (applied := self._advance()) is not None:
            bodies = [commit.body for commit in applied.commits if commit.body.offers]
            if bodies:  # else the record only changes the run
                return self._outcome(applied, bodies[-1])
        raise StopIteration

    def _outcome(self, applied: Applied, body: CommitBody) -> Outcome:
        return Outcome(
            round=self.round,
            rounds=self.rounds,
            loss=finite(mean_loss(body)),
            peers=len(body.offers),
            counted=None if applied.own is None else applied.own == "counted",
            lr=self.lr,
        )

    # ---------------------------------------------------------------------------------- what can be asked

    @property
    def _runner(self) -> Runner:
        if self._entered is None:
            raise RuntimeError("enter the swarm first: `with join(...) as swarm:`")
        return self._entered

    @property
    def round(self) -> int:
        """The last one that the model has: 0 before the first."""
        return self._runner.replica.round

    @property
    def rounds(self) -> int:
        """Of the whole run, as far as is known now: its owner may change it."""
        return self._runner.replica.course.n_rounds

    @property
    def is_over(self) -> bool:
        """Whether the model has the run's last round."""
        return self._runner.prepared.is_over

    @property
    def lr(self) -> float:
        """The strategy's learning rate times the schedule's factor, for the next round."""
        replica = self._runner.replica
        return float(replica.strategy.option("lr")) * replica.turn().lr_factor

    @property
    def peer_id(self) -> str:
        """This node's, as the others know it."""
        return self._runner.link.peer_id

    @property
    def fingerprint(self) -> str:
        """Of the replica, in hex: the same on all nodes after the same round."""
        return self._runner.replica.fingerprint().hex()

    @property
    def config(self) -> dict[str, Any]:
        """The run's, as its run file would say it; what its owner changed since is not in it."""
        config: dict[str, Any] = self._runner.config.model_dump(mode="json")
        return config

    @property
    def result(self) -> Result | None:
        """What this node did, once it has left; None before, and if it was cut short."""
        return self._runner.result

    def save(self, path: Path | str) -> None:
        """The weights as safetensors; the file is whole or not there. Raises ConfigError."""
        try:
            self._runner.replica.save_weights(Path(path))
        except OSError as e:
            raise ConfigError(f"{path} cannot be written: {e.strerror}") from e

    # ------------------------------------------------------------------------------------------- rounds

    def _advance(self, *, to_head: bool = False) -> Applied | None:
        """The next round of training; None at the end of the run. `to_head`: no further than to its head."""
        self._refuse_changes()
        with torch.enable_grad(), _ctrl_c_waits(self._runner):
            for applied in self._rounds:
                if (applied is None and to_head) or (applied is not None and applied.is_training):
                    self._seen = self._versions()
                    return applied
        self._seen = None
        return None

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Name -> what changes when somebody writes into the parameter or puts another in its place."""
        named = self._runner.replica.strategy.parameters_in_order()
        return {p.name: (p.tensor._version, p.tensor.data_ptr()) for p in named}

    def _refuse_changes(self) -> None:
        if self._seen is None:
            return
        now = self._versions()
        changed = [name for name, version in self._seen.items() if now[name] != version]
        if changed:
            self._seen = {}
            raise ConfigError(
                f"the model was changed between rounds ({', '.join(changed[:3])}): it is this node's "
                "replica, which only the swarm may change. Work on a copy (copy.deepcopy(model)); leave "
                "optimizer steps, load_state_dict and the like to it"
            )

    def _leave(self) -> None:
        """The replica is saved, unless a round was interrupted or somebody changed it: then the node goes on
        from an earlier snapshot and the ledger."""
        if self._entered is None:
            return
        self._entered.stop.set()
        self._entered.link.close()
        changed = self._seen is not None and self._versions() != self._seen
        if changed:
            log.warning("the model was changed between rounds: it is not saved as this node's replica")
            close = getattr(self._rounds, "close", None)
            if close is not None:
                close()
            return
        with suppress(ThinwireError):  # what broke was what is being stopped
            for _ in self._rounds:
                pass


@contextmanager
def _ctrl_c_waits(runner: Runner) -> Iterator[None]:
    """Ctrl-C asks the node to leave, and is raised when the replica is safe; a second one right away."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True
        log.warning("SIGINT: leaving the swarm cleanly (again to stop at once)")
        runner.request_stop()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except ThinwireError:
        if not came:
            raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
