"""Rows of `thinwire bench learning`: trainings, each of which another process can make as well, and what
comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import inf, isfinite, sqrt
from statistics import mean, stdev
from typing import Any, Final, Literal

from ....compression.errors import ThinwireError
from ...system.jobs import Call, Rows, Tell, Work, work_off
from ...units import human_bytes
from .methods import BETTER, HALF, Learns, Shape, Try, text_of
from .text import Learnt
from .tried import ROWS

LEAST_NOISE: Final = 0.03
"""Nats per byte: what rounding to few bits and another tie make of a run's loss."""

TARGET: Final = 0.1
"""Nats per byte above `ddp`, that bytes are counted to."""

Side = Literal["ours", "reference"]

Curve = tuple[tuple[float, float], ...]
"""(payload bytes of a peer so far, held-out loss), now and then and in the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rows. `tuned`: else the first of a row's tries is taken; `device`: that models are on."""

    names: Sequence[str]
    shape: Shape
    n_seeds: int
    tuned: bool = True
    device: str = "cpu"
    n_jobs: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One of a row: `method` by its name."""

    method: str
    side: Side
    shape: Shape
    tried: Try
    seed: int
    device: str

    def __str__(self) -> str:
        of = "'s reference" if self.side == "reference" else ""
        return f"{self.method}{of}, seed {self.seed}, {self.tried}"


@dataclass(frozen=True, slots=True)
class Ended:
    """What a training ended at; infinite: it diverged. `payload_bytes`: that a peer has sent."""

    held_out: float
    payload_bytes: float = 0.0
    curve: Curve = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Losses are held-out ones in nats per byte, of label words per label; `ours` and `reference` the means
    over `seeds`, `held_out` each one. `bytes_per_step`: payload bytes per peer and step. `bytes_to_target`:
    until the loss of `ddp` from the same seed plus 0.1 is reached, in the mean of the seeds; None: missed by
    one of them, or no `ddp` was trained. `tuned`: what was the best of `n_tries`. `curves`: ours, of each
    seed."""

    method: str
    ours: float
    reference: float | None
    seeds: list[int]
    held_out: dict[str, list[float]]
    bytes_per_step: float
    bytes_to_target: float | None
    tuned: dict[str, dict[str, Any]]
    n_tries: int
    curves: list[Curve]


def rows_of(wanted: Wanted, tell: Tell = lambda _done: None) -> Rows[Row]:
    """In the order in which they end, with `bytes_to_target` open: see `with_targets`. `tell`: is told of
    every training."""
    works = [_row(name, wanted) for name in ROWS if name in wanted.names]
    for _, row in work_off(works, wanted.n_jobs, tell, preload=[__name__]):
        yield row


def with_targets(rows: Iterable[Row]) -> list[Row]:
    """In the order of `ROWS`."""
    known = {row.method: row for row in rows}
    targets = [loss + TARGET for loss in known["ddp"].held_out["ours"]] if "ddp" in known else []
    return [
        replace(
            known[name],
            bytes_to_target=_bytes_to(targets, known[name].curves) if m.learns == "text" else None,
        )
        for name, m in ROWS.items()
        if name in known
    ]


def trained(training: Training) -> Ended:
    """The same in every process."""
    method, shape, tried = ROWS[training.method], training.shape, training.tried
    text = _text(shape, training.seed, training.device, method.learns)
    try:
        if training.side == "ours":
            found = method.ours(text, shape, tried)
            ended = Ended(text.loss(found.model), found.payload_bytes, found.curve)
        else:
            assert method.reference is not None
            ended = Ended(text.loss(method.reference(text, shape, tried)))
    except (ThinwireError, ValueError):  # values that no payload can hold
        return Ended(inf)
    return ended if isfinite(ended.held_out) else Ended(inf)


@cache
def _text(shape: Shape, seed: int, device: str, learns: Learns) -> Learnt:
    """Made once in a process."""
    return text_of(learns, shape, seed, device)


