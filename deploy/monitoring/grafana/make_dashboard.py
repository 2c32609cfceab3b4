"""Writes dashboards/thinwire.json: `python deploy/monitoring/grafana/make_dashboard.py` (`-`: to stdout).

A dashboard is 2000 lines of JSON, most of them the same for every panel; here is what differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent / "dashboards/thinwire.json"

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
RATE = "[$__rate_interval]"
NODES = 'job="thinwire", instance=~"$node"'
GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "text"


def by_peer(expr: str) -> str:
    """With the label `peer`: the end of the peer id, as nobody reads all of it."""
    return f'label_replace({expr}, "peer", "$1", "instance", ".*(.{{6}})")'


def share(top: str, bottom: str) -> str:
    return f"{top} / ({bottom} > 0)"


def steps(*bounds: tuple[float | None, str]) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in bounds]}


def named(pattern: str, **properties: Any) -> Json:
    """What the series whose legend is like this have of their own."""
    return {
        "matcher": {"id": "byRegexp", "options": pattern},
        "properties": [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()],
    }


def color(name: str) -> Json:
    return {"mode": "fixed", "fixedColor": name}


def panel(
    kind: str,
    title: str,
    says: str,
    *queries: tuple[str, str],
    unit: str = "short",
    wide: int = 8,
    high: int = 8,
    decimals: int | None = None,
    thresholds: Json | None = None,
    custom: Json | None = None,
    options: Json | None = None,
    overrides: list[Json] | None = None,
    least: float | None = None,
    most: float | None = None,
    instant: bool = False,
) -> Json:
    """`queries`: expression and legend. `says`: behind the panel's (i)."""
    defaults: Json = {"unit": unit, "custom": custom or {}, "thresholds": thresholds or steps((None, GREEN))}
    for key, value in (("decimals", decimals), ("min", least), ("max", most)):
        if value is not None:
            defaults[key] = value
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": expr,
            "legendFormat": legend,
            "editorMode": "code",
            "range": not instant,
            "instant": instant,
        }
        for i, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": says,
        "datasource": DATASOURCE,
        "gridPos": {"w": wide, "h": high, "x": 0, "y": 0},
        "fieldConfig": {"defaults": defaults, "overrides": overrides or []},
        "options": options or {},
        "targets": targets,
    }


def number(title: str, says: str, expr: str, **rest: Any) -> Json:
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": rest.pop("color_mode", "value"),
        "graphMode": rest.pop("graph", "none"),
        "justifyMode": "center",
        "textMode": "value",
    }
    return panel("stat", title, says, (expr, ""), wide=3, high=4, options=options, **rest)


