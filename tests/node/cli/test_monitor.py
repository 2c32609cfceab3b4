"""`thinwire monitor` and what it writes: each file is what its own checker wants, and nothing is asked for
that no node or coordinator has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.coordinator_status import scrape, status_of
from tests.support.paths import ROOT
from tests.support.prometheus import Tools, find_tools, names, queries, samples
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.observe.gateway import coordinator_routes
from thinwire.coordinator.observe.metrics import with_trust
from thinwire.coordinator.protocol.addresses import HttpAddress
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.messages import GenesisBody
from thinwire.coordinator.protocol.web import serve_http
from thinwire.coordinator.server_thread import ServerThread
from thinwire.node.cli.monitor import Address, ask, contents, how_to_start, monitor, of_ticket, source_folder
from thinwire.node.tracking.device_metrics import DeviceCollector
from thinwire.node.tracking.metrics import NodeMetrics

SOURCE = ROOT / "deploy/monitoring"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return find_tools(tmp_path_factory.mktemp("prometheus"))


@pytest.fixture(scope="module")
def coordinator() -> Iterator[str]:
    """Where something answers as a coordinator with a token does."""

    async def sd(_request: Request) -> Response:
        return JSONResponse([{"targets": ["x:1"], "labels": {"instance": "12D3KooA"}}])

    async def other(_request: Request) -> Response:
        return JSONResponse({"not": "a list of targets"})

    routes = [Route("/sd", sd), Route("/other/sd", other)]
    with serve_http(routes, HttpAddress("127.0.0.1", 0, "secret")) as port:
        yield f"127.0.0.1:{port}"


def everything() -> str:
    """The exposition of a node and of a coordinator that have measured all there is."""
    node = NodeMetrics()
    node.registry.register(DeviceCollector(["cpu"]))
    node.proposed(2.0, 100, 4, 64, 1)
    node.held_out(2.5)
    node.compression(300.0, 75.0)
    node.disk(Path("/"))
    status = status_of()
    return with_trust(node.text(), status["peers"][0]).decode() + scrape(status)


def test_all_that_is_asked_for_exists() -> None:
    """Names, and the values of labels."""
    text = everything()
    exposed, known = samples(text), names(text)
    records = re.findall(r"record: (\S+)", (SOURCE / "rules/recording.yml").read_text())
    asked = queries(SOURCE)
    assert len(asked) > 60
    for expression in asked:
        for name, matchers in re.findall(
            r"\b(swarm[\w:]*|instance:[\w:]+|thinwire_\w+)(?:\{([^}]*)\})?", expression
        ):
            assert name in known or name in records, f"{name} in {expression}"
            for label, how, wanted in re.findall(r'(\w+)(=~|!~|=|!=)"([^"]*)"', matchers):
                if label in {"job", "instance"}:
                    continue
                there = {dict(labels).get(label) for labels in exposed[name]}
                for value in wanted.split("|") if "~" in how else [wanted]:
                    assert value in there, f"{label}={value} of {name}"


@pytest.mark.swarm
def test_rules(tools: Tools) -> None:
    """Rules, scenarios and configuration, as promtool and amtool judge them; there is a scenario for every
    alert, and every alert says what to do."""
    for args in (
        [tools.promtool, "check", "config", SOURCE / "prometheus.yml"],
        [tools.promtool, "test", "rules", SOURCE / "tests/alerts.yml"],
        [tools.amtool, "check-config", SOURCE / "alertmanager.yml"],
    ):
        done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    scenarios = (SOURCE / "tests/alerts.yml").read_text()
    groups = yaml.safe_load((SOURCE / "rules/alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    for alert in alerts:
        assert alert["alert"] in scenarios, f"no scenario for {alert['alert']}"
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert alert["annotations"]["summary"]
        _, word, what = alert["annotations"]["description"].partition("Next: ")
        assert word, f"{alert['alert']} does not name the next command"
        assert len(what) > 10
    assert len({alert["alert"] for alert in alerts}) == len(alerts) > 15


def test_of_several_coordinators_all_are_asked(tmp_path: Path) -> None:
    """Only the one that leads knows the nodes; which one that is changes."""
    hosts = ["127.0.0.1:1", "b.example:9100", "c.example:9100"]
    folder, _ = monitor(None, f"http://{hosts[0]}", tmp_path / "w", None, force=False, others=hosts[1:])
    own, nodes = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert own["static_configs"] == [{"targets": hosts}]
    found = nodes["http_sd_configs"]
    assert [each["url"] for each in found] == [f"http://{host}/sd" for host in hosts]
    assert found[0] == {**found[2], "url": found[0]["url"]}
    with pytest.raises(ConfigError, match="all by http"):
        monitor(None, hosts[0], tmp_path / "x", None, force=False, others=["https://b.example:1"])


@pytest.mark.swarm
def test_what_is_written(tmp_path: Path, coordinator: str, tools: Tools) -> None:
    folder, address = monitor(None, coordinator, tmp_path / "a folder", "secret", force=False)
    assert (folder, str(address)) == (tmp_path / "a folder", f"http://{coordinator}")
    token = folder / "http-token"
    assert token.read_text() == "secret"
    assert token.stat().st_mode & 0o777 == 0o600
    checked = subprocess.run(
        [tools.promtool, "check", "config", folder / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    loaded: dict[str, Any] = {
        str(p.relative_to(folder)): yaml.safe_load(p.read_text()) for p in folder.rglob("*.yml")
    }
    itself, nodes = loaded["prometheus.yml"]["scrape_configs"]
    assert itself["static_configs"] == [{"targets": [coordinator]}]
    assert nodes["http_sd_configs"][0]["url"] == f"http://{coordinator}/sd"
    provider = loaded["grafana/provisioning/dashboards/thinwire.yml"]["providers"][0]
    assert Path(provider["options"]["path"]) == folder / "grafana/dashboards"
    assert (folder / "grafana/dashboards/thinwire.json").read_bytes() == (
        SOURCE / "grafana/dashboards/thinwire.json"
    ).read_bytes()
    mounted = loaded["compose.yml"]["services"]["grafana"]["volumes"]
    assert provider["options"]["path"] in [volume["target"] for volume in mounted]
    for service in loaded["compose.yml"]["services"].values():
        for volume in service["volumes"]:
            assert (folder / volume["source"]).exists(), volume
    assert str(folder) in how_to_start(folder, address)


def test_https() -> None:
    files = contents(Path("/somewhere"), Address.parse("https://swarm.example"))
    config = yaml.safe_load(files["prometheus.yml"])
    assert [job["scheme"] for job in config["scrape_configs"]] == ["https", "https"]
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["swarm.example:443"]}]
    assert config["scrape_configs"][1]["http_sd_configs"][0]["url"] == "https://swarm.example:443/sd"
    assert source_folder().samefile(SOURCE)


@pytest.mark.swarm
def test_what_is_there_is_kept(tmp_path: Path, coordinator: str) -> None:
    def write(force: bool = False) -> None:
        monitor(None, coordinator, tmp_path, "secret", force=force)

    write()
    (tmp_path / "alertmanager.yml").write_text("mine")
    (tmp_path / "prometheus.yml").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        write()
    assert (tmp_path / "prometheus.yml").read_text() == "mine"
    write(force=True)
    assert "scrape_configs" in (tmp_path / "prometheus.yml").read_text()
    assert (tmp_path / "alertmanager.yml").read_text() == "mine"


@pytest.mark.swarm
@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        (None, None, "whom to watch"),
        ("@", None, "add --http-token TOKEN"),
        ("@", "wrong", "another one than was given"),
        ("@/other", "secret", "write it as http://HOST:PORT"),
        ("ftp://a:1", None, "write it as http://HOST:PORT"),
        ("somewhere", None, "write it as http://HOST:PORT"),
    ],
)
def test_bad_input_writes_nothing(
    tmp_path: Path, coordinator: str, url: str | None, token: str | None, message: str
) -> None:
    where = url and url.replace("@", coordinator)
    with pytest.raises(ConfigError, match=message):
        monitor(None, where, tmp_path / "folder", token, force=False)
    assert not (tmp_path / "folder").exists()


def test_one_that_does_not_answer_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = monitor(None, "127.0.0.1:1", tmp_path / "folder", None, force=False)
    assert (folder / "prometheus.yml").exists()
    assert "does not answer" in caplog.text


@pytest.mark.swarm
def test_a_ticket_is_enough_or_the_error_says_what_is_missing(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey, coordinator: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    save(key, state / "key")
    with ServerThread(state, make_genesis()) as it:

        def found() -> tuple[Address, str]:
            return of_ticket(it.ticket, "secret")

        with pytest.raises(
            ConfigError, match="serves no HTTP: start it again with the same command and --http"
        ):
            found()
        routes = coordinator_routes(it.server, it.loop)
        with serve_http(routes, HttpAddress("127.0.0.1", 0, "secret")) as port:
            for host in ("127.0.0.1", "0.0.0.0"):  # everywhere: the ticket's addresses are tried
                it.server.http = HttpAddress(host, port, "secret")
                assert found() == (Address("http", f"127.0.0.1:{port}"), "test")
        with pytest.raises(ConfigError, match=r"cannot be reached from here.*refused.*ssh -L.*--coordinator"):
            found()
        it.server.http = HttpAddress("127.0.0.1", int(coordinator.rpartition(":")[2]))
        with pytest.raises(ConfigError, match="the coordinator of another run answers"):
            found()


@pytest.mark.swarm
def test_something_else_answers() -> None:
    routes = [Route("/sd", lambda _: JSONResponse({"a": 1}))]
    refused = pytest.raises(ConfigError, match="does not answer as a coordinator")
    with serve_http(routes, HttpAddress("127.0.0.1", 0)) as port, refused:
        ask(Address("http", f"127.0.0.1:{port}"), None)


def test_the_dashboard_is_what_its_script_makes() -> None:
    made = subprocess.run(
        [sys.executable, SOURCE / "grafana/make_dashboard.py", "-"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(made.stdout) == json.loads((SOURCE / "grafana/dashboards/thinwire.json").read_text())
