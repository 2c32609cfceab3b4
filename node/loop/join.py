"""`join` for a training loop of one's own: the node of `thinwire join` in the caller's process and thread."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ...coordinator.protocol.addresses import HttpAddress
from ..cli.arguments import http_address, read_ticket
from ..precision import Precision
from ..ranks.join import refuse
from ..run_node import Options, opened_node
from ..runner import Runner
from ..tasks.base import device_of
from ..tracking.metrics import TrackerName, serve
from .swarm import Swarm
from .task import Evaluate, LoopTask, Loss


def join(
    ticket: str,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    state: Path | str | None = None,
    evaluate: Evaluate | None = None,
    samples: int | None = None,
    precision: Precision = "auto",
    host: str = "0.0.0.0",
    port: int = 0,
    announce: Sequence[str] = (),
    max_upload: str | None = None,
    patience_s: float = 600.0,
    track: Sequence[TrackerName] = (),
    http: str | None = None,
) -> Swarm:
    """A node that trains `model`, where it is (`model.to("cuda")` before), in the run of the ticket.

    `ticket`: the line that the coordinator printed, or @FILE. `batches`: an iterable of batches, begun anew
    when it ends; their tensors are moved to the model's device. `loss(model, batch)`: the mean loss of the
    batch as a tensor; it may be called several times for a batch. `evaluate(model)`: the mean held-out loss,
    for a run that measures one; called on one node at a time, every `run.eval_every` rounds.

    `state`: the folder of identity, ledger and snapshots: after a restart the node is the same peer and goes
    on where it was; None: the first of the user's own that is free. `samples`: in a batch; None: as many as
    the DataLoader says, or the first batch has. The other arguments are those of `thinwire join`.

    The parameters get the run's values when the swarm is entered. Raises ConfigError, here and on entering;
    there also Incompatible, if the model is not the run's, and SwarmUnreachable.
    """
    task = LoopTask(model, batches, loss, n_samples=samples, evaluate=evaluate)
    options = Options(
        ticket=read_ticket(ticket),
        data=None,
        import_path=None,
        state=None if state is None else Path(state),
        device=str(device_of(model)),
        threads=None,
        host=host,
        port=port,
        announce=tuple(announce),
        max_upload=max_upload,
        patience_s=patience_s,
        http=_http(http),
        save=None,
        ranks=1,
        precision=precision,
        activation_checkpointing=False,
        cpu_offload=False,
        restart=0,
        track=tuple(track),
    )
    refuse(options)
    return Swarm(_opened(options, task))


def _http(text: str | None) -> HttpAddress | None:
    return http_address(text, os.environ.get("THINWIRE_HTTP_TOKEN") if text else None)


@contextmanager
def _opened(options: Options, task: LoopTask) -> Iterator[Runner]:
    with opened_node(options, task=task) as runner, serve(runner.metrics, options.http):
        yield runner
