"""A peer of a run as actors: rank 0 is the node, with its link; the other ranks, if any, follow it.

A peer's actor begins to train when it is made, so that Ray can start it again wherever there is room: it
reads what it missed from the ledger and from snapshots. Its other ranks are actors that it owns; they end
with it, and it ends when one of them dies.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ThinwireError, error_name
from ...coordinator.protocol.files import FolderLock
from ...coordinator.protocol.ticket import Ticket
from ..run_node import Options, hivemind_link, limit_threads, run_node
from ..system.folder import default_folder
from ..system.logs import log_to_stderr
from ..system.stopping import Stop
from .transport import once_free

if TYPE_CHECKING:
    from ..links.remote import RemoteLink
    from ..precision import Precision
    from ..ranks.leader import Leader
    from ..result import Result
    from ..runner import Runner

log = logging.getLogger("thinwire.node")

RANK_DIED_S: Final = 10.0
"""How long rank 0, when a collective has failed, waits for word that another rank has died."""

_MOST_LINES: Final = 100
"""Of a peer's log, until somebody asks for them."""

_EXPORT: Final = "export"
_TRACE_LINES: Final = 12


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """What a peer's actors need to know. `cpus`, `gpus`: of each rank; `folder`: on the peer's machine, None:
    its user's default one. `over_libp2p`: it joins as other nodes do, listens on `host` and sends no more
    than `max_upload`; else through the cluster."""

    name: str
    namespace: str
    ticket: str
    ranks: int
    cpus: float
    gpus: float
    folder: str | None
    import_path: str | None
    precision: Precision
    patience_s: float
    over_libp2p: bool = False
    host: str = ""
    max_upload: str | None = None

    def path(self) -> Path:
        """The peer's own folder."""
        root = default_folder(os.environ) / "ray" if self.folder is None else Path(self.folder)
        return root / self.namespace / self.name

    def meeting_place(self) -> Path:
        """Where its ranks find each other: on the disk of their machine, whatever `folder` is on."""
        return Path(tempfile.gettempdir()) / f"thinwire-ranks-{self.namespace}-{self.name}"

    def options(self) -> Options:
        """As if this peer had been started by `thinwire join`."""
        return Options(
            ticket=self.ticket,
            data=None,
            import_path=self.import_path,
            state=self.path(),
            device="cuda:0" if self.gpus else "cpu",  # Ray shows each rank its own GPU alone
            threads=max(1, int(self.cpus)),
            host=self.host,
            port=0,
            announce=(),
            max_upload=self.max_upload,
            patience_s=self.patience_s,
            http=None,
            save=None,
            ranks=self.ranks,
            precision=self.precision,
            activation_checkpointing=False,
            cpu_offload=False,
            restart=0,
        )


