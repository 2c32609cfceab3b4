"""What a person sees of a swarm in a terminal: one table from the coordinator's status."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...compression.errors import SwarmUnreachable
from ...coordinator.control.owner import status_within
from ...coordinator.protocol.figures import counted, figures_in_words, held_against, human_seconds
from ..gossip.words import gossip_in_words
from ..states.opening import open_state
from ..system.output import UNBOUNDED, make_console, shown, to_stdout
from ..units import bytes_beside_ddp, human_bytes, human_loss
from .offline import state_folder, status_of, telling_what_is_here
from .seats_view import headline_of, seats_shown
from .status import StatusClient, leads, seat_in_words

WATCH_EVERY_S = 1.0
LINE_S = 3.0
SAME_LINE_S = 15.0
"""Between two lines where there is no terminal, and where the second says the same."""

ENDS = ("finished", "stopped")
"""States of a run after which nothing more comes."""

CHANGES_SHOWN = 4
TOLD_OF_PEERS = 8
FAR = 4.0
"""A peer whose payloads are so many medians long is far from the others."""

COLUMNS = (
    "peer", "state", "round", "loss", "size", "audits", "refused", "counted", "missed", "sent", "fingerprint"
)  # fmt: skip
LEAST_FIRST = ("missed", "sent", "counted", "fingerprint", "refused", "audits")
"""Columns that a narrow terminal does without."""

ON_DEMAND = ("size", "audits", "refused")
"""Columns that are there once there is something to say of a peer."""

Show = Callable[[Mapping[str, Any], bool], None]
"""Shows a status; True: it is the last one."""


def headline(status: Mapping[str, Any]) -> str:
    """One line: round, losses, bytes against data-parallel training."""
    state = status["state"]
    if waits_for := status.get("waits_for"):
        state = f"waiting for {counted(waits_for, 'more peer')}"
    parts = [f"{status['run']}: round {status['round']}/{status['rounds']} ({state})"]
    if "loss" not in status:  # a coordinator that has not got what the run needs
        return " · ".join(parts)
    if (leads := headline_of(status)) is not None:
        parts.append(leads)
    if status["loss"] is not None:
        parts.append(f"loss {status['loss']:.3f}")
    if status["held_out"]:
        unit, size = status.get("loss_unit", "nats"), status.get("bytes_per_token")
        parts.append(f"held-out {human_loss(status['held_out'][-1][1], unit, size)}")
    if status["round_s"] is not None:
        parts.append(f"{status['round_s']:.2f} s/round")
    if status.get("left_s") is not None:  # a coordinator of an earlier build does not say it
        parts.append(f"about {human_seconds(status['left_s'])} left")
    payload, ddp = status["payload_bytes_per_peer_round"], status["ddp_bytes_per_peer_round"]
    if payload and ddp:
        sent = status.get("sent_bytes_per_peer_round")
        parts.append(f"per peer and round: {bytes_beside_ddp(payload, sent, ddp)}")
    return " · ".join(parts)


def swarm_table(status: Mapping[str, Any], notes: Sequence[str] = ()) -> Group:
    """`notes`: lines below the table (what the demo did to somebody). A seat that does not lead may know no
    more than who does."""
    seats, whose = seats_shown(status), seat_in_words(status)
    if whose is not None and "mismatches" not in status:
        said = [Text(shown(whose), style="yellow"), *(Text(note, style="yellow") for note in notes)]
        return Group(*seats, *said)
    rows = _PeerTable(status) if status["peers"] else Text("no peer has come yet: thinwire join TICKET")
    lines: list[RenderableType] = [Text(shown(headline(status))), *seats, rows]
    lines += [Text(shown(f"changed: {text}")) for text in status.get("changes", [])[-CHANGES_SHOWN:]]
    if noise := status.get("noise_scale", {}).get("text"):
        lines.append(Text(shown(noise)))
    lines += [Text(shown(line)) for line in (*gossip_in_words(status), *evaluations_in_words(status))]
    lines += [Text(shown(line), style="bold red") for line in trust_in_words(status)]
    lines += [Text(shown(note), style="yellow") for note in (whose, *notes) if note is not None]
    for error in status.get("errors", [])[-3:]:
        lines.append(Text(shown(f"stopped with an error: {error}"), style="bold red"))
    if status["mismatches"]:
        lines.append(Text(f"{status['mismatches']} fingerprint mismatches", style="bold red"))
    return Group(*lines)


class _PeerTable:
    """A row for each peer. Where the terminal is narrow, it does without the columns that matter least."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        is_asked = "folder" not in status
        self._rows = [_cells(peer, is_live=is_asked and leads(status)) for peer in status["peers"]]
        if status["state"] == "finished":  # who is gone then has done all
            for row in self._rows:
                row["state"].style = ""
        if is_asked and not leads(status):
            self._rows = [{**row, "state": Text("-")} for row in self._rows]
        told = {column for column in ON_DEMAND if any(row[column].plain != "-" for row in self._rows)}
        self._columns = [column for column in COLUMNS if column in told or column not in ON_DEMAND]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for n_left_out in range(len(LEAST_FIRST) + 1):
            table = self._without(LEAST_FIRST[:n_left_out])
            width = console.measure(table, options=options.update(max_width=UNBOUNDED)).maximum
            if width <= options.max_width:
                break
        yield table

    def _without(self, left_out: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False)
        columns = [column for column in self._columns if column not in left_out]
        for column in columns:
            is_left = column in ("peer", "state", "fingerprint")
            table.add_column(column, justify="left" if is_left else "right")
        for row in self._rows:
            table.add_row(*(row[column] for column in columns))
        return table


