"""The page in a real browser, while a swarm of real processes trains."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.small_run import TASK
from tests.support.waiting import wait_until

webdriver = pytest.importorskip("selenium.webdriver", reason="the extra `test` brings selenium")

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]

Start = Callable[..., Any]

RUN = f"""
[run]
name = "watched <b>closely</b>"
rounds = 100000
min_peers = 2
eval_every = 20
{TASK}[strategy]
name = "decoupled"
lr = 1e-2
[network]
heartbeat_s = 0.5
"""

FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-dev-shm-usage",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,900",
)
WAIT_S = 150.0
"""For anything at all: a start of a node takes 10 s of two cores that others use, too."""


class Browser:
    """Chromium at the page."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        self._driver.get(url)

    def run(self, script: str) -> Any:
        return self._driver.execute_script(f"return {script}")

    def text(self, css: str) -> str:
        return str(self.run(f"document.querySelector('{css}').textContent"))

    def wait(self, script: str) -> None:
        """Until it is true in the page."""
        seen = "document.body.innerText"
        wait_until(lambda: bool(self.run(script)), WAIT_S, lambda: f"not {script}:\n{self.run(seen)}")

    def peers(self) -> dict[str, str]:
        """Index -> state, as the table shows them."""
        rows = "[...document.querySelectorAll('#peer-rows tr')]"
        return dict(self.run(f"{rows}.map(row => [row.dataset.peer, row.cells[1].textContent])"))

    def errors(self) -> list[str]:
        """What the console has since this was last asked for."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def as_phone(self, width: int) -> None:
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def in_dark(self) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip("no chromium with chromedriver in PATH (Debian: chromium and chromium-driver)")
    folder = tmp_path_factory.mktemp("chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    service = webdriver.ChromeService(driver_program, env=environment)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
        shutil.rmtree(folder, ignore_errors=True)


CUT = """[...document.querySelectorAll('.tile *, #peers-title, #peer-rows td')].filter(e => e.offsetParent
    && !e.classList.contains('device') && (e.scrollWidth > e.clientWidth + 1) && e.clientWidth
    && getComputedStyle(e).overflowX !== 'visible').map(e => e.outerHTML)"""
"""What does not fit into its place and is not seen whole."""

FOLLOWS = """(() => { const told = structuredClone(last);
    for (const peer of told.peers) peer.state = "gone";
    told.seat = { seats: [], onlookers: [], need: 2, wanted: 3, peer_id: "BBBBBB", leader: "AAAAAA" };
    last = told; show(); return true; })()"""
"""The page of a coordinator that another one leads: no node is with it."""

OUTSIDE = """[...document.querySelectorAll('.tile *, #peer-rows td > *, #evaluation-rows *')].filter(e => {
    const card = e.closest('.card').getBoundingClientRect(), box = e.getBoundingClientRect();
    return box.width && (box.right > card.right + 1 || box.left < card.left - 1); }).map(e => e.outerHTML)"""


def test_a_live_run_as_a_browser_shows_it(browser: Browser, thinwire: Start, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    port = free_port()
    lead = ("coordinator", "run.toml", "--state", "state", "--host", "127.0.0.1")
    lead += ("--http", f"127.0.0.1:{port}")
    coordinator = thinwire(*lead)
    ticket = coordinator.first_line()
    assert f"the swarm's page: http://127.0.0.1:{port} " in coordinator.stderr()
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait("document.querySelector('#state').textContent === 'waiting for 2 more peers'")
    assert browser.text("#run") == "watched <b>closely</b>"  # text, whatever it says
    assert browser.text("#loss-chart .empty") == "Waiting for 2 more peers"
    browser.wait("!document.querySelector('#copy').disabled")
    assert browser.run("document.querySelector('#ticket').value") == f"thinwire join {ticket}"

    join = ("join", ticket, "--threads", "1", "--host", "127.0.0.1")
    nodes = [thinwire(*join) for _ in range(2)]
    browser.wait("document.querySelector('#state').textContent === 'training'")
    browser.wait("document.querySelector('#loss-chart .empty').hidden")

    # The curve moves: another picture, of more rounds.
    rounds = "Number(document.querySelector('#bar').getAttribute('aria-valuenow'))"
    summary = "document.querySelector('#loss-chart .plot').getAttribute('aria-label')"
    picture = "document.querySelector('#loss-chart canvas').toDataURL()"
    seen_rounds, seen_summary, seen_picture = (browser.run(s) for s in (rounds, summary, picture))
    assert seen_summary.startswith("Loss over ")
    browser.wait(f"{rounds} > {seen_rounds} + 3 && {summary} !== {seen_summary!r}")
    assert browser.run(picture) != seen_picture
    browser.wait("charts[0].known[0].filter(isNumber).length > 3 && charts[0].known[1].some(isNumber)")
    browser.wait("charts[1].known.every(column => column.some(isNumber))")
    browser.wait("charts[2].known.every(column => column.some(isNumber))")
    assert float(browser.text("#loss")) < 7
    browser.wait("document.querySelectorAll('#peer-rows tr.training').length === 2")
    assert browser.peers() == {"0": "training", "1": "training"}
    assert browser.run(
        "[...document.querySelectorAll('.device')].every(d => d.textContent.includes('thread'))"
    )
    browser.wait("document.querySelectorAll('#peer-rows .good').length === 2")  # fingerprints agree
    browser.wait("document.querySelectorAll('#entry-rows tr').length > 3")

    # As most nodes say, none is far from the others.
    browser.wait(
        "[...document.querySelectorAll('.trust')].every(t => /^\\d[.\\d]* \u00d7/.test(t.textContent))"
    )
    assert browser.run("document.querySelector('#evaluations').hidden")
    bad = """(() => { source.close(); const told = structuredClone(last);
        const trust = { size: 900, clipped: 1, passed: 2, failed: 3, until: 12345, rejected: { samples: 7 } };
        Object.assign(told.peers[1], { trust, empty: 4 });
        told.evaluations = [[20, 'accuracy 0.5, perplexity 12'.repeat(9)]];
        last = told; show(); return true; })()"""
    assert browser.run(bad)
    assert browser.text("#peer-rows tr:nth-child(2) .trust") == "✗ 900 \u00d7 weight 0 …"
    says = browser.run("document.querySelector('#peer-rows tr:nth-child(2) .trust').title")
    assert "weighs nothing until round 12,345" in says
    assert "audits: 2 passed, 3 failed; 4 offers of dropped batches only; refused: samples 7 times" in says
    assert browser.text("#evaluation-rows").startswith("Round 20accuracy 0.5")
    for width in (1280, 390):
        browser.as_phone(width)
        assert browser.run(CUT) == []
        assert browser.run(OUTSIDE) == []
        assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(FOLLOWS)
    assert set(browser.peers().values()) == {"\u2013"}
    assert browser.text("#peers") == "\u2013"
    assert browser.text("#peers-more") == "…AAAAAA knows them, which leads"
    browser.run("connect()")
    browser.wait("document.querySelector('#evaluations').hidden")
    browser.wait("document.querySelectorAll('#peer-rows tr.training').length === 2")

    browser.as_phone(390)
    browser.in_dark()
    browser.wait("charts.every(chart => chart.u.width < 390)")
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(15, 18, 22)"

    nodes[0].process.send_signal(signal.SIGKILL)
    browser.wait("document.querySelectorAll('#peer-rows tr.gone').length === 1")
    assert sorted(browser.peers().values()) == ["gone", "training"]
    browser.wait("document.querySelector('#event-rows').textContent.includes('was lost')")
    browser.wait("/\\d+ (s|min) ago/.test(document.querySelector('tr.gone').lastChild.textContent)")
    assert browser.errors() == []

    # The coordinator is away for a while, and comes back with all that was there.
    before = browser.run(rounds)
    coordinator.process.kill()
    browser.wait("!document.querySelector('#notice').hidden")
    assert "does not answer, trying again" in browser.text("#notice")
    assert sorted(browser.peers().values()) == ["gone", "was training"]
    thinwire(*lead)
    browser.wait("document.querySelector('#notice').hidden")
    browser.wait(f"{rounds} > {before}")
    assert browser.run("charts[0].known[0].filter(isNumber).length") > 3
    assert all(f"127.0.0.1:{port}/" in error and "net::ERR_" in error for error in browser.errors())
