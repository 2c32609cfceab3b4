"""From the answer of a coordinator to a run that can be trained: config, task, model and strategy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from ..compression.errors import ConfigError
from ..coordinator.protocol.messages import BlobRef, GenesisBody, Welcome
from ..optim.base import Strategy
from ..optim.sapo import Sapo
from .config import RunConfig, parse_config
from .gossip.swarm import meet_neighbours
from .history import History
from .links.base import Link
from .local_work import LocalWork
from .precision import Precision
from .ranks.leader import Leader
from .replica import Replica, build_replica
from .states.kept_blobs import KeptBlobs
from .tasks.base import Task, Writes
from .tasks.registry import make_task
from .trust.spare import spare_replica
from .units import human_bytes
from .workload import Workload

log = logging.getLogger("thinwire.node")


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run on this node, and where its replica is on the ledger.

    `given_index`: what the coordinator calls this node until a commit has admitted it (another one may lead
    by then, and call it otherwise); `kept_from`: the first round whose payloads the coordinator still
    had when the link was opened; `workload`: None, every round has all the work; `n_parameters`: of the
    model, over all ranks; `base_blobs`: has the base weights, kept where snapshots do not hold all of it;
    `has_own_data`: trains on what others do not have, so that nobody can do its work again; `spare`: makes a
    second replica of the run, see `spare_replica`.
    """

    link: Link
    genesis: GenesisBody
    config: RunConfig
    given_index: int
    kept_from: int
    replica: Replica
    work: LocalWork
    workload: Workload | None
    history: History
    n_parameters: int
    base_blobs: KeptBlobs
    has_own_data: bool
    spare: Callable[[], Replica]

    @property
    def peer_index(self) -> int:
        """This node's in commits; -1, which is nobody's, until a commit has admitted it."""
        index = self.history.index_of(self.link.peer_id)
        return -1 if index is None else index

    @property
    def is_over(self) -> bool:
        """The last round is applied, as far as is known: a later record may have made the run longer."""
        return self.is_at_head and self.replica.round >= self.replica.course.n_rounds

    @property
    def is_at_head(self) -> bool:
        return self.is_near(1)

    def is_near(self, n_rounds: int) -> bool:
        """Whether fewer than `n_rounds` commits are known that the replica has not applied."""
        return self.link.head - self.replica.round < n_rounds

    def rounds_behind(self) -> int:
        """Known commits that the replica has not applied; may be asked from any thread."""
        return max(0, self.link.head - self.replica.round)

    def is_verified(self, round_: int) -> bool:
        """Whether fingerprints of this round are compared."""
        is_last = round_ == self.replica.course.n_rounds
        return round_ > 0 and (round_ % self.config.run.verify_every == 0 or is_last)


def prepare_run(
    link: Link,
    welcome: Welcome,
    *,
    import_path: str | None = None,
    data: Path | None = None,
    task: Task | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "auto",
    leader: Leader | None = None,
    folder: Path | None = None,
    offload_idle: bool = False,
) -> PreparedRun:
    """The run that the link has opened; its replica has no weights yet. `leader`: of a node of several ranks;
    `folder`: where blobs are kept, None: nowhere; `task`: instead of `import_path` and `data`;
    `offload_idle`: see `Diloco.aside`.

    Nothing is downloaded before the layout was compared. Raises ConfigError, Incompatible and what
    `Link.fetch` raises.
    """
    body = welcome.body
    config = parse_config(body.config)
    has_own_data = data is not None or task is not None
    task = task or make_task(config.task, import_path, data)
    if leader is None:
        replica = build_replica(link.run_id, body, task, link.peer_id, device)
    else:
        replica = leader.replica(link.run_id, body, link.peer_id, task)
    if offload_idle:
        _offload_idle(replica.strategy, folder)
    meet_neighbours(replica, link.neighbours)
    if isinstance(replica.strategy, Sapo) and isinstance(task, Writes):
        replica.strategy.policy = task.policy(replica.model)
    blobs, fetched = KeptBlobs(link, folder), KeptBlobs(link, None)
    texts = (
        _download(fetched, body.corpus, "text"),
        _download(blobs, body.held_out, "held-out text"),
    )
    task.load(*texts)
    work = LocalWork(replica, task, precision) if leader is None else leader.work(replica, task, texts)
    run = PreparedRun(
        link=link,
        genesis=body,
        config=config,
        given_index=welcome.peer_index,
        kept_from=welcome.kept_from,
        replica=replica,
        work=work,
        workload=_workload(config, body, replica, task),
        history=History.of(replica, config.run.snapshot_every),
        n_parameters=sum(prod(entry.shape) for entry in body.layout),
        base_blobs=blobs if replica.has_frozen else fetched,
        has_own_data=has_own_data,
        spare=partial(spare_replica, link.run_id, body, task),
    )
    _tell(run)
    return run


def _offload_idle(strategy: Strategy, folder: Path | None) -> None:
    """Raises ConfigError for a strategy that has nothing to put aside."""
    from ..optim.diloco import Diloco
    from ..optim.inner.aside import Aside

    if not isinstance(strategy, Diloco):
        raise ConfigError(
            f"--offload-idle is for runs with diloco; this one has {type(strategy).__name__.lower()}"
        )
    strategy.aside = Aside(folder)


def _download(blobs: KeptBlobs, blob: BlobRef | None, what: str) -> bytes | None:
    if blob is None:
        return None
    if not blobs.has(blob):
        log.info("fetching the %s (%s)", what, human_bytes(blob.n_bytes))
    return blobs.get(blob)


def _workload(config: RunConfig, body: GenesisBody, replica: Replica, task: Task) -> Workload | None:
    """What fits into a round, if the run says how long one should take."""
    if config.work.round_s <= 0:
        return None
    most = min(replica.strategy.most_batches, max(1, body.limits.max_samples // task.n_samples))
    return Workload(config.work.round_s, most)


def _tell(run: PreparedRun) -> None:
    log.info(
        "run %s: %d parameters, strategy %s, %d rounds, peer %d",
        run.config.run.name,
        sum(p.tensor.numel() for p in run.replica.strategy.parameters_in_order()),
        run.config.strategy["name"],
        run.config.run.rounds,
        run.given_index,
    )
    if (told := run.replica.strategy.told()) is not None:
        log.info("%s", told)
