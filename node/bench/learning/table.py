"""`thinwire bench learning`: what strategies learn beside their references in plain torch, from the same
batches and initial weights, each with the best of as many learning rates and outer values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import inf, isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

from ....compression.errors import ThinwireError
from ....coordinator.protocol.files import write_aside
from ...compare.comparison import one_thread
from ...system.output import make_console, to_stderr, to_stdout
from ...units import human_bytes
from .methods import BETTER, METHODS, Method, Shape, Try, pretrained
from .text import Text

LEAST_NOISE: Final = 0.03
"""Nats per byte: what rounding to few bits and another tie make of a run's loss."""

TARGET: Final = 0.1
"""Nats per byte above `ddp`, that bytes are counted to."""


@dataclass(frozen=True, slots=True)
class Row:
    """Losses are held-out ones in nats per byte; `ours` and `reference` the means over `seeds`, `held_out`
    each one. `bytes_per_step`: payload bytes per peer and step. `bytes_to_target`: until the loss of `ddp`
    plus 0.1 is reached, in the mean of the seeds; None: missed, or no `ddp` was trained. `tuned`: what was
    the best of `n_tries`."""

    method: str
    ours: float
    reference: float | None
    seeds: list[int]
    held_out: dict[str, list[float]]
    bytes_per_step: float
    bytes_to_target: float | None
    tuned: dict[str, dict[str, float]]
    n_tries: int


@dataclass(frozen=True, slots=True)
class _Run:
    """One training: what it ended at, and its curve of (payload bytes, loss)."""

    held_out: float
    payload_bytes: float
    curve: tuple[tuple[float, float], ...] = ()


_Train = Callable[[Text, Try], _Run]


def learning_command(
    names: Sequence[str], shape: Shape, n_seeds: int, *, tuned: bool, as_json: bool, output: Path | None
) -> int:
    """A table on stdout, or a JSON list of rows; how far it is, and what does not hold, on stderr. `output`:
    the table as Markdown; `tuned`: else the first of a row's tries is taken. Returns 1 if something does not
    hold."""
    with one_thread():
        rows = list(rows_of(names, shape, n_seeds, tuned, lambda row: to_stderr(_line(row))))
    if as_json:
        to_stdout(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print_rows(rows)
    if output is not None:
        write_aside(output, markdown(rows).encode())
    wrong = broken(rows)
    for words in wrong:
        to_stderr(f"does not hold: {words}")
    return int(bool(wrong))


def rows_of(
    names: Sequence[str], shape: Shape, n_seeds: int, tuned: bool, progress: Callable[[Row], object]
) -> Iterator[Row]:
    """In the order of `METHODS`."""
    texts, target = _Texts(shape), inf
    for name, method in METHODS.items():
        if name not in names:
            continue
        tries = method.tries if tuned else method.tries[:1]
        row = _row(name, replace(method, tries=tries), shape, texts, range(1, n_seeds + 1), target)
        if name == "ddp":
            target = row.ours + TARGET
        progress(row)
        yield row


def broken(rows: Sequence[Row]) -> list[str]:
    """The claims that do not hold, in words: ours is within noise of the reference, or better; `BETTER`."""
    ours = {row.method: row.ours for row in rows}
    known = [(better, worse) for better, worse in BETTER if better in ours and worse in ours]
    return [
        *(
            f"{row.method} {row.ours:.3f} is within noise of its reference {row.reference:.3f}"
            for row in rows
            if row.reference is not None and not row.ours <= row.reference + noise(row.held_out)
        ),
        *(
            f"{better} {ours[better]:.3f} is better than {worse} {ours[worse]:.3f}"
            for better, worse in known
            if not ours[better] < ours[worse]
        ),
    ]


def noise(held_out: Mapping[str, Sequence[float]]) -> float:
    """Of the difference of the means: twice the standard error of the pairs' differences."""
    differences = [a - b for a, b in zip(held_out["ours"], held_out["reference"], strict=True)]
    if len(differences) < 2:
        return LEAST_NOISE
    return max(LEAST_NOISE, 2 * stdev(differences) / sqrt(len(differences)))


class _Texts:
    """Of a seed; those that are fine-tuned on are made once."""

    def __init__(self, shape: Shape) -> None:
        self.plain = cache(lambda seed: shape.text(shape.task, seed))
        self.other = cache(lambda seed: pretrained(shape, seed))

    def of(self, method: Method, seed: int) -> Text:
        return self.other(seed) if method.fine_tunes else self.plain(seed)


def _row(name: str, method: Method, shape: Shape, texts: _Texts, seeds: Sequence[int], target: float) -> Row:
    def ours(text: Text, tried: Try) -> _Run:
        trained = method.ours(text, shape, tried)
        return _Run(text.loss(trained.model), trained.payload_bytes, trained.curve)

    def reference(text: Text, tried: Try) -> _Run:
        assert method.reference is not None
        return _Run(text.loss(method.reference(text, shape, tried)), 0.0)

    sides: dict[str, _Train] = {"ours": ours, **({"reference": reference} if method.reference else {})}
    tuned, runs = {}, {}
    for side, train in sides.items():
        best, first = _best(train, texts.of(method, seeds[0]), method.tries)
        tuned[side] = asdict(best)
        runs[side] = [first, *(train(texts.of(method, seed), best) for seed in seeds[1:])]
    if name == "ddp":
        target = mean(run.held_out for run in runs["ours"]) + TARGET
    held_out = {side: [round(run.held_out, 4) for run in of_side] for side, of_side in runs.items()}
    return Row(
        method=name,
        ours=mean(held_out["ours"]),
        reference=mean(held_out["reference"]) if "reference" in held_out else None,
        seeds=list(seeds),
        held_out=held_out,
        bytes_per_step=mean(run.payload_bytes for run in runs["ours"]) / shape.n_steps,
        bytes_to_target=None if method.fine_tunes else _bytes_to(target, runs["ours"]),
        tuned=tuned,
        n_tries=len(method.tries),
    )


def _best(train: _Train, text: Text, tries: Sequence[Try]) -> tuple[Try, _Run]:
    """The try that ends at the lowest loss, and its run. One that diverges loses."""

    def run_of(tried: Try) -> _Run:
        try:
            run = train(text, tried)
        except (ThinwireError, ValueError):  # values that no payload can hold
            return _Run(inf, 0.0)
        return run if isfinite(run.held_out) else _Run(inf, 0.0)

    return min(((tried, run_of(tried)) for tried in tries), key=lambda pair: pair[1].held_out)


def _bytes_to(target: float, runs: Sequence[_Run]) -> float | None:
    """The mean over runs of the bytes after which the loss is below; None, if one never is."""
    found = [next((n for n, loss in run.curve if loss < target), None) for run in runs]
    reached = [n for n in found if n is not None]
    return mean(reached) if isfinite(target) and len(reached) == len(runs) else None


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
        _words(row.tuned["ours"]),
    )


def _spread(losses: Sequence[float]) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.3f}"
    return f"{mean(losses):.3f} [{min(losses):.3f}, {max(losses):.3f}]"


def _words(tuned: Mapping[str, Any]) -> str:
    outer = tuned["outer_lr"], tuned["outer_momentum"]
    return f"lr {tuned['lr']:g}" + (f", outer {outer[0]:g}/{outer[1]:g}" if outer != (1.0, 0.0) else "")


def _line(row: Row) -> str:
    return "  ".join(_cells(row))


def _print_rows(rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table(title="bench learning: held-out loss, nats per byte", title_justify="left")
    for head in HEADS:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    make_console().print(table)
