"""Who can reach this machine, and whether it can reach a run's coordinator.

libp2p is started as a node starts it, under a throwaway key; with a ticket, the coordinator is asked for the
run's status, which costs it nothing and admits nobody.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.protocol.addresses import announced, knock, knock_everywhere, listen_address
from ...coordinator.protocol.identity import new_key
from ...coordinator.protocol.messages import PROTOCOL_VERSION, BadMessage
from ...coordinator.protocol.p2p import P2PTransport, start_p2p
from ...coordinator.protocol.streams import STATUS, Meter, Stream
from ...coordinator.protocol.ticket import Ticket
from ..cli.status import ask
from ..units import human_bytes
from .findings import Finding, Stopped, failed, ok, skipped, warning
from .machine import available_bytes

KNOCK_S = 4.0
SKEW_S = 2.0
BYTES_PER_PARAM = 16
"""A node at the least: parameters, gradients, momentum and one copy, in float32."""

_ASKED = 4
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """How this machine would listen, and which run it would join. Raises ConfigError for a bad address."""

    host: str
    port: int
    announce: tuple[str, ...]
    ticket: Ticket | None

    def __post_init__(self) -> None:
        listen_address(self.host, self.port)
        for text in self.announce:
            announced(text, self.port or 1)


def check_network(plan: NetworkPlan, stopped: Stopped) -> Iterator[Finding]:
    """Leaves neither a process nor an open port behind, also when `stopped` meanwhile."""
    found: list[Finding] = []
    try:
        asyncio.run(_unless(stopped, _network(plan, found)))
    except Exception:
        yield from found
        raise
    yield from found


async def _unless(stopped: Stopped, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    while not task.done() and not stopped():
        await asyncio.wait({task}, timeout=_POLL_S)
    task.cancel()  # once: it clears up behind itself, and waits for that
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


async def _network(plan: NetworkPlan, found: list[Finding]) -> None:
    host = await _listen(plan, found)
    try:
        if plan.ticket is None:
            found.append(skipped("coordinator", "not tried: give a ticket (thinwire doctor TICKET)"))
            found.append(skipped("clock", "not compared: give a ticket"))
        elif host is not None:
            await _coordinator(host, plan.ticket, found)
    finally:
        if host is not None:
            await host.close()


async def _listen(plan: NetworkPlan, found: list[Finding]) -> P2PTransport | None:
    """As a node does it; where that fails, on loopback, so that the coordinator can be tried all the same."""
    begun_s = time.perf_counter()
    try:
        host = await start_p2p(new_key(), host=plan.host, port=plan.port, announce=plan.announce)
    except ConfigError as e:
        return await _listen_on_loopback(str(e), found)
    took_s = time.perf_counter() - begun_s
    detail = f"listens on {plan.host} port {host.port}{'' if plan.port else ', a free one'} ({took_s:.1f} s)"
    found.append(ok("libp2p", detail, port=host.port, start_s=round(took_s, 3)))
    found.append(await _reachable(plan, host))
    return host


async def _listen_on_loopback(why: str, found: list[Finding]) -> P2PTransport | None:
    try:
        host = await start_p2p(new_key())
    except ConfigError as e:
        remedy = (
            "no thinwire command works without it: pip install --force-reinstall hivemind, on Linux or macOS"
        )
        found.append(failed("libp2p", f"its daemon p2pd does not start: {e}", remedy))
        return None
    found.append(failed("libp2p", f"cannot listen as asked: {why}", "choose another --port or --host"))
    return host


async def _reachable(plan: NetworkPlan, host: P2PTransport) -> Finding:
    """What can be said from inside: nobody here can dial this machine from the internet."""
    figures = {"addresses": list(host.addresses)}
    if plan.announce:
        tried = [announced(text, host.port) for text in plan.announce]
        answers = await asyncio.gather(*(knock(address, KNOCK_S) for address in tried))
        silent = [f"{a}: {why}" for a, why in zip(tried, answers, strict=True) if why is not None]
        if silent:
            return warning(
                "addresses",
                f"announced, but from here does not answer: {'; '.join(silent)}",
                f"forward it to port {host.port} of this machine; many routers answer from outside only: "
                "have somebody try `nc -vz HOST PORT` there while a node runs",
                **figures,
            )
        return ok("addresses", f"what is announced answers: {', '.join(tried)}", **figures)
    ips = [ipaddress.ip_address(a.split("/")[2]) for a in host.addresses]
    public = [str(ip) for ip in ips if ip.is_global]
    if public:
        return ok("addresses", f"{', '.join(public)}: public, if no firewall closes the port", **figures)
    listing = ", ".join(str(ip) for ip in ips if not ip.is_loopback)
    return warning(
        "addresses",
        f"{listing}: private, others dial it from the same network only" if listing else "loopback only",
        "to join and train this is enough (the node dials out). For others to fetch payloads and snapshots "
        "from here, or for a coordinator: forward a TCP port, then --port PORT --announce PUBLIC.IP:PORT",
        **figures,
    )


# ------------------------------------------------------------------------------------------- the coordinator


async def _coordinator(host: P2PTransport, ticket: Ticket, found: list[Finding]) -> None:
    silent = await knock_everywhere(ticket.addresses, KNOCK_S)
    tried = {"tried": {address: silent.get(address) for address in ticket.addresses}}
    if len(silent) == len(ticket.addresses):
        listing = "; ".join(f"{address}: {why}" for address, why in silent.items())
        remedy = (
            "is it running, and its port open (TCP)? From another network it needs --announce; after a move, "
            "a new ticket"
        )
        found.append(failed("coordinator", f"no address answers: {listing}", remedy, **tried))
        return
    try:
        status, asked = await _asked(host, ticket)
    except ConfigError as e:  # the token
        found.append(failed("coordinator", str(e), "ask who runs it for a new ticket", **tried))
        return
    except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
        text = str(e) or f"no answer within {KNOCK_S:g} s"
        remedy = "an old ticket, another program on that port, or a clock that is hours off?"
        found.append(failed("coordinator", text, remedy, **tried))
        return
    best = min(asked, key=lambda each: each.round_trip_s)
    answering = [a for a in ticket.addresses if a not in silent]
    detail = f"answers at {', '.join(answering)} in {best.round_trip_s * 1000:.1f} ms"
    if silent:
        detail += f" (not at {'; '.join(f'{a}: {why}' for a, why in silent.items())})"
    figures = {**tried, "round_trip_s": round(best.round_trip_s, 6)}
    found += [ok("coordinator", detail, **figures), _clock(best)]
    found.append(_run(ticket, status))


@dataclass(frozen=True, slots=True)
class Asked:
    """`skew_s`: how far this clock is ahead of the coordinator's, give or take half a round trip."""

    round_trip_s: float
    skew_s: float | None