def _cells(peer: Mapping[str, Any], *, is_live: bool) -> dict[str, Text]:
    """Column -> what stands there. A ledger does not know what was sent, and who was late."""
    style = {"training": "green", "joining": "yellow"}.get(peer["state"], "red")
    fingerprint = f"{peer['fingerprint']} @{peer['fingerprint_round']}" if peer["fingerprint"] else "-"
    return {
        "peer": Text(f"{peer['index']} …{peer['peer_id'][-6:]}"),
        "state": Text(peer["state"], style=style),
        "round": Text(str(max(peer["round"], peer["fingerprint_round"] or 0))),
        **_trust_cells(peer, is_live=is_live),
        "loss": Text("-" if peer["loss"] is None else f"{peer['loss']:.3f}"),
        "counted": Text(str(peer["offers_counted"])),
        "missed": Text(str(peer["offers_missed"]) if is_live else "-"),
        "sent": Text(human_bytes(peer["sent_bytes"]) if is_live else "-"),
        "fingerprint": Text(fingerprint),
    }


def _trust_cells(peer: Mapping[str, Any], *, is_live: bool) -> dict[str, Text]:
    """What is found of a peer's honesty; a coordinator of an earlier build does not say it. `size`: of its
    payloads in medians, and the share of them that was scaled down; `audits`: passed and failed."""
    size, clipped, until = peer.get("size"), peer.get("clipped"), peer.get("condemned_until")
    passed, failed = peer.get("audits_passed", 0), peer.get("audits_failed", 0)
    words = "-" if size is None else f"{size:.1f}x" + (f" ({clipped:.0%} clipped)" if clipped else "")
    n_refused = sum(held_against(peer.get("rejected", {})).values())
    audits = f"{passed}+{failed}" + (f" (weight 0 to {until})" if until else "")
    return {
        "size": Text(words, style="bold red" if size is not None and size >= FAR else ""),
        "audits": Text(audits if passed or failed else "-", style="bold red" if until else ""),
        "refused": Text(str(n_refused) if is_live and n_refused else "-"),
    }


def trust_in_words(status: Mapping[str, Any]) -> list[str]:
    """Whom people should look at, and why."""
    lines = []
    for peer in status["peers"]:
        who = f"{peer['index']} …{peer['peer_id'][-6:]}"
        size, until = peer.get("size"), peer.get("condemned_until")
        if until:
            lines.append(f"peer {who} weighs nothing until round {until}: its audits failed")
        elif size is not None and size >= FAR and peer["state"] != "gone":
            lines.append(f"peer {who} is far from the others: its payloads are {size:.1f} times the median")
        empty = peer.get("offers_empty", 0)
        if empty and 2 * empty > empty + peer["offers_counted"]:
            lines.append(f"peer {who} dropped every batch of {empty} of its offers: look at its data")
    return lines[:TOLD_OF_PEERS]


def evaluations_in_words(status: Mapping[str, Any]) -> list[str]:
    """The newest evaluation of the weights, and the last one that failed."""
    lines = []
    if newest := status.get("evaluations"):
        round_, found = newest[-1]
        lines.append(f"evaluation after round {round_}: {figures_in_words(found)}")
    if failed := status.get("last_failed_evaluation"):
        n_failed = counted(status["failed_evaluations"], "evaluation")
        lines.append(f"{n_failed} failed, the last after round {failed[0]}: {failed[1]}")
    return lines


