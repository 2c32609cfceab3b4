"""A real Prometheus, configured by `thinwire monitor`, watches a swarm of real processes through the
coordinator alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.prometheus import Tools, check_conventions, find_tools, queries, value
from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError
from thinwire.node.cli.monitor import monitor
from thinwire.node.cli.status import StatusClient

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(500)]

Start = Callable[..., Any]

RUN = """
[run]
name = "watched"
rounds = 100000
min_peers = 3
keep = "1GB"
[task]
name = "custom"
layers = 4
width = 16
[strategy]
name = "decoupled"
lr = 1e-2
[network]
heartbeat_s = 0.5
"""

TOKEN = "as the coordinator's --http-token says"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return find_tools(tmp_path_factory.mktemp("prometheus"))


def fetch(url: str) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def at_last(url: str) -> str:
    """From a gateway whose node may be too busy to answer in time."""
    answers: list[str] = []

    def is_answered() -> bool:
        try:
            answers.append(fetch(url))
        except OSError:
            return False
        return True

    wait_until(is_answered, 60, lambda: f"no answer at {url}")
    return answers[-1]


class Prometheus:
    """A server that scrapes what its configuration says."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Rows; none while it does not answer. Raises HTTPError for what is no PromQL."""
        url = f"http://127.0.0.1:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            found: list[dict[str, Any]] = json.loads(fetch(url))["data"]["result"]
        except OSError as e:
            if isinstance(e, urllib.error.HTTPError) and e.code == 400:
                raise
            return []
        return found

    def query(self, text: str) -> dict[str, float]:
        """Instance -> value."""
        return {row["metric"].get("instance", ""): float(row["value"][1]) for row in self.ask(text)}


