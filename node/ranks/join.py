"""`thinwire join`: a node in this process, or in one process for each of its ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import refuse_in_use
from ...coordinator.protocol.ticket import Ticket
from ..beside.seat import Coordinate, seat_beside, seat_command
from ..evaluation.supervising import refuse_function
from ..links.upload_limit import parse_rate
from ..run_node import Options, run_node
from ..system.devices import check_device
from ..system.places import refuse_address, refuse_below, refuse_file, refuse_folder, refuse_http
from ..tracking.trackers import refuse_trackers

if TYPE_CHECKING:
    from ..result import Result
    from ..system.stopping import Stop

MAX_RANKS: Final = 64


def join(options: Options, stop: Stop, coordinate: Coordinate | None = None) -> Result | None:
    """Trains until the run ends; None: `stop` was set before. Raises what `Runner.run` raises. `coordinate`:
    with a seat of the run's committee beside the node."""
    refuse(options)
    if coordinate is None:
        return _train(options, stop)
    command = seat_command(Ticket.parse(options.ticket), coordinate, options.state)
    with seat_beside(command) as seat:
        result = _train(options, stop)
        if result is not None:
            seat.see_off(stop)
        return result


def _train(options: Options, stop: Stop) -> Result | None:
    options = replace(options, device=_device(options))
    ranks = _number_of_ranks(options)
    options = replace(options, ranks=ranks)
    if options.offload_idle and ranks > 1:
        raise ConfigError("--offload-idle is for nodes of one rank: several share the memory out")
    if ranks == 1 and not options.restart and not options.is_sharded:
        return run_node(options, stop)
    from .launch import run_ranks

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
    _refuse_places(options)
    if options.restart < 0:
        raise ConfigError(f"--restart {options.restart}: at least 0")
    refuse_trackers(options.track)
    if options.evaluate is not None:
        refuse_function(options.evaluate)
    if options.cpu_offload and _device(options).startswith("cpu"):
        raise ConfigError("--cpu-offload: this node trains on the CPU, where its parameters are already")


def _refuse_places(options: Options) -> None:
    refuse_file("--save", options.save)
    refuse_folder("--state", options.state)
    refuse_in_use(options.state, "node")
    refuse_address(options.host, options.port, options.announce)
    refuse_http(options.http)
    refuse_below("--patience-s", options.patience_s, 0, "seconds without the coordinator, e.g. 600")


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
        check_device("cuda")
    if (options.ranks or 1) > n:
        raise ConfigError(
            f"--ranks {options.ranks}: this machine has {n} GPUs, and a rank needs one of its own"
        )
    return options.ranks or n