class PeerActor:
    """Rank 0. Trains in a thread of its own from the start; its methods are called from other threads, and
    can be called again and again."""

    def __init__(self, spec: PeerSpec) -> None:
        self._spec = spec
        self._stop = Stop()
        self._ended = threading.Event()
        self._outcome: dict[str, Any] = {}
        self._rank_ended = threading.Event()
        self._rank_error: str | None = None
        self._ranks: list[Any] = []
        """Actors end when nobody refers to them."""
        log_to_stderr(logging.INFO, f"{spec.name}: ")
        self._lines = _Lines()
        logging.getLogger("thinwire").addHandler(self._lines)
        threading.Thread(target=self._main, name="node", daemon=True).start()

    def outcome(self) -> dict[str, Any]:
        """Blocks until the node has ended: its `result` (None: it left before the last round), or its `error`
        (kind, text, exit code)."""
        self._ended.wait()
        return self._outcome

    def news(self) -> list[tuple[int, str]]:
        """Level and text of what the node has logged since it was asked last."""
        return self._lines.taken()

    def leave(self) -> None:
        """The node leaves the swarm cleanly; see `outcome`. One that is not in it yet is not waited for."""
        if not self._stop.on_stop:
            self._outcome = {"result": None}
            self._ended.set()
        self._stop.request(signal.SIGTERM)

    def exported(self) -> list[tuple[str, int]]:
        """Names and sizes of the files that hold the trained weights."""
        folder = self._spec.path() / _EXPORT
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [(str(path.relative_to(folder)), path.stat().st_size) for path in files]

    def read(self, name: str, start: int, n_bytes: int) -> bytes:
        """A part of such a file."""
        with (self._spec.path() / _EXPORT / name).open("rb") as file:
            file.seek(start)
            return file.read(n_bytes)

    def clean(self) -> None:
        """After the end of the run: nothing of the peer stays on this machine."""
        shutil.rmtree(self._spec.path(), ignore_errors=True)
        with suppress(OSError):  # the last one of the run removes its folder
            self._spec.path().parent.rmdir()

    # ------------------------------------------------------------------------------------------- the node

    def _main(self) -> None:
        try:
            result = self._train()
            left = result is None or self._stop.is_set()
            self._outcome = {"result": None if left or result is None else asdict(result)}
        except ThinwireError as e:
            self._outcome = {"error": (error_name(e), str(e), e.exit_code)}
        except BaseException as e:
            log.exception("the node broke")
            self._outcome = {"error": self._broken(e)}
        self._ended.set()

    def _broken(self, error: BaseException) -> tuple[str, str, int]:
        """What to tell of an error that nobody expected. Ends the process if another rank's has died: then
        Ray starts the peer again."""
        if self._spec.ranks > 1 and self._rank_ended.wait(RANK_DIED_S) and self._rank_error is not None:
            return error_name(error), self._rank_error, 1
        return error_name(error), _told(error), 1

    def _train(self) -> Result | None:
        once_free(lambda: FolderLock(self._spec.path(), "node")).close()
        options = self._spec.options()
        if self._spec.ranks == 1:
            return run_node(options, self._stop, None, self._link, self._export)
        limit_threads(options.threads)
        place = self._spec.meeting_place()
        shutil.rmtree(place, ignore_errors=True)  # of an attempt that was killed
        place.mkdir(mode=0o700)
        try:
            self._start_ranks(place)
            return self._run_leader(options, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _run_leader(self, options: Options, meeting: Path) -> Result | None:
        from ..ranks.leader import Leader, open_channel
        from ..ranks.process import joined

        device, sharding = joined(options, 0, meeting)
        leader = Leader(open_channel(), device, sharding)

        def leader_in(folder: Path) -> Leader:
            leader.folder = folder
            return leader

        try:
            return run_node(options, self._stop, leader_in, self._link, self._export)
        finally:
            leader.stop()

    def _link(self, options: Options, folder: Path, **shared: Any) -> RemoteLink:
        if self._spec.over_libp2p:
            return hivemind_link(options, folder, **shared)
        from .link import RayLink

        ticket = Ticket.parse(options.ticket)
        run_folder = folder / ticket.run_id.hex()[:16]
        run_folder.mkdir(exist_ok=True)
        return RayLink(ticket, self._spec.name, run_folder=run_folder, **shared)

    def _export(self, runner: Runner) -> None:
        """The weights stay on this machine until the driver has fetched them from one of the peers."""
        from ..cli.ledger_command import write_export

        folder = self._spec.path() / _EXPORT
        link = runner.link
        write_export(
            folder,
            runner.replica,
            runner.work.task,
            runner.genesis,
            lambda ref: link.fetch(ref.digest, ref.n_bytes),
        )

    # ------------------------------------------------------------------------------------- the other ranks

    def _start_ranks(self, meeting: Path) -> None:
        """In the bundles after this actor's, of the same placement group, so on the same machine."""
        import ray
        from ray.util.placement_group import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spec, attempt, endings = self._spec, secrets.token_hex(3), []
        for rank in range(1, spec.ranks):
            place = PlacementGroupSchedulingStrategy(get_current_placement_group(), rank)
            follower = (
                ray.remote(RankActor)
                .options(
                    name=f"{spec.name}-rank-{rank}-{attempt}",
                    namespace=spec.namespace,
                    num_cpus=spec.cpus,
                    num_gpus=spec.gpus,
                    scheduling_strategy=place,
                )
                .remote(spec, rank, str(meeting))
            )
            self._ranks.append(follower)
            endings.append(follower.run.remote())
        threading.Thread(target=self._watch_ranks, args=(endings,), name="ranks", daemon=True).start()

    def _watch_ranks(self, endings: list[Any]) -> None:
        import ray

        (first, *_), _ = ray.wait(endings, num_returns=1)
        try:
            self._rank_error = ray.get(first)
        except ray.exceptions.RayError as e:
            log.error("a rank has died, and the node with it: %s", type(e).__name__)
            shutil.rmtree(self._spec.meeting_place(), ignore_errors=True)
            os._exit(1)
        self._rank_ended.set()


class _Lines(logging.Handler):
    """Keeps what is logged, the newest lines."""

    def __init__(self) -> None:
        super().__init__()
        self._kept = deque[tuple[int, str]](maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        """All of them, which are forgotten."""
        return [self._kept.popleft() for _ in range(len(self._kept))]


class RankActor:
    """Another rank than 0, for one attempt."""

    def __init__(self, spec: PeerSpec, rank: int, meeting: str) -> None:
        self._spec, self._rank, self._meeting = spec, rank, Path(meeting)
        log_to_stderr(logging.ERROR, f"{spec.name} rank {rank}: ")

    def run(self) -> str | None:
        """Until rank 0 says that it is over: None; or what broke."""
        from ..ranks.leader import Follower, open_channel
        from ..ranks.process import joined

        options = self._spec.options()
        limit_threads(options.threads)
        try:
            device, sharding = joined(options, self._rank, self._meeting)
            Follower(open_channel(), device, sharding, import_path=options.import_path, data=None).run()
        except ThinwireError as e:
            return f"rank {self._rank}: {e}"
        except Exception as e:  # noqa: BLE001 - the edge: rank 0 tells it
            return f"rank {self._rank}: {_told(e)}"
        return None


def _told(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()[-_TRACE_LINES:]
    return f"{type(error).__name__}: {error}" + "".join(f"\n    {line}" for line in lines)
