"""A node in this process: a link, a runner and what is around them. `ranks.join` decides where it runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compression.errors import SwarmUnreachable, ThinwireError
from ..coordinator.protocol.addresses import HttpAddress
from ..coordinator.protocol.ticket import Ticket
from .doctor.compiling import compile_apart
from .links.telling import follow_events
from .links.upload_limit import UploadLimit, parse_rate
from .states.words import left, over, what_is_here
from .system.devices import check_device
from .system.folder import NodeFolder
from .tracking.trackers import open_tracks

if TYPE_CHECKING:
    from .evaluation.supervising import Evaluations
    from .links.remote import RemoteLink
    from .precision import Precision
    from .ranks.leader import Leader
    from .result import Result
    from .runner import Runner
    from .system.stopping import Stop
    from .tasks.base import Task
    from .tracking.metrics import NodeMetrics, TrackerName
    from .tracking.trackers import Tracks
    from .trust.start_check import Verify

log = logging.getLogger("thinwire.node")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user of a node says. `device` "auto": cuda, or cpu without; `ranks` None: one for each GPU, or
    one on a CPU. `threads`: of each rank, None: torch's default; `max_upload`: a rate in words, see
    `parse_rate`; `restart`: how often a node whose rank has failed is started again; `evaluate`: the function
    of the run's [eval] that this node calls; `verify`: what to do about a snapshot that others vouch for;
    `offload_idle`: what inner steps do not need waits elsewhere, see `Diloco.aside`."""

    ticket: str
    data: Path | None
    import_path: str | None
    state: Path | None
    device: str
    threads: int | None
    host: str
    port: int
    announce: tuple[str, ...]
    max_upload: str | None
    patience_s: float
    http: HttpAddress | None
    save: Path | None
    ranks: int | None
    precision: Precision
    activation_checkpointing: bool
    cpu_offload: bool
    restart: int
    track: tuple[TrackerName, ...] = ()
    evaluate: str | None = None
    verify: Verify = "background"
    offload_idle: bool = False

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Options:
        """The inverse of `to_plain`."""
        paths = {k: Path(plain[k]) for k in ("data", "state", "save") if plain[k] is not None}
        http = None if plain["http"] is None else HttpAddress.from_plain(plain["http"])
        lists = {name: tuple(plain[name]) for name in ("announce", "track")}
        return cls(**{**plain, **paths, **lists, "http": http})

    @property
    def is_sharded(self) -> bool:
        """Whether the model is held by `sharded_model`, be it for a single rank."""
        special = self.precision == "bf16" or self.activation_checkpointing or self.cpu_offload
        return bool(special) or (self.ranks or 1) > 1

    def devices(self) -> list[str]:
        """torch's names of the devices of all ranks."""
        if not self.device.startswith("cuda"):
            return [self.device]
        if (self.ranks or 1) > 1 and ":" not in self.device:
            return [f"cuda:{rank}" for rank in range(self.ranks or 1)]
        return [self.device if ":" in self.device else "cuda:0"]


def hivemind_link(options: Options, folder: Path, **shared: Any) -> RemoteLink:
    """`shared`: arguments that every link takes."""
    from .links.hivemind import HivemindLink

    return HivemindLink(
        Ticket.parse(options.ticket),
        state=folder,
        host=options.host,
        port=options.port,
        announce=options.announce,
        **shared,
    )


def run_node(
    options: Options,
    stop: Stop,
    leader_in: Callable[[Path], Leader] | None = None,
    make_link: Callable[..., RemoteLink] = hivemind_link,
    finished: Callable[[Runner], object] = lambda _runner: None,
) -> Result | None:
    """The node in this process; None: it was stopped before the end. Raises what `Runner.run` raises.

    `leader_in`: it is rank 0 of several; called with the node's folder. `finished` is called after the last
    round.
    """
    with opened_node(options, leader_in, make_link, stopped=stop.is_set) as runner:
        stop.on_stop.append(runner.request_stop)
        run_id, folder = runner.link.run_id, runner.folder
        try:
            result = _until_the_end(runner, options, stop, finished)
        except SwarmUnreachable as e:
            raise SwarmUnreachable(f"{e}\n{what_is_here(run_id, os.environ, folder)}") from e
    _tell_the_end(result, stop, folder)
    return result


