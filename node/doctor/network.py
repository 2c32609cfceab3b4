"""Who can reach this machine, and whether it can reach a run's coordinator.

libp2p is started as a node starts it, under a throwaway key; with a ticket, the coordinator is asked for the
run's status, which costs it nothing and admits nobody.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.protocol.addresses import announced, knock, knock_everywhere, listen_address
from ...coordinator.protocol.figures import short
from ...coordinator.protocol.identity import new_key
from ...coordinator.protocol.messages import PROTOCOL_VERSION, BadMessage, PeerId
from ...coordinator.protocol.p2p import P2PTransport, start_p2p
from ...coordinator.protocol.streams import STATUS, Meter, Stream
from ...coordinator.protocol.ticket import Ticket
from ...optim.registry import strategy_class
from ..cli.status import ask, leads, role_in_words
from ..links.known_seats import KnownSeats
from ..units import human_bytes
from .findings import Finding, Stopped, failed, ok, skipped, warning
from .machine import available_bytes

KNOCK_S = 4.0
SKEW_S = 2.0

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
    """Each that the ticket names is asked for itself."""
    seats = KnownSeats(ticket)
    several = len(seats) > 1
    answers = await asyncio.gather(*(_seat(host, ticket, seats, seat) for seat in seats.in_order()))
    there = [answer for answer in answers if answer.asked]
    is_majority = 2 * len(there) > len(answers)
    for answer in answers:
        finding = answer.finding
        if several and is_majority and finding.status == "failed":
            finding = replace(finding, status="warning")
        found.append(replace(finding, name=f"coordinator {short(answer.seat)}") if several else finding)
    if several:
        found.append(_majority(len(there), len(answers)))
    if there:
        best = max(there, key=lambda answer: (leads(answer.status), "run" in answer.status))
        found.append(_clock(min(best.asked, key=lambda each: each.round_trip_s)))
        if "run" in best.status:
            found.append(_run(ticket, best.status))


def _majority(n_there: int, n: int) -> Finding:
    detail = f"{n_there} of {n} coordinators reachable from here"
    if 2 * n_there > n:
        return ok("coordinators", detail, reachable=n_there, seats=n)
    remedy = "rounds go on once a majority of them is: start those that are down, or open their ports"
    return failed("coordinators", detail, remedy, reachable=n_there, seats=n)


@dataclass(frozen=True, slots=True)
class _Answer:
    """Of one coordinator. `asked`: empty, it did not answer."""

    seat: PeerId
    finding: Finding
    status: dict[str, Any]
    asked: Sequence[Asked]


async def _seat(host: P2PTransport, ticket: Ticket, seats: KnownSeats, seat: PeerId) -> _Answer:
    addresses = seats.addresses(seat)
    silent = await knock_everywhere(addresses, KNOCK_S)
    tried = {"tried": {address: silent.get(address) for address in addresses}}

    def no(detail: str, remedy: str) -> _Answer:
        return _Answer(seat, failed("coordinator", detail, remedy, **tried), {}, ())

    if len(silent) == len(addresses):
        listing = "; ".join(f"{address}: {why}" for address, why in silent.items())
        return no(
            f"no address answers: {listing}",
            "is it running, and its port open (TCP)? From another network it needs --announce; after a move, "
            "a new ticket",
        )
    try:
        status, asked = await _asked(host, ticket, seat, addresses)
    except ConfigError as e:  # the token
        return no(str(e), "ask who runs it for a new ticket")
    except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
        text = str(e) or f"no answer within {KNOCK_S:g} s"
        return no(text, "an old ticket, another program on that port, or a clock that is hours off?")
    best = min(asked, key=lambda each: each.round_trip_s)
    answering = [a for a in addresses if a not in silent]
    detail = f"answers at {', '.join(answering)} in {best.round_trip_s * 1000:.1f} ms"
    if silent:
        detail += f" (not at {'; '.join(f'{a}: {why}' for a, why in silent.items())})"
    figures = {**tried, "round_trip_s": round(best.round_trip_s, 6)}
    if len(seats) > 1:
        said = status.get("seat") or {"role": "leads", "head": status.get("round"), "lag": 0}
        detail += f"; {role_in_words(said)}"
        figures |= {name: said.get(name) for name in ("role", "head", "lag", "leader", "waits_for")}
    return _Answer(seat, ok("coordinator", detail, **figures), status, asked)


@dataclass(frozen=True, slots=True)
class Asked:
    """`skew_s`: how far this clock is ahead of the coordinator's, give or take half a round trip."""

    round_trip_s: float
    skew_s: float | None


async def _asked(
    host: P2PTransport, ticket: Ticket, seat: PeerId, addresses: Sequence[str]
) -> tuple[dict[str, Any], Sequence[Asked]]:
    """The status, and how asking went each time. Raises what the network raises, and ConfigError."""
    await host.dial(seat, addresses, KNOCK_S)
    reader, writer = await host.open_stream(seat, STATUS, KNOCK_S)
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
    options = status.get("strategy") or {"name": "spsa"}  # of an older coordinator: the one that takes least
    try:
        facts = strategy_class(options.get("name")).facts
    except ConfigError as e:
        return failed("run", str(e), "install the version of thinwire that the coordinator has")
    n_params = int(status["n_params"])
    least_bytes = round(facts.bytes_per_parameter(options) * n_params)
    return _room(status, least_bytes, least_bytes - round(facts.idle_bytes * n_params))


def _room(status: dict[str, Any], least_bytes: int, spared_bytes: int) -> Finding:
    """Whether the run's model fits in here. `spared_bytes`: what is enough with --offload-idle."""
    n_params, free_bytes = int(status["n_params"]), available_bytes()
    figures = {
        "n_params": n_params,
        "least_bytes": least_bytes,
        "least_bytes_offload_idle": spared_bytes,
        "round": status["round"],
    }
    spared = f" ({human_bytes(spared_bytes)} with join --offload-idle)" if spared_bytes < least_bytes else ""
    detail = (
        f"{status['run']}, round {status['round']} of {status['rounds']} ({status['state']}); {n_params:,} "
        f"parameters: from {human_bytes(least_bytes)} of memory on{spared}, without activations"
    )
    if status["state"] == "finished":
        return warning("run", detail, "it is over: `thinwire ledger TICKET -o FILE` saves it", **figures)
    if least_bytes <= free_bytes:
        return ok("run", detail, **figures)
    detail += f"; {human_bytes(free_bytes)} are available"
    if spared_bytes <= free_bytes:
        return warning("run", detail, "thinwire join TICKET --offload-idle", **figures)
    return failed("run", detail, "join from a machine with more memory", **figures)