def figures(
    end: Mapping[str, Any],
    strategy: str,
    ranks: Sequence[int],
    faults: Sequence[Mapping[str, Any]],
    late: Sequence[str] = (),
) -> dict[str, Any]:
    """What commands that run a whole swarm print as JSON, from its last status. `late`: peers that were not
    back when it ended."""
    peers = end["peers"]
    offers = sum(p["offers_counted"] + p["offers_missed"] for p in peers)
    held_out = end["held_out"] or [[0, None]]
    return {
        "strategy": strategy,
        "peers": len(ranks),
        "ranks": list(ranks),
        "rounds": end["round"],
        "held_out_first": held_out[0][1],
        "held_out_last": held_out[-1][1],
        "loss_unit": end.get("loss_unit", "nats"),
        "bytes_per_token": end.get("bytes_per_token"),
        "fingerprints": {
            p["peer_id"]: p["fingerprint"] if p["fingerprint_round"] == end["round"] else None
            for p in peers
            if p["peer_id"] not in late
        },
        "payload_bytes_per_peer_round": end["payload_bytes_per_peer_round"],
        "sent_bytes_per_peer_round": round(sum(p["sent_bytes"] for p in peers) / max(1, offers), 1),
        "ddp_bytes_per_peer_round": end["ddp_bytes_per_peer_round"],
        "faults": list(faults),
        **({"gossip": end["gossip"]} if end.get("gossip") else {}),
    }


def agreement(fingerprints: Mapping[str, str | None]) -> str:
    """For people, in the console's markup: whether all peers ended with the same replica."""
    found = set(fingerprints.values())
    if len(found) == 1 and None not in found:
        return f"Replicas identical to the last bit: fingerprint {found.pop()} on all peers."
    return f"[bold red]Replicas differ:[/] {fingerprints}"


@contextmanager
def live_view(console: Console, notes: Sequence[str]) -> Iterator[Show]:
    """A table that is redrawn on a terminal; elsewhere a line now and then, and each of the notes once."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda status, _last: live.update(swarm_table(status, notes))
        return
    printed_s, before, n_noted = 0.0, "", 0

    def print_line(status: Mapping[str, Any], last: bool) -> None:
        nonlocal printed_s, before, n_noted
        line, now_s = shown(headline(status)), time.monotonic()
        new, n_noted = list(notes[n_noted:]), len(notes)
        if last or now_s - printed_s >= (SAME_LINE_S if line == before else LINE_S):
            printed_s, before = now_s, line
            new.append(line)
        for text in new:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

    yield print_line


def show_status(ticket: str, *, as_json: bool, watch: bool, stopped: Callable[[], bool]) -> None:
    """Prints the status on stdout, with `watch` until the run is over or `stopped`. `ticket`: or a state
    folder: the coordinator that runs there says how it stands, else the ledger.

    Raises ConfigError for a wrong ticket and SwarmUnreachable.
    """
    if (folder := state_folder(ticket)) is not None:
        _show(lambda: _status_in(folder), as_json=as_json, watch=watch, stopped=stopped)
        return
    with StatusClient(ticket) as client:
        with telling_what_is_here(ticket):
            first = [client.fetch()]
        fetch = client.fetch
        _show(lambda: first.pop() if first else fetch(), as_json=as_json, watch=watch, stopped=stopped)


def _show(
    fetch: Callable[[], dict[str, Any]], *, as_json: bool, watch: bool, stopped: Callable[[], bool]
) -> None:
    console, status = make_console(), fetch()
    if as_json:
        while True:
            to_stdout(json.dumps(status))
            if not watch or stopped() or status.get("state") in ENDS:
                return
            time.sleep(WATCH_EVERY_S)
            status = fetch()
    if not watch:
        console.print(swarm_table(status, _where(status)))
        return
    with Live(swarm_table(status, _where(status)), console=console) as live:
        while not stopped() and status.get("state") not in ENDS:
            time.sleep(WATCH_EVERY_S)
            try:
                status = fetch()
                live.update(swarm_table(status, _where(status)))
            except SwarmUnreachable:
                note = "no coordinator answers; trying again (Ctrl-C to stop)"
                live.update(swarm_table(status, [note]))


def _status_in(folder: Path) -> dict[str, Any]:
    """What the coordinator says that runs there, else what the ledger says. Raises ConfigError and
    LedgerCorrupt."""
    asked, why = None, None
    try:
        asked = status_within(folder)
    except SwarmUnreachable as e:
        why = str(e)
    if asked is not None:
        return asked
    with open_state(folder) as state:
        return {**status_of(state), "unanswered": why}


def _where(status: Mapping[str, Any]) -> list[str]:
    """What people should know of a status that a folder's ledger has given."""
    if "folder" not in status:
        return []
    why = status["unanswered"] or "nobody was asked"
    notes = [f"read from {status['folder']}, a {status['kind']}'s state folder: {why}"]
    if status["state"] == "running" and status["unanswered"] is None:
        notes.append(f"its {status['kind']} runs; who else is there, and what is new: thinwire status TICKET")
    return notes