async def _asked(host: P2PTransport, ticket: Ticket) -> tuple[dict[str, Any], Sequence[Asked]]:
    """The status, and how asking went each time. Raises what the network raises, and ConfigError."""
    await host.dial(ticket.peer_id, ticket.addresses, KNOCK_S)
    reader, writer = await host.open_stream(ticket.peer_id, STATUS, KNOCK_S)
    stream, asked = Stream(reader, writer, Meter()), []
    status: dict[str, Any] = {}
    try:
        for _ in range(_ASKED):
            begun_s, begun = time.time(), time.perf_counter()
            async with asyncio.timeout(KNOCK_S):
                status = await ask(stream, ticket.token)
            took_s = time.perf_counter() - begun
            there_ms = status.get("time_ms")
            skew_s = begun_s + took_s / 2 - there_ms / 1000 if isinstance(there_ms, int) else None
            asked.append(Asked(took_s, skew_s))
    finally:
        stream.abort()
    return status, asked


def _clock(asked: Asked) -> Finding:
    if asked.skew_s is None:
        return skipped("clock", "not compared: this coordinator does not tell its time")
    unsure_s = asked.round_trip_s / 2
    size = f"{abs(asked.skew_s):.3f} s" if abs(asked.skew_s) < 60 else f"{abs(asked.skew_s) / 60:.0f} min"
    way = "ahead of" if asked.skew_s > 0 else "behind"
    detail = f"{size} {way} the coordinator's (+- {unsure_s:.3f} s)"
    figures = {"skew_s": round(asked.skew_s, 4), "uncertainty_s": round(unsure_s, 4)}
    if abs(asked.skew_s) - unsure_s > SKEW_S:
        remedy = (
            "rounds do not depend on it, but logs and metrics will not fit together, and hours make "
            "TLS fail: switch on NTP (timedatectl set-ntp true) on the machine that is wrong"
        )
        return warning("clock", detail, remedy, **figures)
    return ok("clock", detail, **figures)


def _run(ticket: Ticket, status: dict[str, Any]) -> Finding:
    """Whether this machine could take part in it."""
    there = status.get("protocol", PROTOCOL_VERSION)
    if there != PROTOCOL_VERSION:
        remedy = "install the version of thinwire that the coordinator has"
        return failed("run", f"protocol version {there} there, {PROTOCOL_VERSION} here", remedy)
    if status["run_id"] != ticket.run_id.hex():
        return failed("run", "the coordinator serves another run now", "ask for a new ticket")
    n_params, free_bytes = int(status["n_params"]), available_bytes()
    needed_bytes = BYTES_PER_PARAM * n_params
    figures = {"n_params": n_params, "least_bytes": needed_bytes, "round": status["round"]}
    detail = (
        f"{status['run']}, round {status['round']} of {status['rounds']} ({status['state']}); {n_params:,} "
        f"parameters: from {human_bytes(needed_bytes)} of memory on, without activations"
    )
    if status["state"] == "finished":
        return warning("run", detail, "it is over: `thinwire ledger TICKET -o FILE` saves it", **figures)
    if needed_bytes > free_bytes:
        remedy = "join from a machine with more memory"
        return failed("run", f"{detail}; {human_bytes(free_bytes)} are available", remedy, **figures)
    return ok("run", detail, **figures)
