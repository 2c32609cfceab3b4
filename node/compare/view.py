"""What a person sees of a comparison: progress, a table, a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...compression.errors import ConfigError
from ...coordinator.protocol.figures import human_seconds
from ...coordinator.protocol.files import write_aside
from ..config import load_config
from ..system.output import make_console, to_stdout
from ..system.places import refuse_file
from ..units import human_bytes
from .charts import comparison_png, has_matplotlib
from .comparison import PHASES, Comparison, Outcome
from .comparison import Progress as Tell
from .specs import ComparePlan, notable, plans

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
) -> int:
    """Table or JSON on stdout, all else on stderr. Returns 1 if a strategy could not be trained to its end.

    Raises ConfigError before anything is trained.
    """
    run = load_config(run_file, {**overrides, "run.rounds": rounds})
    n_peers = max(2, run.run.min_peers) if peers is None else peers
    if not 2 <= n_peers <= MAX_PEERS:
        raise ConfigError(f"--peers: between 2 and {MAX_PEERS}: they are threads of this process")
    picture = _picture(output, run.run.name)
    comparison = Comparison(run, plans(specs, run), n_peers, import_path)
    unit = comparison.loss_unit
    console = make_console(stderr=True)
    outcomes = _train(comparison, console, stopped)
    written = _draw(comparison, outcomes, unit, picture, console)
    if as_json:
        to_stdout(json.dumps(_figures(comparison, outcomes, unit, written)))
    elif outcomes:
        _print_table(comparison, outcomes, unit)
    return int(any(outcome.error for outcome in outcomes))


def _train(comparison: Comparison, console: Console, stopped: Callable[[], bool]) -> list[Outcome]:
    """What there is of it when it is `stopped`; people are told as it goes on."""
    outcomes = []
    with _display(console, comparison.plans) as tell:
        for outcome in comparison.train(tell, stopped):
            outcomes.append(outcome)
            _tell_end(outcome, console)
    n_left = len(comparison.plans) - len(outcomes)
    if n_left:
        console.print(f"Stopped: {n_left} of {len(comparison.plans)} strategies are left out.")
    return outcomes


def _tell_end(outcome: Outcome, console: Console) -> None:
    line = f"{outcome.plan.label}: {outcome.error}"
    if outcome.error is None:
        line = (
            f"{outcome.plan.label}: {outcome.plan.rounds} rounds in {human_seconds(outcome.seconds)}, "
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
    comparison: Comparison, outcomes: Sequence[Outcome], unit: str, written: Path | None
) -> dict[str, Any]:
    return {
        "run": comparison.run.run.name,
        "peers": comparison.n_peers,
        "n_params": comparison.n_params,
        "samples_per_step": comparison.samples_per_step,
        "ddp_bytes_per_peer_step": comparison.ddp_bytes_per_step,
        "unit": unit,
        "bytes_per_token": comparison.bytes_per_token,
        "strategies": [outcome.figures() for outcome in outcomes],
        "stopped": len(outcomes) < len(comparison.plans),
        "png": None if written is None else str(written),
    }


# ------------------------------------------------------------------------------------------ the table


def _print_table(comparison: Comparison, outcomes: Sequence[Outcome], unit: str) -> None:
    console = make_console()
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", overflow="fold")
    for column in ("rounds", "tokens", "held-out", "bytes", "of ddp", "all sent", *PHASES):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(outcome.plan.label, *_cells(outcome))
    console.print(table)
    console.print(
        f"held-out: loss in {unit}{_in_bits(comparison)}. Per peer: tokens; per peer and step: payload "
        f"bytes, their share of what data-parallel training sends, all that was sent (messages too; a "
        f"network's framing comes on top), and milliseconds of CPU time. "
        f"A step is {comparison.samples_per_step:,} samples per peer; a ring all-reduce of "
        f"{comparison.n_params:,} float32 gradients sends "
        f"{human_bytes(comparison.ddp_bytes_per_step)} per peer after each.",
        highlight=False,
    )
    for outcome in outcomes:
        console.print(f"{outcome.plan.label}: {notable(outcome.plan.options)}", highlight=False, markup=False)


def _in_bits(comparison: Comparison) -> str:
    if comparison.loss_unit != "nats/token" or comparison.bytes_per_token is None:
        return ""
    size = comparison.bytes_per_token
    return f" (a token is {size:.2f} bytes of text: times {1 / math.log(2) / size:.3f} it is in bits/byte)"


def _cells(outcome: Outcome) -> list[str]:
    if not outcome.has_rounds:
        return ["0", *["-"] * (5 + len(PHASES))]
    last = outcome.last
    of_all = f"/{outcome.plan.rounds}" if outcome.error else ""
    return [
        f"{last.round}{of_all}",
        f"{last.tokens:,.0f}",
        f"{last.held_out:.3f}",
        human_bytes(last.payload_bytes / last.steps),
        f"1/{outcome.ddp_ratio:.0f}" if outcome.ddp_ratio >= 1.5 else f"{1 / outcome.ddp_ratio:.2f}",
        human_bytes(outcome.all_sent_bytes_per_peer_step),
        *(f"{1000 * outcome.phases[phase] / outcome.steps_per_round:.1f}" for phase in PHASES),
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
            bars.update(task, completed=round_, held_out=_told(held_out))

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