@contextmanager
def prometheus(tools: Tools, folder: Path) -> Iterator[Prometheus]:
    port = free_port()
    with (folder / "prometheus.log").open("wb") as log:
        server = subprocess.Popen(
            [
                tools.prometheus,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data/prometheus'}",
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


def in_a_hurry(folder: Path) -> None:
    """The same configuration, looking every second or two, with alerts that fire as soon as they are due."""
    config, alerts = folder / "prometheus.yml", folder / "rules/alerts.yml"
    text = config.read_text().replace("scrape_interval: 15s", "scrape_interval: 2s")
    text = text.replace("scrape_timeout: 10s", "scrape_timeout: 2s")
    config.write_text(re.sub(r"(evaluation|refresh)_interval: 15s", r"\1_interval: 1s", text))
    alerts.write_text(re.sub(r"for: \d+m", "for: 0s", alerts.read_text()))


def test_a_swarm_as_prometheus_sees_it(
    tools: Tools, thinwire: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node has a port for metrics; one of them is killed in the end, and the alert fires."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/chaos"))
    monkeypatch.setenv("CHAOS_WORK_S", "0.2")  # and leaves the cores to Prometheus
    task = ("--task", "light_task:make")
    (tmp_path / "run.toml").write_text(RUN)
    port = free_port()
    http = ("--http", f"127.0.0.1:{port}", "--http-token", TOKEN)
    ticket = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", *task, *http).first_line()
    join = ("join", ticket, *task, "--threads", "1", "--host", "127.0.0.1")
    tracked: dict[int, tuple[str, ...]] = {1: ("--track", "tensorboard")} if find_spec("tensorboard") else {}
    nodes = [thinwire(*join, "--state", f"node-{i}", *tracked.get(i, ())) for i in range(3)]
    assert fetch(f"http://127.0.0.1:{port}/readyz") == "ready\n"
    with pytest.raises(ConfigError, match="asks for a token"):
        monitor(ticket, None, tmp_path / "watch", None, force=False)
    folder, address = monitor(ticket, None, tmp_path / "watch", TOKEN, force=False)
    assert str(address) == f"http://127.0.0.1:{port}"
    in_a_hurry(folder)
    with prometheus(tools, folder) as server, StatusClient(ticket) as client:

        def is_up(*expected: float) -> bool:
            return sorted(server.query('up{job="thinwire"}').values()) == list(expected)

        def firing(alert: str) -> set[str]:
            return set(server.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}'))

        wait_until(lambda: is_up(1, 1, 1), 90, lambda: str(server.query("up")) + nodes[0].stderr()[-2000:])
        targets = json.loads(fetch(f"http://127.0.0.1:{port}/sd"))
        instances = {target["labels"]["instance"] for target in targets}
        assert set(server.query('up{job="thinwire"}')) == instances
        wait_until(
            lambda: set(server.query("thinwire_loss")) == instances, 60, lambda: nodes[0].stderr()[-2000:]
        )

        # What it has stored lies between two looks at the status.
        first = client.fetch()
        wait_until(
            lambda: list(server.query("thinwire_swarm_round").values()) >= [first["round"]],
            60,
            lambda: str(server.query("thinwire_swarm_round")),
        )
        stored = {
            name: next(iter(server.query(f"last_over_time(thinwire_swarm_{name}[5m])").values()))
            for name in ("round", "payload_bytes_total", "compression_ratio", "loss")
        }
        last = client.fetch()
        assert first["round"] <= stored["round"] <= last["round"]
        assert first["payload_bytes"] <= stored["payload_bytes_total"] <= last["payload_bytes"]
        ratios = [s["ddp_bytes_per_peer_round"] / s["payload_bytes_per_peer_round"] for s in (first, last)]
        assert 0.8 * min(ratios) < stored["compression_ratio"] < 1.25 * max(ratios)
        assert 0 < stored["loss"] < 6

        by_instance = {peer: at_last(f"http://127.0.0.1:{port}/peers/{peer}/metrics") for peer in instances}
        for text in (fetch(f"http://127.0.0.1:{port}/metrics"), *by_instance.values()):
            check_conventions(text)
            assert tools.check_metrics(text) == ""
        for text in by_instance.values():
            assert value(text, "thinwire_training") == 1
            assert value(text, "thinwire_device_memory_used_bytes", device="cpu") > 10**7
            assert value(text, "thinwire_disk_free_bytes") > 0

        # Every panel of the dashboard and every recorded rule has an answer, but those that show faults only.
        asked = {
            query.replace("$__rate_interval", "1m").replace("$node", ".*")
            for query in queries(folder, rules="rules/recording.yml")
            if not query.endswith("> 0") and not query.startswith("ALERTS")
        }

        def unanswered() -> list[str]:
            return [query for query in asked if not server.ask(query)]

        wait_until(lambda: not unanswered(), 90, lambda: str(unanswered()))

        # A machine that is busy may have answered too late once.
        wait_until(lambda: not firing("ThinwireNodeDown"), 60, lambda: str(server.ask("ALERTS")))
        wait_until(lambda: not firing("ThinwireCoordinatorDown"), 60, lambda: str(server.ask("ALERTS")))
        nodes[0].process.send_signal(signal.SIGKILL)
        wait_until(lambda: is_up(0, 1, 1), 60, lambda: str(server.query("up")))
        killed = {peer for peer, up in server.query('up{job="thinwire"}').items() if up == 0}
        wait_until(lambda: firing("ThinwireNodeDown") == killed, 60, lambda: str(server.ask("ALERTS")))
        nodes[1].process.send_signal(signal.SIGINT)  # one that leaves is not missed
        assert nodes[1].wait() == 128 + signal.SIGINT
        for i in (0, 1):  # records are whole, also of the one that was killed
            (track,) = tmp_path.glob(f"node-{i}/*/track.jsonl")
            kinds = [json.loads(line)["kind"] for line in track.read_text().splitlines()]
            assert kinds[0] == "start"
            assert "round" in kinds
            assert (kinds[-1] == "end") == (i == 1)
        assert len([*tmp_path.glob("node-*/*/tensorboard/events*")]) == len(tracked)
        listed = [t["labels"]["instance"] for t in json.loads(fetch(f"http://127.0.0.1:{port}/sd"))]
        assert len(listed) == 2
