"""What a comparison comes to: losses at equal bytes and at equal time on a link, and a sentence. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...coordinator.protocol.figures import human_seconds
from ..planning.estimate import exchange
from ..units import human_bytes
from .search import Row

FEW_ROUNDS: Final = 20
"""With fewer, momentum and error feedback have hardly begun."""


@dataclass(frozen=True, slots=True)
class Link:
    """What every peer has, in either direction. `told`: in the user's words."""

    bytes_per_s: float
    rtt_s: float
    told: str


@dataclass(frozen=True, slots=True)
class Equal:
    """Losses of one row: in the end, and after the bytes and the time of a `Verdict`; None: there is none.
    `round_s`: estimated, of a round on the link."""

    at_tokens: float
    at_bytes: float | None
    at_time: float
    round_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`n_bytes`: of the row that sent least among those that ended below `alone`; `seconds`: of the row that
    is through with its tokens first. `equal`: by label."""

    n_bytes: float | None
    seconds: float
    equal: dict[str, Equal]
    recommendation: str
    warnings: list[str]


def round_seconds(row: Row, n_peers: int, link: Link) -> float:
    """Of a round, computed here and exchanged on the link; a ring for `ddp`. With decoupled's overlap one is
    done while the other is."""
    outcome, phases = row.first, row.first.phases
    if row.plan.baseline is not None:  # what it packs and decodes is of thinwire's making
        ring_s = outcome.ddp_bytes_per_step * outcome.steps_per_round / link.bytes_per_s + link.rtt_s
        return phases["compute"] + (0.0 if row.plan.is_alone else ring_s)
    work_s = sum(phases.values())
    link_s = exchange(
        outcome.payload_bytes_per_peer_round, n_peers, link.bytes_per_s, link.rtt_s, work_s
    ).seconds
    if row.plan.options["name"] == "decoupled" and row.plan.options.get("overlap"):
        return work_s - phases["compute"] + max(phases["compute"], link_s)
    return work_s + link_s


def verdict_of(rows: Sequence[Row], n_peers: int, link: Link, unit: str) -> Verdict | None:
    """None if nothing was trained. `unit`: of the loss."""
    shown = [row for row in rows if row.has_rounds]
    if not shown:
        return None
    per_round = {row.plan.label: round_seconds(row, n_peers, link) for row in shown}
    seconds = min(per_round[row.plan.label] * row.first.last.round for row in shown)
    n_bytes = _bytes_of_the_thriftiest(shown)
    equal = {}
    for row in shown:
        curve, round_s = row.curve, per_round[row.plan.label]
        losses = [p.held_out for p in curve]
        equal[row.plan.label] = Equal(
            at_tokens=losses[-1],
            at_bytes=None
            if n_bytes is None or row.plan.is_alone
            else loss_at([p.payload_bytes for p in curve], losses, n_bytes),
            at_time=loss_at([p.round * round_s for p in curve], losses, seconds),
            round_s=round_s,
        )
    words = _recommendation(shown, equal, f"in {human_seconds(seconds)} on {link.told}", unit)
    return Verdict(n_bytes, seconds, equal, words, _warnings(shown))


def loss_at(xs: Sequence[float], losses: Sequence[float], x: float) -> float:
    """Between the points of a curve, linear; beyond its end the last one. `xs` ascend."""
    i = bisect_right(xs, x)
    if i == len(xs):
        return losses[-1]
    if i == 0:
        return losses[0]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return losses[i - 1] + share * (losses[i] - losses[i - 1])


def _bytes_of_the_thriftiest(rows: Sequence[Row]) -> float | None:
    alone = next((row for row in rows if row.plan.is_alone), None)
    if alone is None:
        return None
    worth = [
        row.curve[-1].payload_bytes
        for row in rows
        if row.plan.baseline is None and row.curve[-1].held_out < alone.curve[-1].held_out
    ]
    return min(worth, default=None)


def _recommendation(rows: Sequence[Row], equal: dict[str, Equal], time: str, unit: str) -> str:
    baselines = {row.plan.baseline: row for row in rows if row.plan.baseline is not None}
    alone, ddp = baselines.get("alone"), baselines.get("ddp")
    swarm = [row for row in rows if not row.plan.is_alone]
    if alone is None or not swarm:
        return "There is nothing to recommend: train alone and one strategy at least to their ends."
    best = min(swarm, key=lambda row: equal[row.plan.label].at_time)
    ours, theirs = (equal[row.plan.label].at_time for row in (best, alone))
    if not ours < theirs:
        return (
            f"Train alone: {time} one peer reaches {theirs:.3f} {unit}, and the best of the others, "
            f"{best.plan.label}, {ours:.3f}{_given_time(swarm, equal, theirs)}."
        )
    beside = "" if ddp is None or best is ddp else f" and ddp {equal[ddp.plan.label].at_time:.3f}"
    sent = human_bytes(best.curve[-1].payload_bytes / best.first.last.steps)
    within = max(best.spread, alone.spread)
    sure = "" if theirs - ours > within else f", which is no more than seeds differ by ({within:.3f})"
    return (
        f"Take {best.plan.label}: {time} it reaches {ours:.3f} {unit} with {sent} per peer and step, where "
        f"one peer alone reaches {theirs:.3f}{beside}{sure}."
    )


def _given_time(swarm: Sequence[Row], equal: dict[str, Equal], loss: float) -> str:
    """What more time would bring, in words."""
    best = min(swarm, key=lambda row: equal[row.plan.label].at_tokens)
    its = equal[best.plan.label]
    if not its.at_tokens < loss:
        return ""
    whole_s = its.round_s * best.first.last.round
    return f" ({best.plan.label} {its.at_tokens:.3f}, when it is through after {human_seconds(whole_s)})"


def _warnings(rows: Sequence[Row]) -> list[str]:
    few = [f"{row.plan.label} ({row.plan.rounds})" for row in rows if row.plan.rounds < FEW_ROUNDS]
    found = []
    if few:
        found.append(
            f"Fewer than {FEW_ROUNDS} rounds say little of momentum and error feedback: {', '.join(few)}. "
            "More --rounds, or fewer inner_steps or probes."
        )
    edge = [row.plan.label for row in rows if row.is_at_edge]
    if edge:
        found.append(f"The best learning rate is the least or the most that was tried: {', '.join(edge)}.")
    if all(len(row.outcomes) == 1 for row in rows):
        found.append("One seed: --seeds 3 says how far apart seeds end.")
    if not any(row.tried for row in rows):
        found.append("No learning rate was tuned: --tune 3 gives every row the same small search.")
    return found
