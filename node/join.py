"""`thinwire join`: a link, a runner and what is around them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..compression.errors import ConfigError, ThinwireError
from ..coordinator.protocol.addresses import HttpAddress
from ..coordinator.protocol.ticket import Ticket
from .links.upload_limit import UploadLimit, parse_rate
from .tracking.trackers import open_tracks, refuse_trackers

if TYPE_CHECKING:
    from .links.remote import RemoteLink
    from .precision import Precision
    from .ranks.leader import Leader
    from .result import Result
    from .runner import Runner
    from .system.stopping import Stop
    from .tracking.metrics import TrackerName

log = logging.getLogger("thinwire.node")

MAX_RANKS: Final = 64


@dataclass(frozen=True, slots=True)
class Options:
    """What the user of a node says. `device` "auto": cuda, or cpu without; `ranks` None: one for each GPU, or
    one on a CPU."""

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

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Options:
        paths = {k: Path(plain[k]) for k in ("data", "state", "save") if plain[k] is not None}
        http = None if plain["http"] is None else HttpAddress(*plain["http"])
        lists = {name: tuple(plain[name]) for name in ("announce", "track")}
        return cls(**{**plain, **paths, **lists, "http": http})


def join(options: Options, stop: Stop) -> Result | None:
    """Trains until the run ends; None: `stop` was set before. Raises what `Runner.run` raises."""
    refuse(options)
    options = replace(options, device=_device(options))
    ranks = _number_of_ranks(options)
    options = replace(options, ranks=ranks)
    if ranks == 1 and not options.restart and not is_sharded(options):
        return run_node(options, stop)
    from .ranks.launch import run_ranks

    return run_ranks(options, stop)


def refuse(options: Options) -> None:
    """Raises ConfigError for what cannot work, before anything is started."""
    if options.data is not None and not options.data.exists():
        raise ConfigError(f"--data {options.data}: no such file or folder")
    Ticket.parse(options.ticket)
    if options.max_upload is not None:
        parse_rate(options.max_upload)
    if options.ranks is not None and not 1 <= options.ranks <= MAX_RANKS:
        raise ConfigError(f"--ranks {options.ranks}: between 1 and {MAX_RANKS}")
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads {options.threads}: at least 1")
    if options.restart < 0:
        raise ConfigError(f"--restart {options.restart}: at least 0")
    refuse_trackers(options.track)
    if options.cpu_offload and _device(options).startswith("cpu"):
        raise ConfigError("--cpu-offload: this node trains on the CPU, where its parameters are already")


def is_sharded(options: Options) -> bool:
    """Whether the model is held by `mesh.sharded_model`, be it for a single rank."""
    special = options.precision == "bf16" or options.activation_checkpointing or options.cpu_offload
    return bool(special) or (options.ranks or 1) > 1


def _device(options: Options) -> str:
    if options.device != "auto":
        return options.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _number_of_ranks(options: Options) -> int:
    if options.device != "cuda":
        ranks = options.ranks or 1
        if ranks > 1 and options.device != "cpu":
            raise ConfigError(f"--device {options.device} --ranks {ranks}: several ranks need cpu or cuda")
        return ranks
    import torch

    n = torch.cuda.device_count()
    if n == 0:
        _check_device("cuda")
    if (options.ranks or 1) > n:
        raise ConfigError(
            f"--ranks {options.ranks}: this machine has {n} GPUs, and a rank needs one of its own"
        )
    return options.ranks or n


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
    """The node in this process. `leader_in`: it is rank 0 of several; called with the node's folder.
    `finished` is called after the last round."""
    limit_threads(options.threads)

    from .links.core import About
    from .runner import Runner, follow_events
    from .system.folder import NodeFolder
    from .tracking.device_metrics import DeviceCollector, in_words
    from .tracking.metrics import NodeMetrics, serve

    _check_device(options.device)
    _check_arithmetic(options.device)
    rate_bytes_per_s = None if options.max_upload is None else parse_rate(options.max_upload)
    limit = None if rate_bytes_per_s is None else UploadLimit(rate_bytes_per_s)
    folder = NodeFolder(options.state)
    log.info("this node's state is in %s", folder.path)
    metrics = NodeMetrics()
    metrics.registry.register(DeviceCollector(_devices(options)))
    metrics.disk(folder.path)
    if limit is not None:
        metrics.upload_limit(limit.rate_bytes_per_s, limit.used_ratio)
    link = make_link(
        *(options, folder.path),
        patience_s=options.patience_s,
        limit=limit,
        metrics=metrics.text,
        about=About(in_words(_devices(options)), metrics.phases),
    )
    events = follow_events(link)
    tracks = open_tracks(options.track, link.run_folder, metrics)
    runner = Runner(
        link,
        import_path=options.import_path,
        data=options.data,
        device=options.device,
        folder=link.run_folder,
        metrics=metrics,
        precision=options.precision,
        leader=None if leader_in is None else leader_in(folder.path),
        tracks=tracks,
    )
    stop.on_stop.append(runner.request_stop)
    try:
        if stop.is_set():  # it came while there was nobody to tell
            return None
        with serve(metrics, options.http):
            result = runner.run()
            if options.save is not None and not stop.is_set():
                runner.replica.save_weights(options.save)
                log.info("wrote the weights after round %d to %s", runner.replica.round, options.save)
            if not stop.is_set():
                finished(runner)
    except ThinwireError:
        if stop.is_set():  # what broke was what the user stopped
            return None
        raise
    finally:
        link.close()
        events.join(timeout=5)
        tracks.close()
        folder.close()
    return result


def _devices(options: Options) -> list[str]:
    """Those of all ranks."""
    if not options.device.startswith("cuda"):
        return [options.device]
    if (options.ranks or 1) > 1 and ":" not in options.device:
        return [f"cuda:{rank}" for rank in range(options.ranks or 1)]
    return [options.device if ":" in options.device else "cuda:0"]


def limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch  # its number of threads is that of our kernels too

    torch.set_num_threads(threads)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"--device {device}: {str(e).splitlines()[0]}") from e


def _check_arithmetic(device: str) -> None:
    """Tells a machine before it joins that its replica would not stay the others'. Raises Incompatible.

    Some 30 ms; what it imports and compiles on the way, the node needs anyway.
    """
    import torch

    from .doctor.self_test import refuse_wrong_arithmetic

    log.info("comparing this machine's arithmetic with known answers")
    refuse_wrong_arithmetic(torch.device(device))
