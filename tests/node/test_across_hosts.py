"""A coordinator and two nodes on three hosts (network namespaces) with links of 1 Mbit/s."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.cables import wait_running

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

PACKET_OVERHEAD_BYTES = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32

RUN = """
[run]
name = "hosts"
rounds = 5
eval_every = 100
[task]
layers = 1
width = 40
heads = 2
context = 16
batch = 4
held_out_bytes = 1024
[strategy]
name = "decoupled"
lr = 1e-3
[strategy.compressor]
name = "dense"
"""


@dataclass(frozen=True)
class Host:
    """A network namespace. `link` is its end of the cable to the coordinator's host, if it is a node's."""

    name: str
    link: str = ""

    def command(self, *args: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *args]

    def counters(self) -> tuple[int, int]:
        """Bytes and packets over the link so far, both directions."""
        answer = subprocess.run(
            self.command("ip", "-json", "-statistics", "link", "show", self.link),
            capture_output=True,
            check=True,
        )
        stats = json.loads(answer.stdout)[0]["stats64"]
        return tuple(stats["rx"][what] + stats["tx"][what] for what in ("bytes", "packets"))  # type: ignore[return-value]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """The coordinator's host and two nodes' hosts, each with a cable to the first one."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs ip and tc (iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    tag = f"tw{os.getpid() % 100000}"
    hub, nodes = Host(f"{tag}c"), [Host(f"{tag}n{i}", f"{tag}e{i}") for i in (1, 2)]
    with ExitStack() as stack:
        for host in (hub, *nodes):
            made = subprocess.run(
                ["ip", "netns", "add", host.name], capture_output=True, text=True, check=False
            )
            if made.returncode:
                pytest.skip(f"network namespaces are not allowed here: {made.stderr.strip()}")
            stack.callback(subprocess.run, ["ip", "netns", "delete", host.name], check=False)
            run(host.command("ip", "link", "set", "lo", "up"))
        for i, node in enumerate(nodes, start=1):
            far_end = f"{tag}h{i}"
            run(["ip", "link", "add", node.link, "netns", node.name, "type", "veth",
                 "peer", "name", far_end, "netns", hub.name])  # fmt: skip
            for host, device, address in ((node, node.link, 2), (hub, far_end, 1)):
                run(host.command("ip", "address", "add", f"10.77.{i}.{address}/24", "dev", device))
                run(host.command("ip", "link", "set", device, "up"))
                run(host.command("tc", "qdisc", "add", "dev", device, "root", "tbf",
                                 "rate", "1mbit", "burst", "16kb", "latency", "400ms"))  # fmt: skip
        for i, node in enumerate(nodes, start=1):
            wait_running(hub.name, f"{tag}h{i}")
            wait_running(node.name, node.link)
        yield [hub, *nodes]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def test_a_run_over_thin_links_trains_and_its_bytes_are_counted(
    hosts: list[Host], tmp_path: Path, thinwire: Callable[..., Any]
) -> None:
    hub, *nodes = hosts
    (tmp_path / "run.toml").write_text(RUN)
    coordinator = thinwire("coordinator", "run.toml", host=hub.name)
    ticket = coordinator.first_line()
    before = [node.counters() for node in nodes]
    joined = [thinwire("join", ticket, "--threads", "1", "--json", host=node.name) for node in nodes]
    for program in joined:
        assert program.wait(200) == 0, program.stderr()
    assert coordinator.wait(70) == 0, coordinator.stderr()
    results = [json.loads(program.stdout()) for program in joined]
    assert [r["rounds"] for r in results] == [5, 5]
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    for node, result, (bytes_before, packets_before) in zip(nodes, results, before, strict=True):
        n_bytes, n_packets = node.counters()
        on_the_wire = n_bytes - bytes_before - PACKET_OVERHEAD_BYTES * (n_packets - packets_before)
        counted = result["sent_bytes"] + result["received_bytes"]
        assert counted > 5 * 200_000, "rounds of 200 kB and more"
        assert counted == pytest.approx(on_the_wire, rel=0.10)


GOSSIP = (
    RUN.partition("[strategy]")[0]
    + """
[strategy]
name = "gossip"
lr = 1e-3
inner_steps = 1
topology = "complete"
merge_every = "end"
[network]
heartbeat_s = 0.2
"""
)


def test_neighbours_behind_walls_exchange_by_way_of_a_node_that_both_reach(
    hosts: list[Host], tmp_path: Path, thinwire: Callable[..., Any]
) -> None:
    """The nodes' hosts have no route to each other; the third node is on the coordinator's host."""
    hub, *nodes = hosts
    text = GOSSIP.replace("rounds = 5", "rounds = 5\nmin_peers = 3").replace("width = 40", "width = 16")
    (tmp_path / "run.toml").write_text(text)
    coordinator = thinwire("coordinator", "run.toml", "--state", "state", host=hub.name)
    ticket = coordinator.first_line()
    joined = [thinwire("join", ticket, "--threads", "1", "--json", host=host.name) for host in (*nodes, hub)]
    for program in joined:
        assert program.wait(200) == 0, program.stderr()
    assert coordinator.wait(70) == 0, coordinator.stderr()
    assert len({json.loads(program.stdout())["fingerprint"] for program in joined}) == 1
    status = json.loads((tmp_path / "state" / "result.json").read_text())
    (carrier,) = (peer["index"] for peer in status["peers"] if peer["gossip"]["carried"] > 0)
    edges = status["gossip"]["edges"]
    assert [edge[:2] for edge in edges] == [[0, 1], [0, 2], [1, 2]]
    for a, b, n_bytes, relayed in edges:
        assert n_bytes > 10_000
        assert relayed == (0 if carrier in (a, b) else n_bytes)
