"""`thinwire plan`: what a run will cost in bytes, memory and time, measured here before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.figures import human_seconds
from ...optim.registry import STRATEGIES, complete_new_run, strategy_class
from ...optim.rules import warning_of
from ..config import RunConfig, load_config
from ..doctor.machine import available_bytes
from ..links.upload_limit import parse_rate
from ..system.command_name import as_typed
from ..system.output import to_stderr, to_stdout
from ..units import human_bytes
from .estimate import Estimate, Span, estimate
from .measuring import Measured

MAX_PEERS: Final = 256
START_S: Final = 300.0
"""For a process to load a model and its data, and to compile kernels."""


class PlanFailed(ThinwireError):
    """The process that measures has ended without a word."""


def plan(
    run_file: Path,
    *,
    peers: int | None,
    link: str,
    upload: str,
    rtt_ms: float,
    seconds: float,
    device: str,
    strategies: str | None,
    overrides: Mapping[str, Any],
    import_path: str | None,
    as_json: bool,
    stopped: Callable[[], bool],
) -> None:
    """Prints a table, or one JSON object. Raises ConfigError and what measuring raises."""
    config = load_config(run_file, overrides)
    n_peers = peers or max(2, config.run.min_peers)
    if not 2 <= n_peers <= MAX_PEERS:
        raise ConfigError(f"--peers {n_peers}: between 2 and {MAX_PEERS}")
    if not 0 < seconds <= 3600 or not 0 <= rtt_ms <= 60_000:
        raise ConfigError("--seconds: above 0, up to 3600; --rtt-ms: from 0 to 60000")
    rate, upload_rate = parse_rate(link, "--link"), parse_rate(upload, "--upload")
    found: list[Estimate] = []
    failed: dict[str, str] = {}
    asked = chosen(config, strategies)
    for i, options in enumerate(asked, 1):
        if stopped():
            return
        to_stderr(f"measuring {options['name']} on this machine, {i} of {len(asked)}")
        try:
            measured = _measured(config, options, n_peers, seconds, device, import_path)
        except ConfigError as e:
            if options["name"] == config.strategy["name"]:
                raise
            failed[options["name"]] = str(e)
            continue
        memory, round_s = available_bytes(), config.work.round_s
        found.append(estimate(measured, n_peers, rate, rtt_ms / 1000, round_s, memory, upload_rate))
    if as_json:
        to_stdout(json.dumps(_plain(found, failed, n_peers, rate, config)))
        return
    to_stdout(as_typed(told(found, failed, n_peers, rate, upload_rate, config, run_file)))


def chosen(config: RunConfig, strategies: str | None) -> list[dict[str, Any]]:
    """The run's strategy as its file says, then others as they suit small models. Raises ConfigError."""
    own = complete_new_run(config.strategy)
    # What peers send to neighbours no node can measure alone, sapo needs a task that writes, and a round of
    # subspace takes long in large models: planned only where the run has them, or they are asked for.
    others = STRATEGIES.keys() - {own["name"], "gossip", "sapo", "subspace"}
    names = [own["name"], *sorted(others)]
    if strategies is not None:
        names = strategies.split(",")
    return [_timeless(own if name == own["name"] else _for_small_models(name)) for name in names]


def _for_small_models(name: str) -> dict[str, Any]:
    return complete_new_run({"name": name, **strategy_class(name).facts.small_model})


def _timeless(options: dict[str, Any]) -> dict[str, Any]:
    """All work is to be measured, whatever the clock says."""
    seconds = strategy_class(options["name"]).facts.seconds
    return options if seconds is None else {**options, seconds: 0.0}


def _measured(
    config: RunConfig,
    options: Mapping[str, Any],
    n_peers: int,
    seconds: float,
    device: str,
    import_path: str | None,
) -> Measured:
    """In a process of its own, so that its memory is that of a node. Raises ConfigError and PlanFailed."""
    asked = {
        "config": {**config.model_dump(), "strategy": dict(options)},
        "peers": n_peers,
        "seconds": seconds,
        "device": device,
        "task": import_path,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "thinwire.node.planning.measuring"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            timeout=START_S + 20 * seconds,
        )
    except subprocess.TimeoutExpired:
        raise PlanFailed(
            f"measuring {options['name']} takes too long: a smaller --seconds, or model"
        ) from None
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == ConfigError.exit_code:
        raise ConfigError(last)
    if done.returncode:
        raise PlanFailed(f"measuring {options['name']} failed: {last}")
    return Measured.from_json(done.stdout)


