"""`thinwire bench learning`: what strategies learn beside their references in plain torch, from the same
batches and initial weights, each with the best of as many learning rates and outer values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Final

from ....coordinator.protocol.figures import finite
from ....coordinator.protocol.files import write_aside
from ...system.jobs import Done, until_stopped
from ...system.output import make_console, to_stderr, to_stdout
from ...system.places import refuse_file
from ...units import human_bytes
from .methods import Try
from .rows import Row, Wanted, broken, rows_of, with_targets
from .tried import ROWS


def learning_command(wanted: Wanted, *, as_json: bool, output: Path | None) -> int:
    """A table on stdout, or a JSON list of rows; how far it is, and what does not hold, on stderr. `output`:
    the rows that there are, after each one: as JSON if it is named .json, else a table in Markdown. Returns
    1 if something does not hold, and where it was stopped what the signal says, after what there is."""
    if output is not None:
        refuse_file("-o", output)
    found, cpu_s = list[Row](), 0.0

    def tell(done: Done) -> None:
        nonlocal cpu_s
        cpu_s += done.cpu_s
        to_stderr(f"{done.call.args[0]}: {done.result.held_out:.3f} ({done.cpu_s:.0f} s of CPU time)")

    def keep(row: Row) -> None:
        found.append(row)
        rows = with_targets(found)
        to_stderr(next(_line(each) for each in rows if each.method == row.method))
        if output is not None:
            write_aside(output, _written(rows, output).encode())

    stopped = until_stopped(rows_of(wanted, tell), keep)
    rows = with_targets(found)
    if as_json:
        to_stdout(_json(rows))
    else:
        _print_rows(rows)
    wrong = broken(rows)
    for words in wrong:
        to_stderr(f"does not hold: {words}")
    to_stderr(f"{cpu_s / 60:.1f} minutes of CPU time")
    if n_left := len([name for name in ROWS if name in wanted.names]) - len(rows):
        to_stderr(f"Stopped: {n_left} of the rows are left out.")
    return stopped or int(bool(wrong))


def _written(rows: Sequence[Row], output: Path) -> str:
    return _json(rows) + "\n" if output.suffix == ".json" else markdown(rows)


def _json(rows: Sequence[Row]) -> str:
    """Losses that are not finite: null."""
    return json.dumps([_plain(asdict(row)) for row in rows], indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return finite(value) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------- for people

HEADS: Final = ("method", "held-out", "reference", "seeds", "bytes a step", "bytes to ddp + 0.1", "tuned")


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADS, tuple("---" for _ in HEADS), *(_cells(row) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        _spread(row.held_out["ours"]),
        _spread(row.held_out["reference"]) if row.reference is not None else "-",
        str(len(row.seeds)),
        human_bytes(row.bytes_per_step) if row.bytes_per_step else "-",
        "missed" if row.bytes_to_target is None else human_bytes(row.bytes_to_target),
        str(Try(**row.tuned["ours"])),
    )


def _spread(losses: Sequence[float]) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.3f}"
    return f"{mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]"


def _line(row: Row) -> str:
    return "  ".join(_cells(row))


def _print_rows(rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(title="bench learning: held-out loss, nats per byte or label", title_justify="left")
    for head in HEADS:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    make_console().print(table)