def lines(
    title: str,
    says: str,
    *queries: tuple[str, str],
    stacked: bool = False,
    bars: bool = False,
    log: bool = False,
    width: int = 2,
    limit: bool = False,
    **rest: Any,
) -> Json:
    """`limit`: thresholds are drawn as lines."""
    custom = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 1 if bars else width,
        "fillOpacity": 70 if bars else 35 if stacked else 8,
        "showPoints": "never",
        "spanNulls": True,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if limit else "off"},
    }
    many = any("{{peer}}" in legend for _, legend in queries)
    options = {
        "legend": {
            "displayMode": "table" if many else "list",
            "placement": "right" if many else "bottom",
            "calcs": ["lastNotNull"] if many else [],
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, says, *queries, custom=custom, options=options, **rest)


def row(title: str, *panels: Json) -> list[Json]:
    return [{"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {}}, *panels]


def the_run() -> list[Json]:
    age = steps((None, GREEN), (60, ORANGE), (300, RED))
    return row(
        "The run",
        number("Round", "Newest committed round.", "max(thinwire_swarm_round)", unit="none", graph="area"),
        number(
            "Done",
            "Part of the run's rounds that are committed.",
            "max(thinwire_swarm_round) / max(thinwire_swarm_last_round)",
            unit="percentunit",
            decimals=1,
        ),
        number(
            "Last commit",
            "How long ago. An alert fires after 5 minutes, or ten usual rounds if they are longer.",
            "min(swarm:thinwire_last_commit_age:seconds)",
            unit="s",
            decimals=0,
            thresholds=age,
        ),
        number(
            "Training peers",
            "Peers that take part in rounds now.",
            'sum(thinwire_swarm_peers{state="training"})',
            unit="none",
            thresholds=steps((None, RED), (1, ORANGE), (2, GREEN)),
            graph="area",
        ),
        number(
            "Held-out loss",
            "Newest measurement, in nats per byte, token or example.",
            "max(thinwire_swarm_held_out_loss)",
            decimals=3,
            thresholds=steps((None, BLUE)),
        ),
        number(
            "Bytes per peer and round",
            "Mean size of a payload over the whole run.",
            "max(swarm:thinwire_payload_bytes:per_offer)",
            unit="decbytes",
            decimals=1,
            thresholds=steps((None, BLUE)),
        ),
        number(
            "Less than data-parallel",
            "How many times more than payloads an all-reduce of float32 gradients would send per peer and "
            "round. Of all that peers send it is thinwire_swarm_all_sent_ratio.",
            "max(thinwire_swarm_compression_ratio)",
            unit="none",
            decimals=0,
            thresholds=steps((None, BLUE)),
        ),
        number(
            "Alerts",
            "Firing now; Prometheus' page Alerts says what to do next.",
            'count(ALERTS{alertstate="firing", severity!="info"}) or vector(0)',
            unit="none",
            thresholds=steps((None, GREEN), (1, RED)),
            color_mode="background",
        ),
    )


def learning() -> list[Json]:
    return row(
        "Learning",
        lines(
            "Loss",
            "training: mean over the offers of each commit. held out: measured by one peer in turn. "
            "In nats per byte, token or example.",
            ("max(thinwire_swarm_loss)", "training"),
            ("max(thinwire_swarm_held_out_loss)", "held out"),
            wide=16,
            high=10,
            decimals=3,
            overrides=[
                named("training", color=color(BLUE), custom__lineWidth=1),
                named(
                    "held out",
                    color=color(ORANGE),
                    custom__lineWidth=3,
                    custom__lineInterpolation="stepAfter",
                ),
            ],
        ),
        lines(
            "Loss by node",
            "Of each node's own last batch, on its own data: one that differs has other data, or is broken.",
            (by_peer(f"thinwire_loss{{{NODES}}}"), "{{peer}}"),
            high=10,
            decimals=3,
            width=1,
        ),
        lines(
            "Tokens",
            "All nodes together; only those of offers that counted have an effect.",
            (f"sum(rate(thinwire_tokens_total{{{NODES}}}{RATE}))", "tokens/s"),
            unit="none",
            least=0,
        ),
        lines(
            "Rounds",
            "Committed rounds per minute.",
            (f"60 * sum(rate(thinwire_swarm_commits_total{RATE}))", "rounds/min"),
            unit="none",
            least=0,
        ),
        lines(
            "Offers",
            "Offers that counted, and those that a round was closed without although they were awaited.",
            (f"60 * sum by (result) (rate(thinwire_swarm_offers_total{RATE}))", "{{result}}/min"),
            unit="none",
            stacked=True,
            overrides=[
                named("counted.*", color=color(GREEN)),
                named("missed.*", color=color(RED)),
            ],
        ),
    )


def traffic() -> list[Json]:
    offers = f'sum(rate(thinwire_swarm_offers_total{{result="counted"}}{RATE}))'
    kinds = [
        named("payload", color=color(BLUE)),
        named("snapshot", color=color("purple")),
        named("ledger", color=color(GREEN)),
        named("control", color=color(GREY)),
    ]
    return row(
        "Bytes",
        lines(
            "Bytes per peer and round",
            "Size of a payload, all that nodes send with it, and what an all-reduce of float32 gradients "
            "would send instead. Logarithmic.",
            (share(f"sum(rate(thinwire_swarm_payload_bytes_total{RATE}))", offers), "thinwire"),
            (share(f"sum(rate(thinwire_sent_bytes_total{{{NODES}}}{RATE}))", offers), "all sent"),
            ("max(swarm:thinwire_data_parallel_bytes:per_offer)", "data-parallel"),
            unit="decbytes",
            log=True,
            overrides=[
                named("thinwire", color=color(GREEN)),
                named("data-parallel", color=color(RED), custom__lineStyle={"fill": "dash", "dash": [8, 8]}),
            ],
        ),
        lines(
            "Sent, by kind",
            "All nodes together. payload: of offers; snapshot: to those who join; control: the rest.",
            (f"sum by (kind) (rate(thinwire_sent_bytes_total{{{NODES}}}{RATE}))", "{{kind}}"),
            unit="Bps",
            stacked=True,
            least=0,
            overrides=kinds,
        ),
        lines(
            "Received, by kind",
            "All nodes together.",
            (f"sum by (kind) (rate(thinwire_received_bytes_total{{{NODES}}}{RATE}))", "{{kind}}"),
            unit="Bps",
            stacked=True,
            least=0,
            overrides=kinds,
        ),
        lines(
            "Upload by node",
            "All that a node sends.",
            (by_peer(f"sum by (instance) (rate(thinwire_sent_bytes_total{{{NODES}}}{RATE}))"), "{{peer}}"),
            unit="Bps",
            least=0,
            wide=12,
            width=1,
        ),
        lines(
            "Use of the upload limit",
            "Of --max-upload, over the last 10 s; without one it is 0. Above 90% for long, an alert fires.",
            (by_peer(f"thinwire_upload_used_ratio{{{NODES}}}"), "{{peer}}"),
            unit="percentunit",
            least=0,
            most=1,
            wide=12,
            width=1,
            thresholds=steps((None, GREEN), (0.9, RED)),
            limit=True,
        ),
    )


def time() -> list[Json]:
    phase = "thinwire_phase_duration_seconds"
    means = share(
        f'sum by (phase) (rate({phase}_sum{{{NODES}, phase!="ahead"}}{RATE}))',
        f'sum by (phase) (rate({phase}_count{{{NODES}, phase!="ahead"}}{RATE}))',
    )
    bucket = f"sum by (le) (rate(thinwire_swarm_round_duration_seconds_bucket{RATE}))"
    return row(
        "Time",
        lines(
            "Round time by phase",
            "Mean over nodes. compute: local work; pack: making a payload of it; exchange: waiting for the "
            "commit and for payloads; apply: changing the replica.",
            (means, "{{phase}}"),
            unit="s",
            stacked=True,
            least=0,
            wide=12,
            overrides=[
                named("compute", color=color(GREEN)),
                named("pack", color=color("purple")),
                named("exchange", color=color(ORANGE)),
                named("apply", color=color(BLUE)),
            ],
        ),
        lines(
            "Phases",
            "Local work by node: in a swarm of unlike machines the slow ones stand out.",
            (
                by_peer(
                    share(
                        f'sum by (instance) (rate({phase}_sum{{{NODES}, phase="compute"}}{RATE}))',
                        f'sum by (instance) (rate({phase}_count{{{NODES}, phase="compute"}}{RATE}))',
                    )
                ),
                "{{peer}}",
            ),
            unit="s",
            least=0,
            wide=12,
            width=1,
        ),
        lines(
            "Round duration",
            "From the opening of a round to its commit, as the coordinator sees it.",
            (f"histogram_quantile(0.5, {bucket})", "median"),
            (f"histogram_quantile(0.95, {bucket})", "95%"),
            unit="s",
            least=0,
            wide=12,
        ),
        lines(
            "Why rounds close",
            "complete: everybody awaited was there; enough: as many as were worth it; deadline: time was up; "
            "hung: somebody was given up.",
            (f"60 * sum by (reason) (rate(thinwire_swarm_rounds_closed_total{RATE}))", "{{reason}}"),
            unit="none",
            stacked=True,
            bars=True,
            wide=12,
            overrides=[
                named("complete", color=color(GREEN)),
                named("enough", color=color(BLUE)),
                named("deadline", color=color(ORANGE)),
                named("hung", color=color(RED)),
            ],
        ),
    )


def table() -> Json:
    columns = [
        ("Up", f"sum by (instance) (up{{{NODES}}})"),
        ("Training", f"sum by (instance) (thinwire_training{{{NODES}}})"),
        ("Round", f"sum by (instance) (thinwire_round{{{NODES}}})"),
        ("Behind", f"sum by (instance) (thinwire_rounds_behind{{{NODES}}})"),
        ("Loss", f"sum by (instance) (thinwire_loss{{{NODES}}})"),
        ("Late", f"sum by (instance) (instance:thinwire_offers_missed:ratio30m{{{NODES}}})"),
        ("Memory", f"sum by (instance) (thinwire_device_memory_used_bytes{{{NODES}}})"),
        ("Busy", f"avg by (instance) (thinwire_device_utilization_ratio{{{NODES}}})"),
        ("Disk free", f"sum by (instance) (thinwire_disk_free_bytes{{{NODES}}})"),
    ]

    def column(name: str, **properties: Any) -> Json:
        return {**named(name, **properties), "matcher": {"id": "byName", "options": name}}

    yes_no = [
        {
            "type": "value",
            "options": {"0": {"text": "no", "color": RED}, "1": {"text": "yes", "color": GREEN}},
        }
    ]
    colored = {"type": "color-text"}
    made = panel(
        "table",
        "Nodes",
        "Late: part of its offers in the last 30 minutes that did not count. Memory: in use on its devices.",
        *((expr, "") for _, expr in columns),
        wide=24,
        high=9,
        instant=True,
        custom={"align": "auto", "cellOptions": {"type": "auto"}},
        options={"showHeader": True, "cellHeight": "sm", "sortBy": [{"displayName": "Behind", "desc": True}]},
        overrides=[
            column("Up", mappings=yes_no, custom__cellOptions=colored),
            column("Training", mappings=yes_no, custom__cellOptions=colored),
            column(
                "Behind",
                thresholds=steps((None, GREEN), (2, ORANGE), (20, RED)),
                custom__cellOptions=colored,
            ),
            column("Loss", decimals=3),
            column("Late", unit="percentunit", decimals=0),
            column("Memory", unit="decbytes"),
            column("Busy", unit="percentunit", decimals=0),
            column("Disk free", unit="decbytes"),
            column("Peer", custom__width=480),
        ],
    )
    for target in made["targets"]:
        target["format"] = "table"
    names = {
        f"Value #{target['refId']}": name for target, (name, _) in zip(made["targets"], columns, strict=True)
    }
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {"excludeByName": {"Time": True}, "renameByName": {"instance": "Peer", **names}},
        },
    ]
    return made


def peers() -> list[Json]:
    return row(
        "Peers",
        table(),
        lines(
            "Peers by state",
            "As the coordinator sees them; gone ones are kept in the list, as they may come back.",
            ("sum by (state) (thinwire_swarm_peers)", "{{state}}"),
            unit="none",
            stacked=True,
            least=0,
            overrides=[
                named("training", color=color(GREEN)),
                named("joining", color=color(BLUE)),
                named("gone", color=color(GREY)),
            ],
        ),
        lines(
            "Coming and going",
            "Sessions that were opened, and peers that went: said_so is a clean end.",
            (f"sum by (kind) (increase(thinwire_swarm_joins_total{RATE}))", "came: {{kind}}"),
            (f"-sum by (reason) (increase(thinwire_swarm_leaves_total{RATE}))", "went: {{reason}}"),
            unit="none",
            bars=True,
            stacked=True,
            overrides=[named("came.*", color=color(GREEN)), named("went: said_so", color=color(GREY))],
        ),
        lines(
            "Rounds behind",
            "Committed rounds that a replica has not applied: falls while a node catches up.",
            (by_peer(f"thinwire_rounds_behind{{{NODES}}}"), "{{peer}}"),
            unit="none",
            least=0,
            width=1,
        ),
    )


def coordinators() -> list[Json]:
    role = 'label_replace(thinwire_seat_role{state="leads"}, "coordinator", "$1", "instance", "(.*)")'
    seal = "thinwire_seat_seal_duration_seconds_bucket"
    return row(
        "Coordinators",
        lines(
            "Who leads",
            "1 for the coordinator that leads; nobody for longer than a minute is an alert.",
            (role, "{{coordinator}}"),
            unit="none",
            least=0,
            most=1,
            wide=6,
            high=7,
        ),
        lines(
            "Reachable",
            "Coordinators that the one that leads reaches, with itself; below the dashes no round closes.",
            ("max(thinwire_seat_reachable_seats)", "reachable"),
            ("max(thinwire_seat_committee_seats)", "all"),
            ("max(thinwire_seat_needed_seats)", "needed"),
            unit="none",
            least=0,
            wide=6,
            high=7,
            overrides=[
                named("needed", color=color(RED), custom__lineStyle={"fill": "dash", "dash": [8, 8]}),
            ],
        ),
        lines(
            "Behind",
            "Rounds, and payloads, that a coordinator lacks. More than 10 rounds for long are an alert.",
            ("thinwire_seat_lag_rounds", "{{instance}}"),
            ("thinwire_seat_missing_payloads", "{{instance}} payloads"),
            unit="none",
            least=0,
            wide=6,
            high=7,
        ),
        lines(
            "Seals and elections",
            "How long a record takes from its proposal until a majority has signed it; elections, and "
            "seconds without a leader, each minute.",
            (f"histogram_quantile(0.5, sum by (le) (rate({seal}{RATE})))", "seal, median"),
            (f"histogram_quantile(0.99, sum by (le) (rate({seal}{RATE})))", "seal, p99"),
            (f"60 * max(rate(thinwire_seat_elections_total{RATE}))", "elections/min"),
            (f"60 * max(rate(thinwire_seat_leaderless_seconds_total{RATE}))", "s without a leader/min"),
            unit="none",
            least=0,
            wide=6,
            high=7,
        ),
    )


def trust() -> list[Json]:
    every = f"{{{NODES}}}"
    empty, offers = (
        f'thinwire_peer_offers_total{{{NODES}, result=~"{results}"}}'
        for results in ("empty", "counted|empty")
    )
    return row(
        "Trust",
        lines(
            "Size of payloads",
            "Norm of each peer's recent payloads in medians of their rounds, as most nodes say. Above 4 for "
            "long, an alert fires.",
            (by_peer(f"thinwire_peer_size_ratio{every}"), "{{peer}}"),
            unit="none",
            least=0,
            width=1,
            thresholds=steps((None, GREEN), (4, RED)),
            limit=True,
        ),
        lines(
            "Scaled down",
            "Share of each peer's recent payloads that the bound scaled down.",
            (by_peer(f"thinwire_peer_clipped_ratio{every}"), "{{peer}}"),
            unit="percentunit",
            least=0,
            most=1,
            width=1,
        ),
        lines(
            "Farthest peer",
            "The largest of them, also of a peer that does not answer.",
            ("max(thinwire_swarm_farthest_peer_ratio)", "size"),
            unit="none",
            least=0,
        ),
        lines(
            "Audits",
            "Offers whose work others have done again, by what they found. condemned: peers that weigh "
            "nothing now.",
            (f"60 * sum by (result) (rate(thinwire_swarm_audits_total{RATE}))", "{{result}}/min"),
            ("max(thinwire_swarm_condemned_peers)", "condemned"),
            unit="none",
            least=0,
            overrides=[
                named("passed.*", color=color(GREEN)),
                named("failed.*", color=color(ORANGE)),
                named("condemned", color=color(RED)),
            ],
        ),
        lines(
            "Refused, by peer",
            "What of each peer the coordinator did not let in.",
            (by_peer(f"sum by (instance) (increase(thinwire_peer_rejected_total{every}{RATE}))"), "{{peer}}"),
            unit="none",
            bars=True,
            stacked=True,
            least=0,
        ),
        lines(
            "Empty offers, by peer",
            "Part of each peer's offers for which every batch was dropped; they change nothing.",
            (
                by_peer(share(*(f"sum by (instance) (rate({of}{RATE}))" for of in (empty, offers)))),
                "{{peer}}",
            ),
            unit="percentunit",
            least=0,
            most=1,
            width=1,
        ),
    )


def faults() -> list[Json]:
    def counted(title: str, says: str, *queries: tuple[str, str], wide: int = 8) -> Json:
        return lines(title, says, *queries, unit="none", bars=True, stacked=True, least=0, wide=wide, high=7)

    return row(
        "Faults",
        counted(
            "Not let in",
            "Frames, sessions, offers and reports that the coordinator refused. A late offer is usual; the "
            "others say that a program is broken, too old or ill meant.",
            (f"sum by (reason) (increase(thinwire_coordinator_rejected_total{RATE})) > 0", "{{reason}}"),
        ),
        counted(
            "Offers that did not count",
            "late: the round closed without it; bad_payload: it did not pass the check; given_up: the "
            "replica was moved to another round.",
            (
                f"sum by (reason) (increase(thinwire_offers_not_counted_total{{{NODES}}}{RATE})) > 0",
                "{{reason}}",
            ),
        ),
        counted(
            "Bad payloads",
            "Counted payloads that every replica left out, by what is wrong with them.",
            (f"max by (reason) (increase(thinwire_bad_payloads_total{{{NODES}}}{RATE})) > 0", "{{reason}}"),
        ),
        counted(
            "Replicas",
            "Fingerprints that differed, and who replayed the ledger for that: adopted was wrong before.",
            (f"sum(increase(thinwire_swarm_fingerprint_mismatches_total{RATE})) > 0", "mismatches"),
            (f"sum by (result) (increase(thinwire_heals_total{{{NODES}}}{RATE})) > 0", "replays: {{result}}"),
            (f"sum(increase(thinwire_fingerprint_checks_total{{{NODES}}}{RATE}))", "checks"),
        ),
        counted(
            "Thrown away",
            "Local work whose loss or gradient was not finite.",
            (f"sum by (kind) (increase(thinwire_not_finite_total{{{NODES}}}{RATE})) > 0", "{{kind}}"),
        ),
        counted(
            "Trackers",
            "Records that JSONL, TensorBoard or W&B could not take.",
            (f"sum by (kind) (increase(thinwire_tracker_failures_total{{{NODES}}}{RATE})) > 0", "{{kind}}"),
        ),
    )


def machines() -> list[Json]:
    used = f"thinwire_device_memory_used_bytes{{{NODES}}} / thinwire_device_memory_bytes{{{NODES}}}"
    return row(
        "Machines",
        lines(
            "Devices: busy",
            "A GPU's as its driver says, a CPU's over all cores.",
            (by_peer(f"thinwire_device_utilization_ratio{{{NODES}}}"), "{{peer}} {{device}}"),
            unit="percentunit",
            least=0,
            most=1,
            wide=12,
            width=1,
        ),
        lines(
            "Devices: memory in use",
            "Part of the device's memory. Above 95% for long, an alert fires.",
            (by_peer(used), "{{peer}} {{device}}"),
            unit="percentunit",
            least=0,
            most=1,
            wide=12,
            width=1,
            thresholds=steps((None, GREEN), (0.95, RED)),
            limit=True,
        ),
        lines(
            "Coordinator: payloads on disk",
            "Thrown away once two newer snapshots are attested. At the quota new ones are refused.",
            ("max(thinwire_coordinator_kept_payload_bytes)", "payloads"),
            ("max(thinwire_coordinator_blob_quota_bytes)", "quota"),
            unit="decbytes",
            least=0,
            overrides=[
                named("quota", color=color(RED), custom__lineStyle={"fill": "dash", "dash": [8, 8]}),
            ],
        ),
        lines(
            "Coordinator: ledger",
            "It grows by a commit a round and is never cut.",
            ("max(thinwire_coordinator_ledger_bytes)", "ledger"),
            unit="decbytes",
            least=0,
        ),
        lines(
            "Disk free",
            "Where the coordinator and the nodes keep their state. Below 1 GB an alert fires.",
            ("min(thinwire_coordinator_disk_free_bytes)", "coordinator"),
            (by_peer(f"thinwire_disk_free_bytes{{{NODES}}}"), "{{peer}}"),
            unit="decbytes",
            least=0,
            width=1,
        ),
    )


def placed(panels: list[Json]) -> list[Json]:
    """From left to right, and down; a row begins on a line of its own."""
    x = y = line = 0
    for number_, it in enumerate(panels, 1):
        wide, high = (WIDTH, 1) if it["type"] == "row" else (it["gridPos"]["w"], it["gridPos"]["h"])
        if x + wide > WIDTH:
            x, y, line = 0, y + line, 0
        it["id"], it["gridPos"] = number_, {"x": x, "y": y, "w": wide, "h": high}
        x, line = x + wide, max(line, high)
    return panels


def dashboard() -> Json:
    groups = (the_run, learning, traffic, time, peers, coordinators, trust, faults, machines)
    return {
        "uid": "thinwire",
        "title": "thinwire",
        "description": "A swarm: loss, bytes, time, peers, faults and machines.",
        "tags": ["thinwire"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": RED,
                    "expr": 'ALERTS{alertstate="firing", alertname=~"Thinwire.*", severity!="info"}',
                    "titleFormat": "{{alertname}}",
                    "textFormat": "{{instance}}",
                    "step": "30s",
                }
            ]
        },
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": "node",
                    "label": "Node",
                    "type": "query",
                    "datasource": DATASOURCE,
                    "definition": 'label_values(up{job="thinwire"}, instance)',
                    "query": {"query": 'label_values(up{job="thinwire"}, instance)', "refId": "node"},
                    "refresh": 2,
                    "sort": 1,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": ["All"], "value": ["$__all"]},
                },
            ]
        },
        "panels": placed([it for group in groups for it in group()]),
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    if sys.argv[1:] == ["-"]:
        sys.stdout.write(text)
    else:
        TARGET.write_text(text)
