"""`thinwire ray`: a run on a Ray cluster, with its progress in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ...compression.errors import ConfigError
from ..cli.offline import telling_what_is_here
from ..cli.status import fetch_status
from ..cli.view import agreement, live_view
from ..system.output import make_console, to_stdout
from ..units import bytes_beside_ddp, human_loss
from .cluster import PeerGroup, group_of, load_ray, parse_group, quiet_stdout

if TYPE_CHECKING:
    from ..system.stopping import Stop


@dataclass(frozen=True, slots=True)
class Asked:
    """Peers as the command line asks for them."""

    peers: int | None
    gpus: int
    cpus: float | None
    ranks: int | None
    kind: str | None
    groups: tuple[str, ...]

    def parsed(self) -> list[PeerGroup]:
        """Raises ConfigError."""
        groups = [parse_group(text) for text in self.groups]
        if self.peers is not None or not groups:
            groups.insert(0, group_of(self.peers or 2, self.gpus, self.cpus, self.ranks, self.kind))
        elif self.gpus or self.cpus is not None or self.ranks is not None or self.kind is not None:
            raise ConfigError("--gpus-per-peer and the like belong to --peers N; --peer says its own")
        return groups


def ray_command(run_file: Path, asked: Asked, *, as_json: bool, stop: Stop, **options: Any) -> None:
    """Prints the result as one JSON object, or in words. `options`: of `train`, which also says what is
    raised."""
    from .train import train

    load_ray()
    groups = asked.parsed()
    console, notes = make_console(stderr=True), list[str]()
    began_s = monotonic()
    with quiet_stdout(), live_view(console, notes) as show:
        result = train(run_file, peers=groups, on_status=show, stopped=stop.is_set, **options)
    if stop.is_set():
        return
    metrics = {**result.metrics, "seconds": round(monotonic() - began_s, 1)}
    if as_json:
        to_stdout(json.dumps(metrics))
        return
    for line in _summary(metrics):
        console.print(line, highlight=False, soft_wrap=True)
    to_stdout(result.weights)


def ray_join_command(ticket: str, asked: Asked, *, as_json: bool, stop: Stop, **options: Any) -> None:
    """Peers of a Ray cluster in somebody's swarm; prints as `ray_command`. `options`: of `join_swarm`, which
    also says what is raised."""
    from .joining import join_swarm

    load_ray()
    groups = asked.parsed()
    with telling_what_is_here(ticket):
        fetch_status(ticket)  # a cluster takes long to begin, and the peers to find that nobody is there
    with quiet_stdout():
        result = join_swarm(ticket, groups, stopped=stop.is_set, **options)
    if result is None or stop.is_set():
        return
    if as_json:
        to_stdout(json.dumps(result))
        return
    console = make_console(stderr=True)
    for name, found in result["peers"].items():
        told = "was not back in time" if found is None else f"{found['counted']} offers counted"
        console.print(f"{name}: {told}", highlight=False, soft_wrap=True)
    to_stdout(result["weights"])


def _summary(metrics: Mapping[str, Any]) -> Sequence[str]:
    lines = [f"\n{metrics['rounds']} rounds in {metrics['seconds']:.0f} s."]
    if metrics["held_out_last"] is not None:
        first, last = metrics["held_out_first"], metrics["held_out_last"]
        told = human_loss(last, metrics["loss_unit"], metrics["bytes_per_token"])
        lines.append(f"Held-out loss {first:.3f} -> {told}.")
    lines.append(agreement(metrics["fingerprints"]))
    payload, sent, ddp = (metrics[f"{of}_bytes_per_peer_round"] for of in ("payload", "sent", "ddp"))
    if payload and ddp:
        lines.append(f"Per peer and round: {bytes_beside_ddp(payload, sent, ddp)}.")
    for fault in metrics["faults"]:
        back = fault["back_at_round"]
        ending = "was not back in time" if back is None else f"trained again at round {back}"
        lines.append(f"{fault['node']} was lost at round {fault['killed_at_round']} and {ending}.")
    lines.append("The trained weights are in")
    return lines