def _plain(
    found: Sequence[Estimate], failed: Mapping[str, str], n_peers: int, rate: float, config: RunConfig
) -> dict[str, Any]:
    return {
        "run": config.run.name,
        "peers": n_peers,
        "link_bytes_per_s": rate,
        "rounds": config.run.rounds,
        "strategies": [{**asdict(e), "fits": e.fits} for e in found],
        "failed": dict(failed),
    }


# --------------------------------------------------------------------------------------- for people


def told(
    found: Sequence[Estimate],
    failed: Mapping[str, str],
    n_peers: int,
    rate: float,
    upload: float,
    config: RunConfig,
    run_file: Path,
) -> str:
    """A column for each strategy; times as median (least-most)."""
    head = f"{config.run.name}: {n_peers} nodes like this machine, each with a link of {human_bytes(rate)}/s."
    lines = [head, "", *_table([("", [e.strategy for e in found]), *_rows(found, config)]), ""]
    lines += [f"{e.strategy}: {e.told}" for e in found if e.told is not None]
    lines += [f"{name} cannot train this: {why}" for name, why in failed.items()]
    if found:
        first = found[0]
        lines.append(
            f"Data-parallel training would send {human_bytes(first.ddp_bytes)} per node and step: "
            f"{human_seconds(first.ddp_exchange_s)} on this link."
        )
    lines += [
        *filter(None, [warning_of(complete_new_run(config.strategy), config.run.rounds)]),
        "Times: median (least-most). Measured here: computing, packing, applying, payload, memory.",
        f"Computed: the link's part; the coordinator's line sends {human_bytes(upload)}/s.",
        f"Which one learns most from the same tokens: thinwire compare {run_file}",
    ]
    return "\n".join(lines)


def _rows(found: Sequence[Estimate], config: RunConfig) -> list[tuple[str, list[str]]]:
    def row(name: str, of: Callable[[Estimate], str]) -> tuple[str, list[str]]:
        return name, [of(e) for e in found]

    uses_gpu = any(e.device_bytes for e in found)
    return [
        row("rounds measured", lambda e: str(e.rounds_measured)),
        row("batches per round", lambda e: str(e.batches)),
        row("payload", lambda e: human_bytes(e.payload_bytes)),
        row("sent per round", lambda e: human_bytes(e.sent_bytes)),
        row("received per round", lambda e: human_bytes(e.received_bytes)),
        row("computing", lambda e: _span(e.compute_s)),
        row("packing", lambda e: _span(e.pack_s)),
        row("on the link", lambda e: _time(e.exchange_s)),
        row("applying", lambda e: _span(e.apply_s)),
        row("a round", lambda e: _span(e.round_s)),
        row(f"{config.run.rounds} rounds", lambda e: human_seconds(config.run.rounds * e.round_s.median)),
        row("tokens per second", lambda e: f"{e.tokens_per_s:,.0f}"),
        row("memory of a node", lambda e: human_bytes(e.memory_bytes)),
        *([row("memory on the GPU", lambda e: human_bytes(e.device_bytes))] if uses_gpu else []),
        row("verdict", lambda e: e.verdict),
    ]


def _span(span: Span) -> str:
    """Least and most in the median's unit, to two digits: three columns of them fit a terminal."""
    if span.median >= 100:
        return f"{_time(span.median)} ({_time(span.least)}-{_time(span.most)})"
    factor = 1000 if span.median < 1 else 1
    least, most = (f"{float(f'{seconds * factor:.2g}'):g}" for seconds in (span.least, span.most))
    return f"{_time(span.median)} ({least}-{most})"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else human_seconds(seconds)


def _table(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows)
    n = len(rows[0][1])
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(n)]
    return [
        "  ".join(
            [name.ljust(first), *(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))]
        ).rstrip()
        for name, cells in rows
    ]
