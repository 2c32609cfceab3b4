"""What a person sees of a comparison: progress, a table, a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...compression.errors import ConfigError
from ...coordinator.protocol.figures import finite, human_seconds
from ...coordinator.protocol.files import write_aside
from ..config import load_config
from ..links.upload_limit import parse_rate
from ..system.jobs import work_off
from ..system.output import make_console, to_stdout
from ..system.places import refuse_file
from ..units import human_bytes
from .charts import comparison_png, has_matplotlib
from .comparison import PHASES, Comparison, Outcome
from .comparison import Progress as Tell
from .search import Row, search
from .specs import ComparePlan, notable, plans, with_baselines
from .split import Split
from .verdict import Link, Verdict, verdict_of

HEADS = ("rounds", "tokens", "held-out", "=bytes", "=time", "bytes", "of ddp", "all sent", *PHASES)
MAX_PEERS = 32
LINE_EVERY_S = 3.0


def compare_command(
    run_file: Path,
    specs: str,
    *,
    rounds: int | None,
    peers: int | None,
    overrides: Mapping[str, Any],
    import_path: str | None,
    output: Path | None,
    as_json: bool,
    stopped: Callable[[], bool],
    link: str = "100Mbit",
    rtt_ms: float = 50.0,
    n_rates: int = 1,
    n_seeds: int = 1,
    split: str | None = None,
    n_jobs: int = 1,
) -> int:
    """Table or JSON on stdout, all else on stderr. Returns 1 if a strategy could not be trained to its end.
    `link` and `rtt_ms`: of every peer; `n_rates`: learning rates tried, `n_seeds`: trainings, of every row;
    `split`: how uneven the peers' data are; `n_jobs`: trainings at a time, each in a process, if several.

    Raises ConfigError before anything is trained.
    """
    between = Link(parse_rate(link, "--link"), rtt_ms / 1000, f"{link} with {rtt_ms:g} ms there and back")
    run = load_config(run_file, {**overrides, "run.rounds": rounds})
    n_peers = max(2, run.run.min_peers) if peers is None else peers
    if not 2 <= n_peers <= MAX_PEERS:
        raise ConfigError(f"--peers: between 2 and {MAX_PEERS}: they are threads of this process")
    picture = _picture(output, run.run.name)
    uneven = None if split is None else Split.parse(split)
    comparison = Comparison(run, with_baselines(plans(specs, run), run), n_peers, import_path, split=uneven)
    unit = comparison.loss_unit
    console = make_console(stderr=True)
    if comparison.split_told is not None:
        console.print(comparison.split_told, highlight=False, markup=False, soft_wrap=True)
    rows = _train(comparison, console, stopped, n_rates, n_seeds, n_jobs)
    written = _draw(comparison, [row.first for row in rows], unit, picture, console)
    verdict = verdict_of(rows, n_peers, between, unit)
    if as_json:
        to_stdout(json.dumps(_figures(comparison, rows, unit, written, verdict)))
    elif rows:
        _print_table(comparison, rows, unit, verdict)
    for warning in verdict.warnings if verdict is not None else ():
        console.print(warning, highlight=False, markup=False, soft_wrap=True)
    return int(any(row.error for row in rows))


def _train(
    comparison: Comparison,
    console: Console,
    stopped: Callable[[], bool],
    n_rates: int,
    n_seeds: int,
    n_jobs: int,
) -> list[Row]:
    """What there is of it when it is `stopped`; people are told as it goes on, within a training only if it
    is in this process."""
    with _display(console, comparison.plans) as tell:

        def train(plan: ComparePlan, seed: int) -> Outcome | None:
            return next(comparison.alike(plan, seed).train(tell, stopped), None)

        works = [
            search(plan, train if n_jobs == 1 else comparison.elsewhere, n_rates, n_seeds)
            for plan in comparison.plans
        ]
        found = work_off(works, n_jobs, lambda done: _tell_end(done.result, console), [__name__], stopped)
        rows = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    n_left = len(comparison.plans) - len(rows)
    if n_left:
        console.print(f"Stopped: {n_left} of {len(comparison.plans)} strategies are left out.")
    return rows


def _tell_end(outcome: Outcome, console: Console) -> None:
    line = f"{outcome.plan.label}: {outcome.error}"
    if outcome.error is None:
        line = (
            f"{outcome.plan.label}: {outcome.plan.rounds} rounds at lr {outcome.plan.options['lr']:g} in "
            f"{human_seconds(outcome.seconds)}, "
            f"held-out {outcome.curve[0].held_out:.3f} -> {outcome.last.held_out:.3f}"
        )
    style = "bold red" if outcome.error else None
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def _picture(output: Path | None, name: str) -> Path:
    """Where the PNG goes. Raises ConfigError if it cannot be written there."""
    path = output or Path(f"{name.replace(os.sep, '-')}-compare.png")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o {path}: the picture is a PNG, name it {path.with_suffix('.png')}")
    refuse_file("-o", path)
    return path


def _draw(
    comparison: Comparison, outcomes: Sequence[Outcome], unit: str, path: Path, console: Console
) -> Path | None:
    """The file that was written, if any."""
    if not any(outcome.has_rounds for outcome in outcomes):
        return None
    if not has_matplotlib():
        console.print(
            f"No picture without matplotlib: pip install 'thinwire\\[plot]', then {path} is written."
        )
        return None
    run = comparison.run.run
    title = f"{run.name}: {comparison.n_params:,} parameters, {comparison.n_peers} peers, the same data"
    try:
        write_aside(path, comparison_png(title, unit, outcomes, comparison.ddp_bytes_per_step))
    except OSError as e:
        raise ConfigError(f"-o {path}: {e.strerror}") from e
    console.print(f"Wrote {path}", highlight=False)
    return path


def _figures(
    comparison: Comparison, rows: Sequence[Row], unit: str, written: Path | None, verdict: Verdict | None
) -> dict[str, Any]:
    found = [_row_figures(row, verdict) for row in rows]
    baselines = {row.plan.baseline: figures for row, figures in zip(rows, found, strict=True)}
    return {
        "run": comparison.run.run.name,
        "peers": comparison.n_peers,
        "n_params": comparison.n_params,
        "samples_per_step": comparison.samples_per_step,
        "ddp_bytes_per_peer_step": comparison.ddp_bytes_per_step,
        "split": comparison.split_told,
        "unit": unit,
        "bytes_per_token": comparison.bytes_per_token,
        "strategies": found,
        "alone": baselines.get("alone"),
        "ddp": baselines.get("ddp"),
        "equal_bytes": verdict and verdict.n_bytes,
        "equal_seconds": verdict and verdict.seconds,
        "recommendation": verdict and verdict.recommendation,
        "warnings": verdict.warnings if verdict is not None else [],
        "stopped": len(rows) < len(comparison.plans),
        "png": None if written is None else str(written),
    }


def _row_figures(row: Row, verdict: Verdict | None) -> dict[str, Any]:
    figures = {**row.first.figures(), "error": row.error, "tried": [asdict(t) for t in row.tried]}
    if not row.has_rounds or verdict is None:
        return figures
    equal = verdict.equal[row.plan.label]
    return {
        **figures,
        "held_out_last": finite(equal.at_tokens),
        "held_out_seeds": [finite(loss) for loss in row.losses],
        "held_out_at_equal_bytes": equal.at_bytes,
        "held_out_at_equal_time": equal.at_time,
        "estimated_s_per_round": equal.round_s,
    }


# ------------------------------------------------------------------------------------------ the table


def _print_table(comparison: Comparison, rows: Sequence[Row], unit: str, verdict: Verdict | None) -> None:
    console = make_console()
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", overflow="fold")
    for column in HEADS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.plan.label, *_cells(row, verdict))
    console.print(table)
    if verdict is not None:
        console.print(verdict.recommendation, highlight=False, markup=False)
        console.print(_about_equal(verdict), highlight=False)
    console.print(
        f"held-out: loss in {unit}{_in_bits(comparison)}, of several seeds the mean and how far they are "
        f"apart. Per peer: tokens; per peer and step: payload "
        f"bytes, their share of what data-parallel training sends, all that was sent (messages too; a "
        f"network's framing comes on top), and milliseconds of CPU time. "
        f"A step is {comparison.samples_per_step:,} samples per peer; a ring all-reduce of "
        f"{comparison.n_params:,} float32 gradients sends "
        f"{human_bytes(comparison.ddp_bytes_per_step)} per peer after each.",
        highlight=False,
    )
    for row in rows:
        console.print(f"{row.plan.label}: {notable(row.plan.options)}", highlight=False, markup=False)


def _about_equal(verdict: Verdict) -> str:
    time = (
        f"=time: held-out loss after {human_seconds(verdict.seconds)}: computing as measured here, and the "
        f"link's part as computed"
    )
    if verdict.n_bytes is None:
        return f"{time}."
    return f"=bytes: held-out loss after {human_bytes(verdict.n_bytes)} per peer. {time}."


def _in_bits(comparison: Comparison) -> str:
    if comparison.loss_unit != "nats/token" or comparison.bytes_per_token is None:
        return ""
    size = comparison.bytes_per_token
    return f" (a token is {size:.2f} bytes of text: times {1 / math.log(2) / size:.3f} it is in bits/byte)"


def _cells(row: Row, verdict: Verdict | None) -> list[str]:
    if not row.has_rounds or verdict is None:
        return ["0", *["-"] * (len(HEADS) - 1)]
    outcome, equal = row.first, verdict.equal[row.plan.label]
    last = outcome.last
    of_all = f"/{outcome.plan.rounds}" if outcome.error else ""
    spread = f" +-{row.spread / 2:.3f}" if len(row.outcomes) > 1 else ""
    return [
        f"{last.round}{of_all}",
        f"{last.tokens:,.0f}",
        f"{equal.at_tokens:.3f}{spread}",
        "-" if equal.at_bytes is None else f"{equal.at_bytes:.3f}",
        f"{equal.at_time:.3f}",
        *_sent(outcome),
        *(f"{1000 * outcome.phases[phase] / outcome.steps_per_round:.1f}" for phase in PHASES),
    ]


def _sent(outcome: Outcome) -> list[str]:
    if outcome.plan.is_alone:
        return ["-", "-", "-"]
    ratio = outcome.ddp_ratio
    return [
        human_bytes(outcome.last.payload_bytes / outcome.last.steps),
        f"1/{ratio:.0f}" if ratio >= 1.5 else f"{1 / ratio:.2f}",
        human_bytes(outcome.all_sent_bytes_per_peer_step),
    ]


# ------------------------------------------------------------------------------------------ progress


@contextmanager
def _display(console: Console, all_plans: Sequence[ComparePlan]) -> Iterator[Tell]:
    """A bar for each strategy on a terminal; elsewhere a line when it begins, and one every three seconds."""
    if not console.is_terminal:
        yield _line_printer(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[held_out]}"), console=console) as bars:
        tasks = {p.label: bars.add_task(p.label, total=p.rounds, start=False, held_out="") for p in all_plans}

        def move(plan: ComparePlan, round_: int, held_out: float | None) -> None:
            task = tasks[plan.label]
            if not bars.tasks[task].started:
                bars.start_task(task)
            bars.update(task, completed=round_, total=plan.rounds, held_out=_told(held_out))

        yield move


def _line_printer(console: Console) -> Tell:
    """Prints a line when a plan begins, and when its round is another one than at the last, `LINE_EVERY_S`
    earlier."""
    printed: tuple[ComparePlan | None, int, float] = None, -1, 0.0

    def print_line(plan: ComparePlan, round_: int, held_out: float | None) -> None:
        nonlocal printed
        before, at, when_s = printed
        is_due = time.monotonic() - when_s >= LINE_EVERY_S and round_ != at
        if plan is not before or is_due:
            printed = plan, round_, time.monotonic()
            line = f"{plan.label}: round {round_}/{plan.rounds} {_told(held_out)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return print_line


def _told(held_out: float | None) -> str:
    return "" if held_out is None else f"held-out {held_out:.3f}"
