"""`thinwire join`: a link, a runner and what is around them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.coordinator.files import write_aside
from thinwire.coordinator.ticket import Ticket
from thinwire.node.rate import UploadLimit, parse_rate

if TYPE_CHECKING:
    from thinwire.node.cli import Stop
    from thinwire.node.runner import Result, Runner

log = logging.getLogger("thinwire.node")


def join(
    *,
    ticket: str,
    data: Path | None,
    import_path: str | None,
    state: Path | None,
    device: str,
    threads: int | None,
    host: str,
    port: int,
    announce: tuple[str, ...],
    max_upload: str | None,
    patience_s: float,
    http: tuple[str, int] | None,
    save: Path | None,
    stop: Stop,
) -> Result | None:
    """Trains until the run ends; None: `stop` was set before. Raises what `Runner.run` raises."""
    if data is not None and not data.exists():
        raise ConfigError(f"--data {data}: no such file or folder")
    parsed = Ticket.parse(ticket)
    rate_bytes_per_s = None if max_upload is None else parse_rate(max_upload)
    _limit_threads(threads)

    from thinwire.node.folder import NodeFolder
    from thinwire.node.link_hivemind import HivemindLink
    from thinwire.node.metrics import serve
    from thinwire.node.runner import Runner, follow_events

    _check_device(device)
    _check_arithmetic(device)
    folder = NodeFolder(state)
    log.info("this node's state is in %s", folder.path)
    limit = None if rate_bytes_per_s is None else UploadLimit(rate_bytes_per_s)
    link = HivemindLink(
        parsed,
        state=folder.path,
        host=host,
        port=port,
        announce=announce,
        patience_s=patience_s,
        limit=limit,
    )
    events = follow_events(link)
    runner = Runner(link, import_path=import_path, data=data, device=device, folder=link.run_folder)
    if limit is not None:
        runner.metrics.upload_limit(limit.rate_bytes_per_s, limit.used_ratio)
    stop.on_stop.append(runner.request_stop)
    try:
        with serve(runner.metrics.registry, http):
            result = runner.run()
            if save is not None and not stop.is_set():
                _save(runner, save)
    except ThinwireError:
        if stop.is_set():  # what broke was what the user stopped
            return None
        raise
    finally:
        link.close()
        events.join(timeout=5)
        folder.close()
    return result


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"--threads {threads}: at least 1")
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

    from thinwire.node.self_test import refuse_wrong_arithmetic

    log.info("comparing this machine's arithmetic with known answers")
    refuse_wrong_arithmetic(torch.device(device))


def _save(runner: Runner, path: Path) -> None:
    from safetensors.torch import save as save_safetensors

    write_aside(path, save_safetensors(runner.replica.weights()))
    log.info("wrote the weights after round %d to %s", runner.replica.round, path)