def _row(name: str, wanted: Wanted) -> Work[Row]:
    """First all that is tried, from the first seed, then the best of each side from the others."""
    method, seeds = ROWS[name], range(1, wanted.n_seeds + 1)
    tries = method.tries if wanted.tuned else method.tries[:1]
    sides: tuple[Side, ...] = ("ours",) if method.reference is None else ("ours", "reference")

    def call(side: Side, tried: Try, seed: int) -> Call:
        training = Training(
            method=name, side=side, shape=wanted.shape, tried=tried, seed=seed, device=wanted.device
        )
        return Call(trained, (training,))

    found: list[Ended] = yield [call(side, tried, seeds[0]) for side in sides for tried in tries]
    best = {side: _best(tries, found[i * len(tries) :]) for i, side in enumerate(sides)}
    more: list[Ended] = yield [call(side, best[side][0], seed) for side in sides for seed in seeds[1:]]
    n = len(seeds) - 1
    ended = {side: [best[side][1], *more[i * n : (i + 1) * n]] for i, side in enumerate(sides)}
    return _summary(name, wanted, {side: best[side][0] for side in sides}, ended, len(tries))


def _best(tries: Sequence[Try], ended: Sequence[Ended]) -> tuple[Try, Ended]:
    """That ends at the lowest loss."""
    return min(zip(tries, ended, strict=False), key=lambda pair: pair[1].held_out)


def _summary(
    name: str,
    wanted: Wanted,
    tuned: Mapping[Side, Try],
    ended: Mapping[Side, Sequence[Ended]],
    n_tries: int,
) -> Row:
    held_out = {side: [round(e.held_out, 4) for e in of_side] for side, of_side in ended.items()}
    return Row(
        method=name,
        ours=mean(held_out["ours"]),
        reference=mean(held_out["reference"]) if "reference" in held_out else None,
        seeds=list(range(1, wanted.n_seeds + 1)),
        held_out={str(side): losses for side, losses in held_out.items()},
        bytes_per_step=mean(e.payload_bytes for e in ended["ours"]) / wanted.shape.n_steps,
        bytes_to_target=None,
        tuned={str(side): asdict(tried) for side, tried in tuned.items()},
        n_tries=n_tries,
        curves=[e.curve for e in ended["ours"]],
    )


def _bytes_to(targets: Sequence[float], curves: Sequence[Curve]) -> float | None:
    """The mean over seeds of the bytes after which the loss is below its target; None, if one never is."""
    pairs = zip(targets, curves, strict=False)
    found = [next((n for n, loss in curve if loss < target), None) for target, curve in pairs]
    reached = [n for n in found if n is not None]
    return mean(reached) if reached and len(reached) == len(curves) else None


def broken(rows: Sequence[Row]) -> list[str]:
    """The claims that do not hold, in words: ours is within noise of the reference, or better; `BETTER`;
    `HALF`, where there is a `ddp` to count to."""
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
        *_more_than_half({row.method: row.bytes_to_target for row in rows}),
    ]


def _more_than_half(n_bytes: Mapping[str, float | None]) -> Iterator[str]:
    for now, before in HALF:
        if "ddp" not in n_bytes or now not in n_bytes or before not in n_bytes:
            continue
        least, most = n_bytes[now] or inf, n_bytes[before] or inf
        if least == inf or least > most / 2:
            told = f"{_told(least)}, {_told(most)}"
            yield f"{now} needs at most half of the bytes of {before} to ddp + {TARGET}: {told}"


def _told(n_bytes: float) -> str:
    return human_bytes(n_bytes) if isfinite(n_bytes) else "missed"


def noise(held_out: Mapping[str, Sequence[float]]) -> float:
    """Of the difference of the means: twice the standard error of the pairs' differences."""
    differences = [a - b for a, b in zip(held_out["ours"], held_out["reference"], strict=True)]
    if len(differences) < 2 or not all(map(isfinite, differences)):
        return LEAST_NOISE
    return max(LEAST_NOISE, 2 * stdev(differences) / sqrt(len(differences)))
