"""`thinwire demo`: a real swarm on this machine, as processes over libp2p on loopback."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...compression.errors import SwarmUnreachable, ThinwireError
from ...coordinator.protocol.addresses import HttpAddress
from ...coordinator.protocol.figures import counted
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ..doctor.compiling import compile_kernels
from ..system.command_name import as_typed
from ..system.output import make_console
from ..system.processes import Child, Children
from ..units import bytes_beside_ddp, human_loss
from .status import StatusClient
from .view import agreement, figures, headline, live_view

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 90.0
STALL_S = 120.0  # no new round for so long: something is broken
ROUNDS_AWAY = 5  # how long the killed node stays away
PRETRAINING_ROUNDS = 60

SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "decoupled": {
        "task": {"name": "text", "corpus": "pydoc"},
        "strategy": {"name": "decoupled", "lr": 3e-3, "beta": 0.95, "sign": True},
        "strategy.compressor": {"name": "dct_topk", "k": 32, "group_size": 4096, "bits": 1},
        "schedule": {"name": "linear", "warmup_rounds": 10, "final_factor": 0.1},
    },
    "spsa": {
        "task": {"name": "text", "corpus": "stdlib"},
        "strategy": {"name": "spsa", "lr": 3e-3, "eps": 1e-3, "probes": 16},
        "schedule": {"name": "constant"},
    },
}


class DemoFailed(ThinwireError):
    """A process of the demo ended or hung; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What is to be shown. `faults`: kill a node at a third of the rounds and start it again. `ranks`: of the
    nodes, over and over. `http`: what the coordinator serves meanwhile."""

    strategy: str
    n_peers: int
    rounds: int
    faults: bool
    ranks: tuple[int, ...] = (1,)
    http: HttpAddress | None = None


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


class DemoSwarm:
    """A coordinator and nodes as child processes. `base`: start from these weights; `save`: keep the last."""

    def __init__(
        self,
        plan: DemoPlan,
        children: Children,
        console: Console,
        stopped: Callable[[], bool],
        base: Path | None = None,
        save: Path | None = None,
    ) -> None:
        self.plan = plan
        self.folder = children.folder / f"{plan.strategy}-{plan.rounds}"
        self.console = console
        self.stopped = stopped
        self.save = save
        self.children = children
        self.nodes: dict[str, Child] = {}
        self.ranks: dict[str, int] = {}
        self.killed: Child | None = None
        self.notes: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.folder.mkdir()
        run = {"name": f"demo-{plan.strategy}", "rounds": plan.rounds, "min_peers": plan.n_peers}
        if base is not None:
            run["base"] = str(base)
        self.run_file = self.folder / "run.toml"
        self.run_file.write_text(_toml({"run": run, **SECTIONS[plan.strategy]}))

    def run(self) -> dict[str, Any]:
        """Raises DemoFailed."""
        self.console.print(
            f"Starting a coordinator and {counted(self.plan.n_peers, 'node')}.", highlight=False
        )
        self._start_coordinator()
        for i in range(self.plan.n_peers):
            self.ranks[f"node-{i}"] = self.plan.ranks[i % len(self.plan.ranks)]
            self._start_node(f"node-{i}")
        with StatusClient(self.ticket) as client:
            self._tell_address(client)
            self._watch(client)
        if self.stopped():
            return {}
        for child in [self.coordinator, *self.nodes.values()]:
            if not self._is_late(child):
                self._wait_for_end(child)
        self.children.end()
        return self._result()

    def _start_coordinator(self) -> None:
        folder = self.folder / "coordinator"
        args = ["coordinator", str(self.run_file), "--state", str(folder / "state"), "--host", "127.0.0.1"]
        args += ["--linger", "0"]
        if self.plan.http is not None:
            args += ["--http", str(self.plan.http)]
            args += [] if self.plan.http.token is None else ["--http-token", self.plan.http.token]
            args += [f"--http-host={name}" for name in self.plan.http.names]
        self.coordinator = self.children.start("coordinator", folder, args, output=True)
        self.ticket = self.coordinator.first_line(START_TIMEOUT_S)
        if not self.ticket:
            raise DemoFailed(f"no ticket; the coordinator's log ends with:\n{self.coordinator.log_tail()}")

    def _tell_address(self, client: StatusClient) -> None:
        """Of the page; the coordinator knows the port, if it was to take a free one."""
        if self.plan.http is not None:
            address = self.plan.http._replace(port=client.fetch()["http"]["port"])
            self.console.print(
                f"The swarm's page: {address.url()} (and /metrics, /sd, /healthz)",
                highlight=False,
                soft_wrap=True,
            )

    def _start_node(self, name: str) -> None:
        folder = self.folder / name
        args = ["join", "-", "--device", "cpu", "--threads", "1", "--host", "127.0.0.1"]
        args += ["--state", str(folder / "state"), "--ranks", str(self.ranks[name])]
        if self.save is not None and not self.nodes:
            args += ["--save", str(self.save)]
        self.nodes[name] = self.children.start(name, folder, args, line=self.ticket)

    def _watch(self, client: StatusClient) -> None:
        """Shows the swarm until the last round; kills a node on the way and starts it again."""
        last_round, moved_s = -1, time.monotonic()
        with live_view(self.console, self.notes) as show:
            while not self.stopped():
                for child in [self.coordinator, *self.nodes.values()]:
                    if child.process.poll() and child is not self.killed:
                        raise _ended(child)
                try:
                    status = client.fetch(timeout_s=5)
                except SwarmUnreachable:
                    if self.coordinator.process.poll() is not None:
                        return
                    continue
                if status["round"] != last_round:
                    last_round, moved_s = status["round"], time.monotonic()
                if time.monotonic() - moved_s > STALL_S:
                    raise DemoFailed(f"no new round for {STALL_S:.0f} s: {headline(status)}")
                if self.plan.faults and self.plan.n_peers > 1:
                    self._fault(status)
                ended = last_round >= self.plan.rounds
                show(status, ended)
                if ended:
                    return
                time.sleep(0.3)

    def _fault(self, status: Mapping[str, Any]) -> None:
        now = status["round"]
        if not self.faults:
            if now >= self.plan.rounds // 3:
                self._kill_one(now)
            return
        fault = self.faults[0]
        if fault["restarted_at_round"] is None:
            if now >= fault["killed_at_round"] + ROUNDS_AWAY:
                self._start_node(fault["node"])
                fault["restarted_at_round"] = now
                self.notes.append(f"round {now}: {fault['node']} was started again")
        elif fault["back_at_round"] is None:
            peer = next(p for p in status["peers"] if p["peer_id"] == fault["peer"])
            if peer["state"] == "training":
                fault["back_at_round"] = now
                self.notes.append(f"round {now}: {fault['node']} is back and trains")

    def _kill_one(self, now: int) -> None:
        self.killed = list(self.nodes.values())[-1]
        self.killed.kill()
        key = load_or_create(self.killed.folder / "state" / "identity.key")
        peer_id = peer_id_of(key.public_key())
        self.notes.append(f"round {now}: {self.killed.name} (…{peer_id[-6:]}) was killed with SIGKILL")
        self.faults.append(
            {
                "node": self.killed.name,
                "peer": peer_id,
                "signal": "SIGKILL",
                "killed_at_round": now,
                "restarted_at_round": None,
                "back_at_round": None,
            }
        )

    def _is_late(self, child: Child) -> bool:
        """Whether the run was over before the node that was killed was back: there is nothing to wait for."""
        return any(f["node"] == child.name and f["back_at_round"] is None for f in self.faults)

    def _wait_for_end(self, child: Child) -> None:
        try:
            code = child.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"{child.name} does not end; its log ends with:\n{child.log_tail()}") from None
        if code:
            raise _ended(child)

    def _result(self) -> dict[str, Any]:
        end = json.loads((self.folder / "coordinator" / "state" / "result.json").read_text())
        late = [f["peer"] for f in self.faults if f["back_at_round"] is None]
        return figures(end, self.plan.strategy, list(self.ranks.values()), self.faults, late)


def _ended(child: Child) -> DemoFailed:
    return DemoFailed(
        f"{child.name} ended with exit code {child.process.poll()}; its log ends with:\n{child.log_tail()}"
    )


def _sum_up(console: Console, plan: DemoPlan, result: Mapping[str, Any]) -> None:
    payload, sent, ddp = (result[f"{of}_bytes_per_peer_round"] for of in ("payload", "sent", "ddp"))
    lines = [
        f"\n{result['rounds']} rounds in {result['seconds']:.0f} s. Held-out loss "
        f"{result['held_out_first']:.3f} -> "
        f"{human_loss(result['held_out_last'], result['loss_unit'], result['bytes_per_token'])}.",
        agreement(result["fingerprints"]),
        f"Per peer and round: {bytes_beside_ddp(payload, sent, ddp)}.",
    ]
    lines += [
        f"{fault['node']} was killed with SIGKILL at round {fault['killed_at_round']}, "
        + (
            f"and was back at round {fault['back_at_round']}; the others went on."
            if fault["back_at_round"] is not None
            else "and the run was over before it was back: give it more --rounds."
        )
        for fault in result["faults"]
    ]
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


def _toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Strings, numbers and booleans read the same in TOML and JSON."""
    lines = []
    for name, values in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
