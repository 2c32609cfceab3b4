"""A demo's coordinators and nodes as child processes, and what is done to them on the way."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.figures import counted
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ..cli.status import StatusClient, leads
from ..cli.view import Show, figures, headline, live_view
from ..run_files.toml import toml_of
from ..system.processes import Child, Children
from .coordinators import Coordinators
from .plan import DemoFailed, DemoPlan, ended

END_TIMEOUT_S = 90.0
STALL_S = 120.0  # no new round for so long: something is broken
ROUNDS_AWAY = 5  # how long the killed node stays away
LOOK_EVERY_S = 0.3

SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "decoupled": {
        "task": {"name": "text", "corpus": "pydoc"},
        "strategy": {"name": "decoupled", "lr": 3e-3, "sign": True},
        "strategy.compressor": {"name": "dct_topk", "k": 32, "group_size": 4096, "bits": 1},
        "schedule": {"name": "linear", "warmup_rounds": 10, "final_factor": 0.1},
    },
    "gossip": {
        "task": {"name": "text", "corpus": "pydoc"},
        "strategy": {"name": "gossip", "lr": 2e-3, "inner_steps": 4, "topology": "ring", "merge_every": 15},
        "schedule": {"name": "linear", "warmup_rounds": 4, "final_factor": 0.1},
    },
    "spsa": {
        "task": {"name": "text", "corpus": "stdlib"},
        "strategy": {"name": "spsa", "lr": 5e-5, "eps": 1e-3, "probes": 16},
        "schedule": {"name": "constant"},
    },
}


class DemoSwarm:
    """`base`: start from these weights; `save`: keep the last."""

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
        self.killed: list[Child] = []
        self.notes: list[str] = []
        self.faults: list[dict[str, Any]] = []
        self.folder.mkdir()
        run = {"name": f"demo-{plan.strategy}", "rounds": plan.rounds, "min_peers": plan.n_peers}
        if base is not None:
            run["base"] = str(base)
        run_file = self.folder / "run.toml"
        run_file.write_text(toml_of({"run": run, **SECTIONS[plan.strategy]}))
        self.coordinators = Coordinators(plan, children, self.folder, run_file)
        self._killed_s, self._counted_before = 0.0, 0
        self._last: Child | None = None
        """The coordinator that sees the nodes off: those that follow it have nothing to say any more."""

    def run(self) -> dict[str, Any]:
        """Raises DemoFailed."""
        n = self.plan.n_coordinators
        who = "a coordinator" if n == 1 else counted(n, "coordinator")
        self.console.print(f"Starting {who} and {counted(self.plan.n_peers, 'node')}.", highlight=False)
        self.coordinators.start(self.stopped)
        for i in range(self.plan.n_peers):
            self.ranks[f"node-{i}"] = self.plan.ranks[i % len(self.plan.ranks)]
            self._start_node(f"node-{i}")
        with StatusClient(self.coordinators.ticket) as client:
            self._tell_address(client)
            self._watch(client)
        if self.stopped():
            return {}
        for child in (self._last, *self.nodes.values()):
            if child is not None and not self._is_late(child):
                self._wait_for_end(child)
        self.children.end()
        return self._result()

    def _all(self) -> list[Child]:
        return [*self.coordinators.running.values(), *self.nodes.values()]

    def _tell_address(self, client: StatusClient) -> None:
        """Of the page; the coordinator knows the port, if it was to take a free one."""
        if (page := self._page(client.fetch())) is not None:
            self.console.print(
                f"The swarm's page: {page} (and /metrics, /sd, /healthz)", highlight=False, soft_wrap=True
            )

    def _page(self, status: Mapping[str, Any]) -> str | None:
        """That of the coordinator that has given this status."""
        http = self.plan.http
        return None if http is None else http._replace(port=status["http"]["port"]).url()

    def _start_node(self, name: str) -> None:
        folder = self.folder / name
        args = ["join", "-", "--device", "cpu", "--threads", "1", "--host", "127.0.0.1"]
        args += ["--state", str(folder / "state"), "--ranks", str(self.ranks[name])]
        if self.save is not None and not self.nodes:
            args += ["--save", str(self.save)]
        self.nodes[name] = self.children.start(name, folder, args, line=self.coordinators.ticket)

    def _watch(self, client: StatusClient) -> None:
        """Shows the swarm until the last round; kills a node on the way and starts it again, and so with the
        coordinator that leads, where there are several."""
        last_round, moved_s = -1, time.monotonic()
        with live_view(self.console, self.notes) as show:
            while not self.stopped():
                for child in self._all():
                    if child.process.poll() and child not in self.killed:
                        raise ended(child)
                self._look_for_the_next_commit()
                try:
                    status = client.fetch(timeout_s=5)
                except SwarmUnreachable:
                    if all(c.process.poll() is not None for c in self.coordinators.running.values()):
                        return
                    continue
                if status["round"] > last_round:
                    last_round, moved_s = status["round"], time.monotonic()
                if time.monotonic() - moved_s > STALL_S:
                    raise DemoFailed(f"no new round for {STALL_S:.0f} s: {headline(status)}")
                if self._step(status, last_round, show):
                    return
                time.sleep(LOOK_EVERY_S)

    def _step(self, status: Mapping[str, Any], now: int, show: Show) -> bool:
        """Shows it and does what is to be done now; whether that was all."""
        if self.plan.faults and self.plan.n_peers > 1:
            self._node_fault(status, now)
        if self.plan.faults and self.coordinators.n > 1:
            self._leader_fault(status, now)
        name = self.coordinators.name_of(status["seat"]["leader"])
        self._last = self._last if name is None else self.coordinators.running[name]
        is_last = now >= self.plan.rounds
        show(status, is_last)
        return is_last

    # ------------------------------------------------------------------------------------------- a node

    def _node_fault(self, status: Mapping[str, Any], now: int) -> None:
        fault = next((f for f in self.faults if "node" in f), None)
        if fault is None:
            if now >= self.plan.rounds // 3:
                self._kill_one(now)
            return
        n_counted = sum(p["offers_counted"] for p in status["peers"] if p["peer_id"] == fault["peer"])
        if fault["restarted_at_round"] is None:
            if now >= fault["killed_at_round"] + ROUNDS_AWAY:
                self._start_node(fault["node"])
                fault["restarted_at_round"], self._counted_before = now, n_counted
                self.notes.append(f"round {now}: {fault['node']} was started again")
        elif fault["back_at_round"] is None and n_counted > self._counted_before:
            # What its state says may be from before it was killed.
            fault["back_at_round"] = now
            self.notes.append(f"round {now}: {fault['node']} is back and trains")

    def _kill_one(self, now: int) -> None:
        victim = list(self.nodes.values())[-1]
        victim.kill()
        self.killed.append(victim)
        key = load_or_create(victim.folder / "state" / "identity.key")
        self._tell_kill({"node": victim.name}, victim.name, peer_id_of(key.public_key()), now)

    def _tell_kill(self, fault: dict[str, Any], who: str, peer_id: str, now: int) -> None:
        self.notes.append(f"round {now}: {who} (…{peer_id[-6:]}) was killed with SIGKILL")
        fault |= {"peer": peer_id, "signal": "SIGKILL", "killed_at_round": now}
        self.faults.append(fault | {"restarted_at_round": None, "back_at_round": None})

    # ---------------------------------------------------------------------------------------- who leads

    def _leader_fault(self, status: Mapping[str, Any], now: int) -> None:
        fault = self._leaders_fault
        if fault is None:
            leader = status["seat"]["leader"]
            if now >= 2 * self.plan.rounds // 3 and leader is not None:
                self._kill_leader(leader)
            return
        if fault["next_commit_s"] is None:
            return
        name = fault["coordinator"]
        if fault["led_by"] is None and leads(status) and status["seat"]["leader"] != fault["peer"]:
            fault["led_by"] = self.coordinators.name_of(status["seat"]["leader"])
            if (page := self._page(status)) is not None:
                self.notes.append(f"round {now}: the page of {fault['led_by']}, which leads now: {page}")
        if fault["restarted_at_round"] is None:
            if now >= fault["killed_at_round"] + ROUNDS_AWAY:
                self.coordinators.restart(name)
                fault["restarted_at_round"] = now
                self.notes.append(f"round {now}: {name} was started again")
        elif fault["back_at_round"] is None and self.coordinators.head(name) >= now - 1:
            fault["back_at_round"] = now
            self.notes.append(f"round {now}: {name} is back and has all rounds")

    @property
    def _leaders_fault(self) -> dict[str, Any] | None:
        return next((f for f in self.faults if "coordinator" in f), None)

    def _kill_leader(self, leader: str) -> None:
        name = self.coordinators.kill(leader)
        self._killed_s = time.monotonic()
        self.killed.append(self.coordinators.running[name])
        fault = {"coordinator": name, "next_commit_s": None, "led_by": None}
        self._tell_kill(fault, f"{name}, which led,", leader, self.coordinators.newest(but=name))

    def _look_for_the_next_commit(self) -> None:
        fault = self._leaders_fault
        if fault is None or fault["next_commit_s"] is not None:
            return
        now = self.coordinators.newest(but=fault["coordinator"])
        if now > fault["killed_at_round"]:
            fault["next_commit_s"] = round(time.monotonic() - self._killed_s, 2)
            self.notes.append(f"round {now}: the next commit, {fault['next_commit_s']:.1f} s after that")

    # ------------------------------------------------------------------------------------------ the end

    def _is_late(self, child: Child) -> bool:
        """Whether the run was over before what was killed was back: there is nothing to wait for."""
        late = [f.get("node") or f["coordinator"] for f in self.faults if f["back_at_round"] is None]
        return child.name in late

    def _wait_for_end(self, child: Child) -> None:
        try:
            code = child.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"{child.name} does not end; its log ends with:\n{child.log_tail()}") from None
        if code:
            raise ended(child)

    def _result(self) -> dict[str, Any]:
        late = [f["peer"] for f in self.faults if f["back_at_round"] is None]
        end, ranks = self.coordinators.result(self._last), list(self.ranks.values())
        result = figures(end, self.plan.strategy, ranks, self.faults, late)
        return result | {"coordinators": self.coordinators.n}