@contextmanager
def opened_node(
    options: Options,
    leader_in: Callable[[Path], Leader] | None = None,
    make_link: Callable[..., RemoteLink] = hivemind_link,
    task: Task | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Runner]:
    """A runner that has not begun, with its folder and link, which are given back in the end. `task`: instead
    of the one that the options name. `stopped`: kernels are compiled no longer. Raises ConfigError and
    Incompatible."""
    limit = _upload_limit(options)
    with ExitStack() as stack:
        folder = NodeFolder(options.state)
        stack.callback(folder.close)
        log.info("this node's state is in %s", folder.path)
        metrics = _metrics(options, folder.path, limit)
        link = make_link(options, folder.path, **_shared(options, metrics, limit))
        events = follow_events(link)
        stack.callback(events.join, timeout=5)
        stack.callback(link.close)
        link.begin()  # while torch is loaded

        with nullcontext() if options.import_path is not None or task is not None else _without_scipy():
            if options.device.startswith("cpu"):
                compile_apart(log.info, stopped)  # before there is torch here, too
            limit_threads(options.threads)
            check_device(options.device)
            _check_arithmetic(options.device, stopped)
        from .runner import Runner

        tracks = open_tracks(options.track, link.run_folder, metrics)
        stack.callback(tracks.close)
        evaluations = _evaluations(options, link.run_folder or folder.path, tracks, metrics)
        if evaluations is not None:
            stack.callback(evaluations.close)
        yield Runner(
            link,
            import_path=options.import_path,
            data=options.data,
            task=task,
            device=options.device,
            folder=link.run_folder,
            metrics=metrics,
            precision=options.precision,
            leader=None if leader_in is None else leader_in(folder.path),
            tracks=tracks,
            evaluations=evaluations,
            verify=options.verify,
            offload_idle=options.offload_idle,
            on_prepared=check_compressors,
        )


def _tell_the_end(result: Result | None, stop: Stop, folder: Path | None) -> None:
    if stop.is_set() or result is None:
        log.info("%s", left(folder))
        return
    log.info("%s", over(result, folder))


def _until_the_end(
    runner: Runner, options: Options, stop: Stop, finished: Callable[[Runner], object]
) -> Result | None:
    """Trains, and writes the weights that the user has asked for."""
    from .tracking.metrics import serve

    if stop.is_set():  # it came while there was nobody to tell
        return None
    try:
        with serve(runner.metrics, options.http):
            result = runner.run()
            if options.save is not None and not stop.is_set():
                runner.replica.save_weights(options.save)
                log.info("wrote the weights after round %d to %s", runner.replica.round, options.save)
            if not stop.is_set():
                finished(runner)
            if runner.evaluations is not None and not stop.is_set():
                runner.evaluations.finish(runner.prepared, stop.is_set)
    except ThinwireError:
        if stop.is_set():  # what broke was what the user stopped
            return None
        raise
    return result


def _evaluations(options: Options, folder: Path, tracks: Tracks, metrics: NodeMetrics) -> Evaluations | None:
    if options.evaluate is None:
        return None
    from .evaluation.supervising import Evaluations

    return Evaluations(options.evaluate, folder, tracks, metrics, options.import_path)


def _upload_limit(options: Options) -> UploadLimit | None:
    return None if options.max_upload is None else UploadLimit(parse_rate(options.max_upload))


def _metrics(options: Options, folder: Path, limit: UploadLimit | None) -> NodeMetrics:
    from .tracking.device_metrics import DeviceCollector
    from .tracking.metrics import NodeMetrics

    metrics = NodeMetrics()
    metrics.registry.register(DeviceCollector(options.devices()))
    metrics.disk(folder)
    if limit is not None:
        metrics.upload_limit(limit.rate_bytes_per_s, limit.used_ratio)
    return metrics


def _shared(options: Options, metrics: NodeMetrics, limit: UploadLimit | None) -> dict[str, Any]:
    """Arguments that every link takes."""
    from .links.core import About
    from .tracking.device_metrics import in_words

    device = partial(in_words, options.devices())
    return {
        "patience_s": options.patience_s,
        "limit": limit,
        "metrics": metrics.text,
        "about": About(device, metrics.phases, metrics.sizes.next, metrics.gossip),
    }


def limit_threads(threads: int | None) -> None:
    """Of this process, from now on; None: as many as torch takes."""
    if threads is None:
        return
    import torch  # its number of threads is that of our kernels too

    torch.set_num_threads(threads)


@contextmanager
def _without_scipy() -> Iterator[None]:
    """numba loads its linear algebra, a twentieth of a small node's memory and start, for kernels that call
    BLAS: ours do not. (Those of a user's task may.)"""
    if "scipy.linalg" in sys.modules:
        yield
        return
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment] # how Python is told that there is none
    try:
        yield
    finally:
        del sys.modules["scipy.linalg"]


def _check_arithmetic(device: str, stopped: Callable[[], bool]) -> None:
    """Tells a machine before it joins that its replica would not stay the others'. Raises Incompatible.

    Some 30 ms; what it imports and compiles on the way, the node needs anyway. Where kernels are to be
    compiled it is all of them, else those of compressors wait until a run turns out to have one.
    """
    import torch

    from .doctor.kernel_cache import is_compiled
    from .doctor.self_test import refuse_wrong_arithmetic

    log.info("comparing this machine's arithmetic with known answers")
    if torch.device(device).type == "cpu" and not is_compiled():
        from .doctor.compiling import compiling

        with compiling(log.info, stopped):
            refuse_wrong_arithmetic(torch.device(device), stopped=stopped)
    else:
        refuse_wrong_arithmetic(torch.device(device), of_compressors=False)


def check_compressors(runner: Runner) -> None:
    """The rest, before the replica has weights. Raises Incompatible."""
    from ..optim.registry import has_compressor
    from .doctor.self_test import refuse_wrong_arithmetic

    if has_compressor(runner.config.strategy["name"]):
        refuse_wrong_arithmetic(runner.device, of_compressors=True)
