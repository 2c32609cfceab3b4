"""A real Prometheus watches a swarm of real processes through the coordinator alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.prometheus import Tools, check_conventions, find_tools, value
from thinwire.node.status import StatusClient

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

Start = Callable[..., Any]

RUN = """
[run]
name = "watched"
rounds = 100000
min_peers = 3
[task]
layers = 1
width = 16
heads = 2
context = 16
batch = 2
held_out_bytes = 1024
[strategy]
name = "decoupled"
lr = 1e-2
[network]
heartbeat_s = 0.5
"""

CONFIG = """
global: {{scrape_interval: 2s, scrape_timeout: 2s}}
scrape_configs:
  - job_name: thinwire-coordinator
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
  - job_name: thinwire
    http_sd_configs: [{{url: "http://127.0.0.1:{port}/sd", refresh_interval: 1s}}]
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return find_tools(tmp_path_factory.mktemp("prometheus"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


class Prometheus:
    """A server that scrapes what its configuration says."""

    def __init__(self, port: int) -> None:
        self._port = port

    def query(self, text: str) -> dict[str, float]:
        """Instance -> value; empty while it does not answer."""
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            found = json.loads(fetch(url))["data"]["result"]
        except OSError:
            return {}
        return {row["metric"].get("instance", ""): float(row["value"][1]) for row in found}


@contextmanager
def prometheus(tools: Tools, folder: Path, coordinator_port: int) -> Iterator[Prometheus]:
    config, port = folder / "prometheus.yml", free_port()
    config.write_text(CONFIG.format(port=coordinator_port))
    subprocess.run([tools.promtool, "check", "config", str(config)], check=True, capture_output=True)
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(
            [
                tools.prometheus,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield Prometheus(port)
    finally:
        server.terminate()
        server.wait(30)


def test_a_swarm_as_prometheus_sees_it(tools: Tools, thinwire: Start, tmp_path: Path) -> None:
    """No node has a port for metrics; one of them is killed in the end."""
    (tmp_path / "run.toml").write_text(RUN)
    port = free_port()
    coordinator = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", "--http", f"127.0.0.1:{port}")
    ticket = coordinator.first_line()
    assert fetch(f"http://127.0.0.1:{port}/readyz") == "ready\n"
    join = ("join", ticket, "--threads", "1", "--host", "127.0.0.1")
    nodes = [thinwire(*join, before=("nice", "-n", "10")) for _ in range(3)]
    with prometheus(tools, tmp_path, port) as server, StatusClient(ticket) as client:

        def is_up(*expected: float) -> bool:
            return sorted(server.query('up{job="thinwire"}').values()) == list(expected)

        wait_until(lambda: is_up(1, 1, 1), 90, lambda: str(server.query("up")) + nodes[0].stderr()[-2000:])
        wait_until(lambda: len(server.query("thinwire_loss")) == 3, 60, lambda: nodes[0].stderr()[-2000:])
        targets = json.loads(fetch(f"http://127.0.0.1:{port}/sd"))
        instances = {target["labels"]["instance"] for target in targets}
        assert set(server.query('up{job="thinwire"}')) == set(server.query("thinwire_loss")) == instances

        # What it has stored lies between two looks at the status.
        first = client.fetch()
        wait_until(
            lambda: list(server.query("thinwire_swarm_round").values()) >= [first["round"]],
            60,
            lambda: str(server.query("thinwire_swarm_round")),
        )
        stored = {
            name: next(iter(server.query(f"thinwire_swarm_{name}").values()))
            for name in ("round", "payload_bytes_total", "compression_ratio", "loss")
        }
        last = client.fetch()
        assert first["round"] <= stored["round"] <= last["round"]
        assert first["payload_bytes"] <= stored["payload_bytes_total"] <= last["payload_bytes"]
        ratios = [s["ddp_bytes_per_peer_round"] / s["payload_bytes_per_peer_round"] for s in (first, last)]
        assert 0.8 * min(ratios) < stored["compression_ratio"] < 1.25 * max(ratios)
        assert 0 < stored["loss"] < 6

        by_instance = {
            peer: fetch(f"http://127.0.0.1:{port}/peers/{peer}/metrics") for peer in sorted(instances)
        }
        for text in (fetch(f"http://127.0.0.1:{port}/metrics"), *by_instance.values()):
            check_conventions(text)
            assert tools.check_metrics(text) == ""
        for text in by_instance.values():
            assert value(text, "thinwire_training") == 1
            assert value(text, "thinwire_device_memory_used_bytes", device="cpu") > 10**7

        nodes[0].process.send_signal(signal.SIGKILL)
        wait_until(lambda: is_up(0, 1, 1), 60, lambda: str(server.query("up")))
        nodes[1].process.send_signal(signal.SIGINT)  # one that leaves is not missed
        assert nodes[1].wait() == 128 + signal.SIGINT
        listed = [t["labels"]["instance"] for t in json.loads(fetch(f"http://127.0.0.1:{port}/sd"))]
        assert len(listed) == 2
