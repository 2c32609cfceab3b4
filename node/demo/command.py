"""`thinwire demo`: a real swarm on this machine, as processes over libp2p on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from ..cli.view import agreement
from ..doctor.compiling import compile_kernels
from ..system.command_name import as_typed
from ..system.output import make_console
from ..system.processes import Children
from ..units import bytes_beside_ddp, human_bytes, human_loss
from .plan import DemoPlan
from .swarm import DemoSwarm

PRETRAINING_ROUNDS = 60


def run_demo(plan: DemoPlan, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Runs the plan and returns what `--json` prints, {} if stopped. Leaves no process and no file."""
    started_s = time.monotonic()
    console = make_console(stderr=True)
    compile_kernels(console.print, stopped)
    with Children() as children:
        base = None
        if plan.strategy == "spsa":
            console.print("First a short decoupled phase: fine-tuning needs a model that knows something.")
            base = children.folder / "base.safetensors"
            rounds = min(PRETRAINING_ROUNDS, 2 * plan.rounds)
            pretraining = DemoPlan("decoupled", plan.n_peers, rounds, faults=False, http=plan.http)
            DemoSwarm(pretraining, children, console, stopped, save=base).run()
            console.print("Now that model is fine-tuned on other text, with one byte per probe.")
        result = {} if stopped() else DemoSwarm(plan, children, console, stopped, base=base).run()
    if stopped():
        return {}
    result["seconds"] = round(time.monotonic() - started_s, 1)
    _sum_up(console, plan, result)
    return result


def _sum_up(console: Console, plan: DemoPlan, result: Mapping[str, Any]) -> None:
    payload, sent, ddp = (result[f"{of}_bytes_per_peer_round"] for of in ("payload", "sent", "ddp"))
    lines = [
        f"\n{result['rounds']} rounds in {result['seconds']:.0f} s. Held-out loss "
        f"{result['held_out_first']:.3f} -> "
        f"{human_loss(result['held_out_last'], result['loss_unit'], result['bytes_per_token'])}.",
        agreement(result["fingerprints"]),
        f"Per peer and round: {bytes_beside_ddp(payload, sent, ddp)}.",
    ]
    lines += [_told(fault) for fault in result["faults"]]
    if (gossip := result.get("gossip")) is not None:
        each = [human_bytes(n) for _, _, n, _ in gossip["edges"]]
        lines.append(f"Neighbours have exchanged, both ways: {', '.join(each)}; merged after the last round.")
    other = (
        "thinwire demo --strategy spsa                     fine-tuning with one byte per probe"
        if plan.strategy == "decoupled"
        else "thinwire demo                                     training from scratch"
    )
    lines += [
        "\nWhat next:",
        f"  {other}",
        "  thinwire coordinator deploy/runs/pydoc-gpt.toml   a run of your own; it prints a ticket,",
        "  thinwire join TICKET                              and this joins it, on any machine",
    ]
    for line in lines:
        console.print(as_typed(line), highlight=False, soft_wrap=True)


def _told(fault: Mapping[str, Any]) -> str:
    """What was done to somebody, and how it went on."""
    killed = f"was killed with SIGKILL at round {fault['killed_at_round']}"
    if "coordinator" in fault:
        after = "the run ended before there was another round"
        if fault["next_commit_s"] is not None:
            leader = fault["led_by"] or "another coordinator"
            after = f"{fault['next_commit_s']:.1f} s later came the next round, led by {leader}"
        return f"{fault['coordinator']}, which led, {killed}; {after}."
    if fault["back_at_round"] is None:
        return f"{fault['node']} {killed}, and the run was over before it was back: give it more --rounds."
    return f"{fault['node']} {killed}, and was back at round {fault['back_at_round']}; the others went on."
