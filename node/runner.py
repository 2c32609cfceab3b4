"""One node in one run, from `Link.open` to the last round: its parts, how it begins and how it ends."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

from ..coordinator.protocol.messages import GenesisBody, NodeState, as_text
from .config import RunConfig
from .evaluation.supervising import Evaluations
from .following import LedgerFollower
from .gossip.telling import gossiping
from .healing import Healer
from .joining import Joiner
from .links.base import Link
from .local_work import LocalWork
from .precision import Precision
from .preparing import PreparedRun, prepare_run
from .ranks.leader import Leader
from .replica import Replica
from .result import Result
from .snapshots.names import SNAPSHOTS
from .snapshots.publishing import SnapshotPublisher
from .system.memory import give_back
from .tasks.base import Task
from .tracking.metrics import NodeMetrics
from .tracking.observer import Applied, Observer
from .tracking.round_statistics import RoundStatistics
from .tracking.trackers import Tracks
from .trust.start_check import StartCheck, Verify

log = logging.getLogger("thinwire.node")


def _nothing(_runner: Runner) -> None: ...


class Runner:
    """One node in one run.

    `import_path` and `data` come from the user's own command line (see `tasks.make_task`); `task`: one that
    is there already, instead of both. `folder`: where snapshots are kept, to be resumed from and served;
    None: a temporary one. `stop` may be set from any thread (or a signal handler): the node leaves the swarm
    cleanly. `leader`: the node has several ranks, this is rank 0's. `tracks`: where the run log goes;
    `evaluations`: of the weights, beside the training; whoever opened these closes them. `verify`: what to do
    about a snapshot that others vouch for. `offload_idle`: see `Diloco.aside`. `clock`: in seconds.

    Called with this runner, in the node's thread: `on_prepared` once task, model and strategy are there,
    before the replica has weights; `on_proposing` whenever it is about to do local work for an offer.
    """

    def __init__(
        self,
        link: Link,
        *,
        import_path: str | None = None,
        data: Path | None = None,
        task: Task | None = None,
        device: str = "cpu",
        folder: Path | None = None,
        metrics: NodeMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        precision: Precision = "auto",
        leader: Leader | None = None,
        tracks: Tracks | None = None,
        evaluations: Evaluations | None = None,
        verify: Verify = "background",
        offload_idle: bool = False,
        on_prepared: Callable[[Runner], object] = _nothing,
        on_proposing: Callable[[Runner], object] = _nothing,
    ) -> None:
        self.link = link
        self.evaluations = evaluations
        self.metrics = metrics or NodeMetrics()
        self.stop = threading.Event()
        self._folder, self.device = folder, torch.device(device)
        self._clock, self._since_s = clock, clock()
        self._tracks = tracks or Tracks(self.metrics)
        self._prepare = partial(
            prepare_run,
            import_path=import_path,
            data=data,
            task=task,
            device=self.device,
            precision=precision,
            leader=leader,
            folder=folder,
            offload_idle=offload_idle,
        )
        self._verify = verify
        self._on_prepared, self._on_proposing = on_prepared, on_proposing
        self._prepared: PreparedRun | None = None
        self._result: Result | None = None

    @property
    def prepared(self) -> PreparedRun:
        """Raises RuntimeError before the link was opened by `run`."""
        if self._prepared is None:
            raise RuntimeError("the run has not been opened yet")
        return self._prepared

    @property
    def folder(self) -> Path | None:
        """Where this run's state is kept; None: nowhere."""
        return self._folder

    @property
    def genesis(self) -> GenesisBody:
        return self.prepared.genesis

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @property
    def replica(self) -> Replica:
        return self.prepared.replica

    @property
    def work(self) -> LocalWork:
        return self.prepared.work

    def run(self) -> Result:
        """Raises what `Link.open` and `Link.commits` raise, Incompatible, ConfigError, NoStart and
        ReplicaDiverged."""
        rounds = self.rounds()
        next(filter(None, rounds), None)
        give_back()  # what torch, kernels and a first round have freed
        for _ in rounds:
            pass
        assert self._result is not None
        return self._result

    @property
    def result(self) -> Result | None:
        """Once the last round was applied, or this node was stopped."""
        return self._result

    def rounds(self) -> Iterator[Applied | None]:
        """The same round by round, see `LedgerFollower.follow`. Raises what `run` raises."""
        welcome = self.link.open()
        try:
            run = self._prepared = self._prepare(self.link, welcome)
            if self.evaluations is not None:
                self.evaluations.check(run)
            self._on_prepared(self)
        except Exception as e:
            self._leave(e)
            raise
        self.metrics.gossip_told = partial(gossiping, run)
        statistics = RoundStatistics(run, self.metrics, self._tracks)
        with self._publisher(run) as publisher:
            try:
                joiner = self._joiner(run, publisher)
                check = StartCheck(
                    self.link,
                    run.history,
                    joiner,
                    publisher,
                    run.spare,
                    self._verify,
                    me=lambda: run.peer_index,
                )
                with closing(check):
                    yield from self._follower(run, joiner, check, publisher, statistics).follow()
            except BaseException as e:
                statistics.ended(run.replica.round)
                self._leave(e)
                raise
            statistics.ended(run.replica.round)
            self._leave(None)
        self._result = statistics.result()

    def _leave(self, error: BaseException | None) -> None:
        """The coordinator hears of an error: without it, and with every node gone, nobody there would know
        why."""
        word = ""
        if isinstance(error, Exception) and not self.stop.is_set():
            word = as_text(f"{type(error).__name__}: {error}")
        self.link.state(NodeState.LEAVING, last_word=word)

    def request_stop(self) -> None:
        """Safe in a signal handler: leaves the swarm after what is being computed right now."""
        self.stop.set()
        threading.Thread(target=self.link.close, name="leave", daemon=True).start()

    def _proposing(self) -> None:
        if self.evaluations is not None:
            self.evaluations.look(self.prepared)
        self._on_proposing(self)

    @contextmanager
    def _publisher(self, run: PreparedRun) -> Iterator[SnapshotPublisher]:
        """Own snapshots are written and served meanwhile; the replica is written once more in the end."""
        with _folder_or_temporary(self._folder) as folder:
            publisher = SnapshotPublisher(
                self.link, run.replica, run.history, folder / SNAPSHOTS, me=lambda: run.peer_index
            )
            try:
                yield publisher
                if self._folder is not None:
                    publisher.write()
            finally:
                self.link.serve(None)
                publisher.close()

    def _joiner(self, run: PreparedRun, publisher: SnapshotPublisher) -> Joiner:
        return Joiner(
            self.link,
            run.replica,
            publisher.store,
            run.history,
            base=run.genesis.base,
            base_blobs=run.base_blobs,
            kept_from=run.kept_from,
            stopped=self.stop.is_set,
            me=lambda: run.peer_index,
        )

    def _follower(
        self,
        run: PreparedRun,
        joiner: Joiner,
        check: StartCheck,
        publisher: SnapshotPublisher,
        observer: Observer,
    ) -> LedgerFollower:
        healer = Healer(
            self.link,
            run.replica,
            run.history,
            joiner,
            me=lambda: run.peer_index,
            device=self.device,
            is_verified=lambda: publisher.is_verified,
            discard=publisher.discard,
        )
        return LedgerFollower(
            run,
            joiner=joiner,
            healer=healer,
            check=check,
            publisher=publisher,
            observer=observer,
            clock=self._clock,
            since_s=self._since_s,
            stopped=self.stop.is_set,
            on_proposing=self._proposing,
        )


@contextmanager
def _folder_or_temporary(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="thinwire-node-") as temporary:
        yield Path(temporary)
