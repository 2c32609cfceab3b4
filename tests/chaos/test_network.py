"""Connections that are cut, slowed down or swallowed, by a proxy between a node and its coordinator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.harness import Swarm
from tests.chaos.proxy import MBIT_BYTES_PER_S, Proxy

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three nodes with payloads of 133 kB; every test leaves them training."""
    settings = {"strategy.compressor.name": "dense"}
    with Swarm(tmp_path_factory.mktemp("cut"), 3, settings=settings, proxied=True, work_s=0.1) as swarm:
        yield swarm


def all_is_well_again(swarm: Swarm) -> None:
    swarm.wait_counted(swarm.nodes, 40)
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []
    for program in (swarm.coordinator, *swarm.nodes):
        assert "Traceback" not in program.text(), program.name


def proxy_of(swarm: Swarm, number: int) -> Proxy:
    proxy = swarm.nodes[number].proxy
    assert proxy is not None
    return proxy


def test_everything_goes_through_the_proxies(swarm: Swarm) -> None:
    """Or the faults of the other tests would be none."""
    before = [proxy_of(swarm, i).sent_bytes for i in range(3)]
    swarm.wait_rounds(10)
    assert all(proxy_of(swarm, i).sent_bytes > before[i] + 10_000 for i in range(3))


def test_a_reset_connection_comes_back(swarm: Swarm) -> None:
    proxy = proxy_of(swarm, 0)
    accepted, before = proxy.accepted, proxy.sent_bytes
    proxy.reset()
    swarm.wait_text(swarm.nodes[0], "connected again after")
    all_is_well_again(swarm)
    assert proxy.accepted > accepted
    assert proxy.sent_bytes > before, "it came back through the proxy"


def test_cut_in_the_middle_of_a_payload(swarm: Swarm) -> None:
    proxy = proxy_of(swarm, 1)
    for n_bytes in (40_000, 90_000):
        resets = proxy.resets
        proxy.cut_after(n_bytes)
        swarm.wait(lambda: proxy.resets > resets, 20, "a payload is cut")  # noqa: B023 - called in this turn
        swarm.wait_counted([swarm.nodes[1]])
    all_is_well_again(swarm)


def test_a_black_hole_holds_up_nobody_else(swarm: Swarm) -> None:
    node, others = swarm.nodes[2], swarm.nodes[:2]
    proxy = proxy_of(swarm, 2)
    proxy.black_hole()
    passed = (proxy.sent_bytes, proxy.received_bytes)
    swarm.wait_counted(others, 10)
    swarm.wait_rounds(10, 20)
    swarm.wait_text(node, "the coordinator does not answer", 20)
    assert node.is_running
    assert (proxy.sent_bytes, proxy.received_bytes) == passed
    proxy.restore()
    all_is_well_again(swarm)


def test_a_slow_line_holds_up_nobody_for_long(swarm: Swarm) -> None:
    proxy = proxy_of(swarm, 0)
    proxy.slow(delay_s=0.3)
    swarm.wait_rounds(5, 20)
    proxy.slow(rate_bytes_per_s=MBIT_BYTES_PER_S)  # one payload of 133 kB takes a second
    swarm.wait_rounds(10, 30)
    assert swarm.nodes[0].is_running
    proxy.restore()
    all_is_well_again(swarm)
